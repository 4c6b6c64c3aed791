"""The layout in which every process holds a part of each parameter (`fully_shard` of PyTorch, FSDP2).

The parameters stay where they are. Vectors lie as they do: each process has the elements that belong to its parts, and
only inner products are summed over the processes. What the user's functions see are full parameters, gathered one at a
time where they are used (see `gathering`). The hooks of `fully_shard` are set aside: what they do has no derivative.

A product takes one batch of each process at a time, and gives the product with the mean over these, in parts: the sum
over processes lies within the derivative. A process that has no batch left takes part with one that counts for nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard as ShardPlacement
from typing_extensions import override

from lightning_hesd.numerics.derivatives.graphs import graph_nodes
from lightning_hesd.numerics.distributed.gathering import (
    GatheredParameters,
    Gathering,
    Processes,
    Shard,
    full_attributes,
)
from lightning_hesd.numerics.dtensors import is_dtensor, local_shard
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.parameter_sharding import Layout
from lightning_hesd.numerics.inputs.tokens import ADVICE
from lightning_hesd.numerics.krylov.vectors import VectorSpace, gaussian_pieces, sign_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Generator


class UnsupportedLayoutError(ValueError):
    """The parameters lie in a way that the analysis does not know."""


@dataclass(frozen=True, kw_only=True)
class JointBatch(WeightedBatch):
    """What the processes work on together: one batch of each, of which this process has its own.

    Attributes:
        share: Share of the own batch in the mean over them; 0 if it only keeps this process in step.
        members: The batches that count, by their positions.
    """

    share: float
    members: tuple[int, ...]

    @property
    def label(self) -> str:
        """What messages call it."""
        if len(self.members) == 1:
            return f"batch {self.members[0]}"
        return f"one of the batches {', '.join(map(str, self.members))}"


class ShardedSpace(VectorSpace):
    """Vectors of which this process holds the elements that belong to its parts of the parameters, shape (m,)."""

    def __init__(self, shards: Sequence[Shard], processes: Processes) -> None:
        super().__init__(sum(shard.parameter.numel() for shard in shards))
        self._shards = shards
        self._processes = processes

    @override
    def total(self, value: float) -> float:
        return self._sum(torch.tensor(value, dtype=torch.float64)).item()

    @override
    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        return self._sum(torch.dot(first, second))

    @override
    def norm(self, vector: Tensor) -> Tensor:
        return self._sum(torch.linalg.vector_norm(vector, dtype=torch.float64).square()).sqrt().to(vector.dtype)

    @override
    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        return self._sum(basis @ vector)

    @override
    def is_finite(self, vector: Tensor) -> bool:
        return not self._processes.largest(float(not vector.isfinite().all()))

    @override
    def gaussian(self, generator: Generator) -> Tensor:
        return self._draw(gaussian_pieces, generator)

    @override
    def signs(self, generator: Generator) -> Tensor:
        return self._draw(sign_pieces, generator)

    def _sum(self, parts: Tensor) -> Tensor:
        return self._processes.sum(parts.double()).to(parts.dtype)

    def _draw(self, pieces: Callable[[Sequence[int], Generator], Iterator[Tensor]], generator: Generator) -> Tensor:
        """Keep of each parameter's piece what belongs to the part here."""
        shapes = [shard.parameter.shape for shard in self._shards]
        drawn = zip(self._shards, shapes, pieces([shape.numel() for shape in shapes], generator), strict=True)
        # Copied, as a view would hold all of the piece.
        return torch.cat([shard.own(piece.view(shape)).flatten().clone() for shard, shape, piece in drawn])


