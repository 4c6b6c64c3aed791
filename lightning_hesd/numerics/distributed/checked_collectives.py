"""Collectives that raise on every rank, instead of waiting forever, when one rank fails or takes another path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_hesd.numerics.collectives import AnotherRankFailedError, DistributedCollectives

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

T = TypeVar("T")

# Names of torch >= 2.13, where the old ones warn.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

END, NUMBER, SUM, MAX, FIRST_PARAMETER = range(5)
"""Numbers of the calls at which ranks meet; from the last one on, each parameter has two."""


class OutOfStepError(RuntimeError):
    """The ranks have reached different calls."""

    def __init__(self) -> None:
        super().__init__(
            "the ranks take different paths through the network, and sharded parameters must be used by all of "
            "them in the same order: pass a `loss_fn` that calls the same layers for every batch"
        )


class CheckedCollectives(DistributedCollectives):
    """Collectives for ranks that evaluate the user's functions together.

    Before every exchange the ranks meet: each tells the others which call it has reached, and whether it has failed. If
    one has failed, or has reached another call, all of them raise an error.
    """

    _failure: Exception | None = None

    @override
    def run_together(self, function: Callable[[], T]) -> T:
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

    @override
    def sum(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor.new_tensor(self._meet(NUMBER, tensor.item()))  # one exchange is enough
        total = tensor.detach().to(self.device, copy=True)
        self._meet(SUM)
        return super().sum(total).to(tensor.device)

    @override
    def max(self, value: float) -> float:
        self._meet(MAX)
        return super().max(value)

    # Nothing may fail between meeting and exchange, not even for want of memory, so tensors are made before they meet.

    def gather(self, shard: Tensor, rows: int, call: int) -> Tensor:
        """Return all rows of a tensor that is cut as `torch.chunk` does, given this rank's rows."""
        chunk = -(-rows // self.size)
        padded, full = _padded(shard, chunk), shard.new_empty(chunk * self.size, *shard.shape[1:])
        self._meet(call)
        _all_gather(full, padded, group=self._group)
        return full[:rows]

    def scatter_sum(self, full: Tensor, rows: int, call: int) -> Tensor:
        """Return this rank's rows, `rows` of them, of the sum of a tensor over the ranks."""
        chunk = -(-len(full) // self.size)
        padded, shard = _padded(full, chunk * self.size), full.new_empty(chunk, *full.shape[1:])
        self._meet(call)
        _reduce_scatter(shard, padded, group=self._group)
        return shard[:rows]

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
        state = torch.tensor([float(failed), call, call**2, number], dtype=torch.float64, device="cpu")
        return super().sum(state).tolist()


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """Return a contiguous tensor with so many rows, the additional ones zero."""
    if len(tensor) == rows:
        return tensor.contiguous()
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
