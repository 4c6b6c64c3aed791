"""Parameters of which every rank holds a shard (`fully_shard` of PyTorch, FSDP2).

Parameters stay sharded, and so are vectors: a rank has the elements of its shards, and only inner products are summed
over ranks. The user's functions compute with full parameters, gathered one at a time (see `gathering`). The hooks of
`fully_shard` are removed meanwhile, because they cannot be differentiated.

All ranks evaluate a joint batch together: one batch of each rank. The loss is the mean over these batches, so that the
sum over ranks is a part of the differentiated function, and each rank finds its shard of the complete product. A rank
that has no batch left takes part with a batch of weight zero.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.distributed.tensor import Shard as ShardPlacement
from typing_extensions import override

from lightning_hesd.numerics.derivatives.graphs import graph_nodes
from lightning_hesd.numerics.distributed.gathering import (
    FullArguments,
    GatheredParameters,
    Shard,
    full_attributes,
    sum_over_ranks,
)
from lightning_hesd.numerics.dtensors import is_dtensor, local_shard
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.numerics.inputs.tokens import ADVICE
from lightning_hesd.numerics.krylov.vectors import VectorSpace, gaussian_pieces, sign_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from lightning_hesd.numerics.collectives import Collectives
    from lightning_hesd.numerics.distributed.checked_collectives import CheckedCollectives
    from lightning_hesd.numerics.inputs.options import AnalysisOptions


class UnsupportedShardingError(ValueError):
    """The analysis does not support how the parameters are sharded."""


@dataclass(frozen=True, kw_only=True)
class JointBatch(WeightedBatch):
    """One batch of each rank, evaluated together; `data` is that of this rank's batch.

    Attributes:
        share: Share of this rank's batch in the weighted mean over all ranks' batches; 0 for a padding batch.
        members: Indices of the batches, without padding batches.
    """

    share: float
    members: tuple[int, ...]

    @property
    def label(self) -> str:
        """Name of the batch in messages."""
        if len(self.members) == 1:
            return f"batch {self.members[0]}"
        return f"one of the batches {', '.join(map(str, self.members))}"


class FullySharded(ParameterSharding):
    """Every rank holds a shard of each parameter."""

    is_sharded = True

    def __init__(self, module: nn.Module, collectives: CheckedCollectives) -> None:
        """Find the shards of a module's parameters; those that `fully_shard` has gathered are resharded.

        Raises:
            UnsupportedShardingError: If a parameter is not cut along one dimension, over all ranks.
        """
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - takes long to load

        self.collectives = collectives
        for submodule in module.modules():
            if isinstance(submodule, FSDPModule):
                submodule.reshard()
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self._shards = {
            p: _shard(name, p, number, collectives)
            for number, (p, name) in enumerate(self._names.items())
            if is_dtensor(p)
        }
        self._by_local: dict[Tensor, Shard] = {shard.local: shard for shard in self._shards.values()}
        self._gathered = GatheredParameters(list(self._shards.values()))
        self._checked: set[int] = set()  # indices of batches

    @override
    def check(self, options: AnalysisOptions) -> None:
        if options.wants_sampling_error:
            msg = (
                "sampling errors are not available for sharded parameters: leave out `sampling_error=True`, "
                "`tolerance='auto'` and `num_samples='auto'`."
            )
            raise ValueError(msg)
        if options.preconditioner is not None:
            msg = "`preconditioner` is not available for sharded parameters: leave it out."
            raise ValueError(msg)
        if options.batch_weight == "tokens":
            msg = (
                '`batch_weight="tokens"` is not available for sharded parameters: pass a function of the batch, such '
                f"as `{ADVICE}`."
            )
            raise ValueError(msg)

    @override
    def local_shards(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = [self._names[p] for p in parameters if p not in self._shards]
        if whole:
            msg = (
                f"parameter {whole[0]!r} is not sharded: apply `fully_shard` to a module that holds it, "
                "freeze it, or leave it out with `parameters=`."
            )
            raise UnsupportedShardingError(msg)
        return [self._shards[p].local.requires_grad_() for p in parameters]

    @override
    @contextlib.contextmanager
    def full_parameters(self, module: nn.Module) -> Iterator[None]:
        """Let modules compute with full parameters that depend on the local shards."""
        try:
            with _without_hooks(module), self._gathered.kept_as_shards(), full_attributes(self._gathered):
                yield
        finally:
            self._gathered.forget()

    @override
    def space(self, shards: Sequence[Tensor]) -> VectorSpace:
        return ShardedSpace([self._by_local[shard] for shard in shards], self.collectives, self._gathered)

    @override
    def joint_batches(self, batches: Sequence[WeightedBatch]) -> Sequence[WeightedBatch]:
        """Return as many joint batches on every rank as the rank with most batches has.

        Raises:
            ValueError: If this rank has no batch, not even a padding batch.
        """
        if not batches:
            msg = "every rank needs a batch, at least a padding batch: `batches` is empty on this rank."
            raise ValueError(msg)
        counted = [batch for batch in batches if not batch.is_padding]
        rounds = round(self.collectives.max(len(counted)))
        table = torch.zeros(3, rounds, self.collectives.size, dtype=torch.float64, device="cpu")
        for row, batch in enumerate(counted):
            own_row = [batch.weight, batch.index, batch.num_samples]
            table[:, row, self.collectives.rank] = torch.tensor(own_row, dtype=torch.float64, device="cpu")
        weights, indices, sizes = self.collectives.sum(table)
        own = [*counted, *[batches[0]] * (rounds - len(counted))]
        return [
            JointBatch(
                batch.data,
                float(weights[row].sum()),
                batch.index,
                position=batch.position,
                size=float(sizes[row].sum()),
                share=float(weights[row, self.collectives.rank] / weights[row].sum()),
                members=tuple(int(index) for index in indices[row][weights[row] > 0]),
            )
            for row, batch in enumerate(own)
        ]

    @override
    def evaluation(self) -> AbstractContextManager[None]:
        self._gathered.forget()
        return FullArguments(self._gathered)

    @override
    def mean_loss(self, local_loss: Tensor, batch: WeightedBatch) -> Tensor:
        """Return the mean loss over the batches of all ranks, given that of this rank's batch.

        Raises:
            ArithmeticError: If the local loss is NaN or infinite.
            UnsupportedShardingError: If the local loss does not depend on the local shards by way of `gathering`.
        """
        assert isinstance(batch, JointBatch)  # noqa: S101 - see `joint_batches`
        if not local_loss.isfinite():
            msg = f"the loss of batch {batch.index} is {local_loss.item()}; the Hessian is undefined there."
            raise ArithmeticError(msg)
        if batch.index not in self._checked:
            _check_differentiable(local_loss)
            self._checked.add(batch.index)
        return sum_over_ranks(local_loss * batch.share, self.collectives)


class ShardedSpace(VectorSpace):
    """Vectors over sharded parameters; a tensor of shape (m,) has the elements of this rank's shards."""

    def __init__(self, shards: Sequence[Shard], collectives: Collectives, gathered: GatheredParameters) -> None:
        super().__init__(sum(shard.parameter.numel() for shard in shards))
        self._shards = shards
        self._collectives = collectives
        self._gathered = gathered

    @override
    def total(self, value: float) -> float:
        return self._sum(torch.tensor(value, dtype=torch.float64, device="cpu")).item()

    @override
    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        return self._sum(super().dot(first, second))

    @override
    def norm(self, vector: Tensor) -> Tensor:
        return self._sum(torch.linalg.vector_norm(vector, dtype=torch.float64).square()).sqrt().to(vector.dtype)

    @override
    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        return self._sum(super().coefficients(basis, vector))

    @override
    def is_finite(self, vector: Tensor) -> bool:
        return not self._collectives.any(not vector.isfinite().all())

    @override
    def gaussian(self, generator: Generator) -> Tensor:
        return self._draw(gaussian_pieces, generator)

    @override
    def signs(self, generator: Generator) -> Tensor:
        return self._draw(sign_pieces, generator)

    @override
    def parameters_moved(self) -> None:
        self._gathered.forget()  # the next use may be the backward pass of a graph that was made before

    def _sum(self, local: Tensor) -> Tensor:
        return self._collectives.sum(local.double()).to(local.dtype)

    def _draw(self, pieces: Callable[[Sequence[int], Generator], Iterator[Tensor]], generator: Generator) -> Tensor:
        """Draw the elements of each parameter, in turn, and keep those of this rank's shard."""
        shapes = [shard.parameter.shape for shard in self._shards]
        drawn = zip(self._shards, shapes, pieces([shape.numel() for shape in shapes], generator), strict=True)
        # Copied, because a view would keep all elements in memory.
        return torch.cat([shard.own(piece.view(shape)).flatten().clone() for shard, shape, piece in drawn])


