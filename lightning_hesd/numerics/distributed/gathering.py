"""Full parameters in place of shards: gathered where the network uses them, differentiable, and released again.

Gathering is a linear map G of the shards of all ranks to the full parameter. Its transpose Gᵀ adds up the gradients of
the ranks and returns each rank its shard. The derivative of G is Gᵀ and that of Gᵀ is G, so that second derivatives
with respect to shards are exact. Graphs do not keep full parameters for the backward pass, which gathers them again: at
any time one parameter or a few are in memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.distributed.checked_collectives import FIRST_PARAMETER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from lightning_hesd.numerics.collectives import Collectives
    from lightning_hesd.numerics.distributed.checked_collectives import CheckedCollectives


@dataclass(eq=False)
class Shard:
    """This rank's shard of a parameter that is cut along one dimension.

    Attributes:
        parameter: The parameter, a DTensor.
        local: The shard, in the memory of the parameter: a leaf to differentiate by.
        dim: Dimension along which the parameter is cut.
        number: Number of the parameter among all parameters of the module.
        collectives: Communication between the ranks that hold the shards.
    """

    parameter: Tensor
    local: Tensor
    dim: int
    number: int
    collectives: CheckedCollectives

    def gather(self, local: Tensor) -> Tensor:
        """Return G applied to the shards of all ranks, in the shape of the parameter; `local` is this rank's."""
        moved = local.detach().movedim(self.dim, 0)
        full = self.collectives.gather(moved, self.parameter.shape[self.dim], FIRST_PARAMETER + 2 * self.number)
        return full.movedim(0, self.dim)

    def scatter_sum(self, full: Tensor) -> Tensor:
        """Return this rank's shard of Gᵀ applied to `full`, in the shape of the shard."""
        moved = full.detach().movedim(self.dim, 0)
        rows = self.local.shape[self.dim]
        return self.collectives.scatter_sum(moved, rows, FIRST_PARAMETER + 2 * self.number + 1).movedim(0, self.dim)

    def own(self, full: Tensor) -> Tensor:
        """Return this rank's shard of a tensor that has the shape of the parameter."""
        size = self.parameter.shape[self.dim]
        start = min(self.collectives.rank * -(-size // self.collectives.size), size)
        return full.narrow(self.dim, start, self.local.shape[self.dim])


class _Gather(torch.autograd.Function):
    """G; for the parameter's own shards with `gathered`, which may have the full values already."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: Shard, gathered: GatheredParameters | None) -> Tensor:
        ctx.shard = shard
        return shard.gather(local) if gathered is None else gathered.values(shard).detach()

    @staticmethod
    def backward(ctx: Any, full: Tensor) -> tuple[Tensor, None, None]:
        return _ScatterSum.apply(full, ctx.shard), None, None  # type: ignore[no-untyped-call]


class _ScatterSum(torch.autograd.Function):
    """Gᵀ."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.scatter_sum(full)

    @staticmethod
    def backward(ctx: Any, local: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(local, ctx.shard, None), None  # type: ignore[no-untyped-call]


class GatheredParameters:
    """The full values of sharded parameters, for as long as they are needed.

    The values gathered last stay until others are gathered, because layers use a parameter several times in a row.
    Graphs keep a reference to the parameter's shard in place of full values, and gather them in the backward pass.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = {id(shard.parameter): shard for shard in shards}
        self._latest: tuple[Shard, Tensor] | None = None
        self._known: dict[int, tuple[Shard, weakref.ref[Any]]] = {}  # by storage

    def __call__(self, value: Any) -> Any:
        """Return the full parameter in place of a sharded one, also within lists and tuples; else the value itself.

        The graph of a full parameter ends in its local shard.
        """
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor | list | tuple) for item in value):
            items = [self(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        shard = self._shards.get(id(value))
        return value if shard is None else _Gather.apply(shard.local, shard, self)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Release full values, because the parameters may have changed."""
        self._latest = None

    def values(self, shard: Shard) -> Tensor:
        """Return the full values of a parameter, without a graph."""
        if self._latest is None or self._latest[0] is not shard:
            self._latest = None  # frees the memory before the next values are gathered
            self._latest = (shard, shard.gather(shard.local))
            storage = self._latest[1].untyped_storage()
            key = storage._cdata  # noqa: SLF001 - as an id: Python objects of one storage come and go
            known = self._known
            self._known[key] = (shard, weakref.ref(storage, lambda _: known.pop(key, None)))
        return self._latest[1]

    def kept_as_shards(self) -> AbstractContextManager[None]:
        """Return the context in which graphs keep references to shards in place of full values."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        found = self._known.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None  # noqa: SLF001
        if found is None or tensor.dtype != found[0].local.dtype:
            return tensor.detach()  # itself, it would be part of a cycle
        return found[0], tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shard, *geometry = packed
        return torch.as_strided(self.values(shard), *geometry)


_METADATA = {
    *("__set__", "__len__", "__repr__", "__format__", "size", "dim", "ndimension", "numel", "nelement", "stride"),
    *("is_floating_point", "is_complex", "element_size", "get_device", "requires_grad_", "register_hook"),
}
"""Methods of tensors that need no full values."""

_VALUES = {Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.data, Tensor.real}
"""Attributes of tensors that need full values."""


def full_attributes(gathered: GatheredParameters) -> AbstractContextManager[None]:
    """Let attributes of modules be full parameters in place of sharded ones, also when a backward pass recomputes."""
    own = nn.Module.__getattr__

    def full(self: nn.Module, name: str) -> Any:
        return gathered(own(self, name))

    return patched(nn.Module, "__getattr__", full)


class FullArguments(TorchFunctionMode):
    """Gives operations full parameters in place of sharded ones that did not come from attributes of modules."""

    def __init__(self, gathered: GatheredParameters) -> None:
        super().__init__()
        self._gathered = gathered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METADATA or (name == "__get__" and func.__self__ not in _VALUES):
            return func(*args, **(kwargs or {}))
        return func(*self._gathered(args), **{key: self._gathered(value) for key, value in (kwargs or {}).items()})


class _SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' tensors, as a function of this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, collectives: Collectives) -> Tensor:  # noqa: ARG004
        return collectives.sum(local)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return cotangent, None


def sum_over_ranks(local: Tensor, collectives: Collectives) -> Tensor:
    """Return the sum of the ranks' tensors, as a differentiable function of this rank's tensor."""
    total: Tensor = _SumOverRanks.apply(local, collectives)  # type: ignore[no-untyped-call]
    return total
