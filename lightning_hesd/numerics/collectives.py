"""Communication between ranks: sums, maxima, broadcasts, and functions that fail on all ranks if they fail on one.

Every rank must call the same methods in the same order: each call waits for the other ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_hesd.numerics.devices import to_device
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

T = TypeVar("T")


class AnotherRankFailedError(RuntimeError):
    """This rank has not failed, but another one has, so that their common result cannot be computed."""

    def __init__(self, cause: str = "") -> None:
        super().__init__(f"the analysis failed on another rank{f' ({cause})' if cause else ''}")


class Collectives:
    """Communication of a single rank: every result is the rank's own value.

    Attributes:
        rank: Number of this rank, from 0.
        size: Number of ranks.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_distributed(self) -> bool:
        """Whether there are other ranks."""
        return self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, equal on all of them; the argument may be overwritten."""
        return tensor

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Return the sums of some numbers over the ranks, each by itself."""
        return list(values)

    def max(self, value: float) -> float:
        """Return the largest of the ranks' values."""
        return value

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - the value itself, not an option
        """Return whether the flag is set on any rank."""
        return flag

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        return value

    def run_together(self, function: Callable[[], T]) -> T:
        """Call a function on every rank, and return this rank's result; if it fails on any rank, raise on all of them.

        Raises:
            AnotherRankFailedError: If it failed on another rank only; on a rank where it failed, its own error is
                raised.
        """
        return function()


LOCAL = Collectives()
"""The communication of a single rank."""


class DistributedCollectives(Collectives):
    """Communication between the ranks of a process group of torch.distributed, by default of all ranks.

    Attributes:
        device: Device of the tensors that the group's backend sends.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.device = device
        self._group = group

    @override
    def sum(self, tensor: Tensor) -> Tensor:
        total = to_device(tensor, self.device)  # the tensor itself, if it is there
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device, tensor.dtype)

    @override
    def sum_values(self, values: Sequence[float]) -> list[float]:
        return self.sum(torch.tensor(values, dtype=torch.float64, device="cpu")).tolist()

    @override
    def max(self, value: float) -> float:
        found = to_device(torch.tensor(value, dtype=torch.float64, device="cpu"), self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
        return found.item()

    @override
    def any(self, flag: bool) -> bool:
        return self.sum_values([float(flag)])[0] > 0

    @override
    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, 0, self._group, self.device)
        return values[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks, which may be any objects."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    @override
    def run_together(self, function: Callable[[], T]) -> T:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - raised again below, after the other ranks have learned of it
            failure = error
        if self.any(failure is not None):
            failure = None if isinstance(failure, AnotherRankFailedError) else failure
            cause = f"rank {self.rank}: {type(failure).__name__}: {one_line(failure)}" if failure else ""
            causes = self.gather_objects(cause)
            raise failure or AnotherRankFailedError(next(filter(None, causes), ""))
        return result  # type: ignore[return-value]
