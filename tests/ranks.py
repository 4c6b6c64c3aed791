"""Stand-ins for the ranks of a distributed analysis: threads, or a function in place of the other ranks."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hesd.numerics.collectives import DistributedCollectives
from lightning_hesd.numerics.isolation.exact_mode import exact_mode


class StandIn(DistributedCollectives):
    """One of several ranks; a function makes the sum from what this rank contributes."""

    def __init__(self, sum_of: Callable[[Tensor], Tensor] = torch.Tensor.clone, rank: int = 0, size: int = 2) -> None:
        self.rank, self.size = rank, size
        self._sum_of = sum_of

    def sum(self, tensor: Tensor) -> Tensor:
        return self._sum_of(tensor)

    def max(self, value: float) -> float:
        return value

    def broadcast(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


class Meeting:
    """Where threads that stand for ranks exchange values."""

    def __init__(self, members: int) -> None:
        self.barrier = threading.Barrier(members, timeout=60)
        self.given: dict[int, Any] = {}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        self.given[rank] = value
        self.barrier.wait()
        values = [self.given[member] for member in sorted(self.given)]
        self.barrier.wait()  # no rank gives a new value before all have read
        return values


class ThreadRank(DistributedCollectives):
    """A thread that stands for a rank."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.barrier.parties
        self._meeting = meeting

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Return the values of all ranks, as torchmetrics asks for them."""
        return self.gather_objects(value)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._meeting.exchange(self.rank, value)

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(tensor.clone())).sum(dim=0)

    def max(self, value: float) -> float:
        return max(self.gather_objects(value))

    def broadcast(self, value: Any) -> Any:
        return self.gather_objects(value)[0]


def in_threads(ranks: int, work: Callable[[Any], Any]) -> list[Any]:
    """Return what each of several threads found, each in the place of a rank."""
    meeting, found = Meeting(ranks), {}

    def run(rank: int) -> None:
        found[rank] = work(ThreadRank(meeting, rank))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    with exact_mode(torch.nn.Module()):  # or one would restore the settings of another: threads have them in common
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    return [found[rank] for rank in range(ranks)]
