"""Parameters of which every process holds a part: gathered where they are used, differentiably, and let go of again.

Gathering is linear, full = G·parts, and so is its transpose, which adds up gradients and hands the parts back. Each is
the other's derivative, so that second derivatives come out exact, in parts, too. The full values are not kept for the
backward pass but gathered again there: at any time there are those of one parameter or a few.

Every process must take part in each of these steps, in the same order. To that end they first meet, and tell each other
where they are: if one of them has failed, or is somewhere else, all of them raise an error at this point, and none is
left waiting.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_hesd.numerics.collectives import AnotherRankFailedError, DistributedCollectives

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

# Names of torch >= 2.13, where the old ones warn.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

END, NUMBERS, SUM, MAX, FIRST_PARAMETER = range(5)
"""Numbers of the calls at which ranks meet; from the last one on, each parameter has two."""


class OutOfStepError(RuntimeError):
    """The ranks have reached different calls."""

    def __init__(self) -> None:
        super().__init__(
            "the processes take different paths through the network, and sharded parameters must be used by all of "
            "them in the same order: pass a `loss_fn` that calls the same layers for every batch"
        )


class CheckedCollectives(DistributedCollectives):
    """Communication that never waits for a rank that has failed, or that has reached another call.

    Before each exchange the ranks meet: they tell each other which call each has reached, and whether it failed.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        """Take a process group; arguments as for `DistributedCollectives`."""
        super().__init__(device, group)
        self._failure: Exception | None = None

    @override
    def run_together(self, function: Callable[[], T]) -> T:
        """Call a function on every rank, and return this rank's result; if it fails on any rank, raise on all of them.

        Raises:
            AnotherRankFailedError: If it failed on another rank only.
            OutOfStepError: If the ranks have reached different calls.
        """
        self._failure = None
        try:
            result = function()
            self._meet(END)
        except Exception as error:
            if self._failure is not None:  # every rank knows of it; later errors do not matter
                raise self._failure from None
            self._failure = error
            self._exchange(failed=True, call=END)
            raise
        return result

    def _meet(self, call: int, number: float = 0.0) -> float:
        """Wait until all ranks have reached a call, and return the sum of the numbers they bring.

        Raises:
            AnotherRankFailedError: If a rank has failed instead.
            OutOfStepError: If a rank has reached another call.
        """
        if self._failure is not None:  # the user's code has caught it and goes on, but the other ranks have left
            raise self._failure
        failures, calls, squares, total = self._exchange(failed=False, call=call, number=number)
        if failures:
            self._failure = AnotherRankFailedError()
        elif calls**2 != self.size * squares:  # equal if and only if all calls are
            self._failure = OutOfStepError()
        if self._failure is not None:
            raise self._failure
        return total

    def _exchange(self, *, failed: bool, call: int, number: float = 0.0) -> list[float]:
        state = torch.tensor([float(failed), call, call**2, number], dtype=torch.float64)
        return super().sum(state).tolist()

    @override
    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, equal on all of them; a scalar travels with the meeting."""
        if tensor.ndim == 0:
            return tensor.new_tensor(self._meet(NUMBERS, tensor.item()))
        total = tensor.detach().clone()  # nothing may fail between meeting and exchange, not even for want of memory
        self._meet(SUM)
        return super().sum(total)

    @override
    def max(self, value: float) -> float:
        self._meet(MAX)
        return super().max(value)

    def gather(self, part: Tensor, rows: int, call: int) -> Tensor:
        """Return all rows of a tensor that is cut as `torch.chunk` does, given the rows of this rank."""
        chunk = -(-rows // self.size)
        padded, full = _padded(part, chunk), part.new_empty(chunk * self.size, *part.shape[1:])
        self._meet(call)
        _all_gather(full, padded, group=self._group)
        return full[:rows]

    def scatter_sum(self, full: Tensor, rows: int, call: int) -> Tensor:
        """Return this rank's rows, of which there are `rows`, of the sum of a tensor over the ranks."""
        chunk = -(-len(full) // self.size)
        padded, part = _padded(full, chunk * self.size), full.new_empty(chunk, *full.shape[1:])
        self._meet(call)
        _reduce_scatter(part, padded, group=self._group)
        return part[:rows]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """Return a tensor with so many rows, the last ones zero, in one piece of memory."""
    if len(tensor) == rows:
        return tensor.contiguous()
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


@dataclass(eq=False)
class Shard:
    """A parameter cut along one dimension.

    Attributes:
        parameter: The parameter, a DTensor.
        part: What this process holds of it, in the same memory: a leaf to differentiate by.
        dim: Along which dimension it is cut.
        number: Its number among all parameters.
        collectives: Communication between the ranks that hold its shards.
    """

    parameter: Tensor
    part: Tensor
    dim: int
    number: int
    collectives: CheckedCollectives

    def gather(self, part: Tensor) -> Tensor:
        """Return G·parts, in the shape of the parameter."""
        moved = part.detach().movedim(self.dim, 0)
        full = self.collectives.gather(moved, self.parameter.shape[self.dim], FIRST_PARAMETER + 2 * self.number)
        return full.movedim(0, self.dim)

    def scatter_sum(self, full: Tensor) -> Tensor:
        """Return this process's part of Gᵀ·full, in the shape of the part."""
        moved = full.detach().movedim(self.dim, 0)
        rows = self.part.shape[self.dim]
        return self.collectives.scatter_sum(moved, rows, FIRST_PARAMETER + 2 * self.number + 1).movedim(0, self.dim)

    def own(self, full: Tensor) -> Tensor:
        """Return this process's part of a tensor in the shape of the parameter."""
        size = self.parameter.shape[self.dim]
        start = min(self.collectives.rank * -(-size // self.collectives.size), size)
        return full.narrow(self.dim, start, self.part.shape[self.dim])


class _Full(torch.autograd.Function):
    """G, of the parts of vectors."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.gather(part)

    @staticmethod
    def backward(ctx: Any, full: Tensor) -> tuple[Tensor, None]:
        return _Part.apply(full, ctx.shard), None  # type: ignore[no-untyped-call]


class _Part(torch.autograd.Function):
    """Gᵀ."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.scatter_sum(full)

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> tuple[Tensor, None]:
        return _Full.apply(part, ctx.shard), None  # type: ignore[no-untyped-call]


class _Weights(torch.autograd.Function):
    """G, of the parameter itself, whose full values may be there already."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard, gathered: GatheredParameters) -> Tensor:  # noqa: ARG004
        ctx.shard = shard
        return gathered.values(shard).detach()

    @staticmethod
    def backward(ctx: Any, full: Tensor) -> tuple[Tensor, None, None]:
        return _Part.apply(full, ctx.shard), None, None  # type: ignore[no-untyped-call]


class GatheredParameters:
    """The full values of sharded parameters, for as long as they are needed.

    Those gathered last stay until others are, because layers ask for them several times in a row. Where graphs would
    keep them for a backward pass, they keep the name of the parameter instead.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = {id(shard.parameter): shard for shard in shards}
        self._latest: tuple[Shard, Tensor] | None = None
        self._known: dict[int, tuple[Shard, weakref.ref[Any]]] = {}  # by storage

    def __call__(self, value: Any) -> Any:
        """Return the full parameter, with a graph that ends in its part, for a sharded one; else the value itself."""
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor | list | tuple) for item in value):
            items = [self(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        shard = self._shards.get(id(value))
        return value if shard is None else _Weights.apply(shard.part, shard, self)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Let go of full values: the parameters may have been moved."""
        self._latest = None

    def values(self, shard: Shard) -> Tensor:
        """Return the full values of a parameter, without a graph."""
        if self._latest is None or self._latest[0] is not shard:
            self._latest = None  # before there are others
            self._latest = (shard, shard.gather(shard.part))
            storage = self._latest[1].untyped_storage()
            key = storage._cdata  # noqa: SLF001 - as an id: Python objects of one storage come and go
            known = self._known
            self._known[key] = (shard, weakref.ref(storage, lambda _: known.pop(key, None)))
        return self._latest[1]

    def named(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which graphs keep names of parameters instead of their full values."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        found = self._known.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None  # noqa: SLF001
        if found is None or tensor.dtype != found[0].part.dtype:
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
"""Methods of tensors that ask, or say, something of a parameter that is the same for all of it."""

_VALUES = {Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.data, Tensor.real}
"""Attributes of tensors that are more than that."""


@contextlib.contextmanager
def full_attributes(gathered: GatheredParameters) -> Iterator[None]:
    """Let modules have full parameters in place of sharded ones, also where a backward pass evaluates them anew."""
    own = nn.Module.__getattr__

    def full(self: nn.Module, name: str) -> Any:
        return gathered(own(self, name))

    nn.Module.__getattr__ = full  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = own  # type: ignore[method-assign]


class Gathering(TorchFunctionMode):
    """Gives operations full parameters in place of sharded ones that were not found as attributes of their modules."""

    def __init__(self, gathered: GatheredParameters) -> None:
        super().__init__()
        self._gathered = gathered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METADATA or (name == "__get__" and func.__self__ not in _VALUES):
            return func(*args, **(kwargs or {}))
        return func(*self._gathered(args), **{key: self._gathered(value) for key, value in (kwargs or {}).items()})