def _check_differentiable(loss: Tensor) -> None:
    """Refuse a loss whose graph ends in a sharded parameter in place of its shard: its gradient would be missing.

    Raises:
        UnsupportedShardingError: If the graph of the loss does.
    """
    for node in graph_nodes([loss]):
        variable = getattr(node, "variable", None)  # of nodes that add up the gradient of a leaf
        if isinstance(variable, nn.Parameter):
            msg = (
                f"the loss uses a sharded parameter of shape {tuple(variable.shape)} in a way that cannot be "
                "followed (a method that `register_fsdp_forward_method` was applied to, or a custom autograd "
                "function of what `parameters()` returns): pass a `loss_fn` that calls modules."
            )
            raise UnsupportedShardingError(msg)


def _shard(name: str, parameter: Any, number: int, collectives: CheckedCollectives) -> Shard:
    """Return this rank's shard of a parameter, a DTensor.

    Raises:
        UnsupportedShardingError: If the parameter is not cut along one dimension, over all ranks.
    """
    placements, mesh = parameter.placements, parameter.device_mesh
    if len(placements) == 1 and type(placements[0]) is ShardPlacement and mesh.size() == collectives.size:
        return Shard(parameter, local_shard(parameter).detach(), placements[0].dim, number, collectives)
    msg = (
        f"parameter {name!r} is distributed as {tuple(placements)} on {mesh}, which the analysis does not support: "
        f"shard it over all {collectives.size} processes, fully_shard(module, mesh=self.device_mesh['data_parallel']), "
        "without tensor parallelism."
    )
    raise UnsupportedShardingError(msg)


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Remove the hooks of `fully_shard` for a while."""
    registries = [hooks for m in module.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]  # noqa: SLF001
    saved = [(hooks, dict(hooks)) for hooks in registries if any(map(_is_of_fsdp, hooks.values()))]
    try:
        for hooks, before in saved:
            for key, hook in before.items():
                if _is_of_fsdp(hook):
                    del hooks[key]
        yield
    finally:
        for hooks, before in saved:
            hooks.clear()
            hooks.update(before)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