class ShardedLayout(Layout):
    """Every process holds a part of each parameter.

    Attributes:
        processes: They.
    """

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        """Look how the parameters lie.

        Args:
            module: The module; the parameters of its parts that `fully_shard` was applied to are put back into pieces,
                should they be gathered now.
            processes: All processes.

        Raises:
            UnsupportedLayoutError: If a parameter lies otherwise.
        """
        self.processes = processes
        self.all_reduce = processes.sum
        for part in module.modules():
            if isinstance(part, _fsdp_module()):
                part.reshard()
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self._shards = {
            p: _shard(name, p, number, processes)
            for number, (p, name) in enumerate(self._names.items())
            if is_dtensor(p)
        }
        self._by_part: dict[Tensor, Shard] = {shard.part: shard for shard in self._shards.values()}
        self._gathered = GatheredParameters(list(self._shards.values()))
        self._followed: set[int] = set()

    @override
    def check(self, *, groups: bool, scaled: bool, weighed: bool) -> None:
        """Refuse what has not been built for parts.

        Raises:
            ValueError: If that is asked for.
        """
        if groups:
            msg = (
                "sampling errors are not available for sharded parameters: leave out `sampling_error=True`, "
                "`tolerance='auto'` and `num_samples='auto'`."
            )
            raise ValueError(msg)
        if scaled:
            msg = "`preconditioner` is not available for sharded parameters: leave it out."
            raise ValueError(msg)
        if weighed:
            msg = (
                '`batch_weight="tokens"` is not available for sharded parameters: pass a function of the batch, such '
                f"as `{ADVICE}`."
            )
            raise ValueError(msg)

    @override
    def parts(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what this process holds of each parameter.

        Raises:
            UnsupportedLayoutError: If one of these is not sharded.
        """
        whole = [self._names[p] for p in parameters if p not in self._shards]
        if whole:
            msg = (
                f"parameter {whole[0]!r} is not sharded: apply `fully_shard` to a module that holds it, "
                "freeze it, or leave it out with `parameters=`."
            )
            raise UnsupportedLayoutError(msg)
        return [self._shards[p].part.requires_grad_() for p in parameters]

    @override
    @contextlib.contextmanager
    def opened(self, module: nn.Module) -> Iterator[None]:
        """Let the user's functions find full parameters."""
        try:
            with _without_hooks(module), self._gathered.named(), full_attributes(self._gathered):
                yield
        finally:
            self._gathered.forget()

    @override
    def space(self, parts: Sequence[Tensor]) -> VectorSpace:
        return ShardedSpace([self._by_part[part] for part in parts], self.processes)

    @override
    def joint(self, batches: Sequence[WeightedBatch]) -> Sequence[WeightedBatch]:
        """Let each process take part in as many rounds as the one with most batches has.

        Raises:
            ValueError: If a process has none, not even a padding batch.
        """
        if not batches:
            msg = "a process has no batch, but must take part: `batches` is empty."
            raise ValueError(msg)
        counted = [batch for batch in batches if not batch.is_padding]
        rounds = round(self.processes.largest(len(counted)))
        table = torch.zeros(3, rounds, self.processes.size, dtype=torch.float64)
        for row, batch in enumerate(counted):
            own_row = [batch.weight, batch.index, batch.num_samples]
            table[:, row, self.processes.rank] = torch.tensor(own_row, dtype=torch.float64)
        weights, indices, sizes = self.processes.sum(table)
        own = [*counted, *[batches[0]] * (rounds - len(counted))]
        return [
            JointBatch(
                batch.data,
                float(weights[row].sum()),
                batch.index,
                position=batch.position,
                size=float(sizes[row].sum()),
                share=float(weights[row, self.processes.rank] / weights[row].sum()),
                members=tuple(int(index) for index in indices[row][weights[row] > 0]),
            )
            for row, batch in enumerate(own)
        ]

    @override
    def evaluation(self) -> AbstractContextManager[None]:
        self._gathered.forget()
        return Gathering(self._gathered)

    @override
    def loss(self, own: Tensor, batch: WeightedBatch) -> Tensor:
        """Return the mean loss over the batches of all processes, of which the derivative here is the own one's.

        Raises:
            ArithmeticError: If the own loss is NaN or infinite.
            UnsupportedLayoutError: If it was computed with other parameters than those of the layout.
        """
        assert isinstance(batch, JointBatch)  # noqa: S101 - see `joint`
        if not own.isfinite():
            msg = f"the loss of batch {batch.index} is {own.item()}; the Hessian is undefined there."
            raise ArithmeticError(msg)
        if batch.index not in self._followed:
            self._check_followed(own)
            self._followed.add(batch.index)
        total: Tensor = _Total.apply(own * batch.share, self.processes)  # type: ignore[no-untyped-call]
        return total

    @override
    def largest(self, value: float) -> float:
        return self.processes.largest(value)

    def _check_followed(self, loss: Tensor) -> None:
        """Look whether gradients would go past the parts.

        Raises:
            UnsupportedLayoutError: If they would.
        """
        for node in graph_nodes([loss]):
            variable = getattr(node, "variable", None)  # of nodes that add up the gradient of a leaf
            if isinstance(variable, nn.Parameter):
                msg = (
                    f"the loss uses a sharded parameter of shape {tuple(variable.shape)} in a way that cannot be "
                    "followed (a method that `register_fsdp_forward_method` was applied to, or a custom autograd "
                    "function of what `parameters()` returns): pass a `loss_fn` that calls modules."
                )
                raise UnsupportedLayoutError(msg)


class _Total(torch.autograd.Function):
    """The sum over processes, as a function of the own summand."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:  # noqa: ARG004
        return processes.sum(own)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return slope, None


def _fsdp_module() -> Any:
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - takes long to load

    return FSDPModule


def _shard(name: str, parameter: Any, number: int, processes: Processes) -> Shard:
    """Return how a parameter is cut.

    Raises:
        UnsupportedLayoutError: If it is not cut along one dimension, over all processes.
    """
    placements, mesh = parameter.placements, parameter.device_mesh
    if len(placements) == 1 and type(placements[0]) is ShardPlacement and mesh.size() == processes.size:
        return Shard(parameter, local_shard(parameter).detach(), placements[0].dim, number, processes)
    msg = (
        f"parameter {name!r} lies as {tuple(placements)} on {mesh}, which the analysis does not know: shard it over "
        f"all {processes.size} processes, fully_shard(module, mesh=self.device_mesh['data_parallel']), without tensor "
        "parallelism."
    )
    raise UnsupportedLayoutError(msg)


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Set the hooks of `fully_shard` aside."""
    registries = [hooks for part in module.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]  # noqa: SLF001
    hooks = [(registered, dict(registered)) for registered in registries if any(map(_is_of_fsdp, registered.values()))]
    try:
        for registered, _ in hooks:
            for key in [key for key, hook in registered.items() if _is_of_fsdp(hook)]:
                del registered[key]
        yield
    finally:
        for registered, before in hooks:
            registered.clear()
            registered.update(before)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
