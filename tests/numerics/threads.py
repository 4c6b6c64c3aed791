"""Threads that stand for processes."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Sum:
    """Sums tensors over threads that stand for processes."""

    def __init__(self, members: int) -> None:
        self.barrier = threading.Barrier(members, timeout=60)
        self.given: dict[int, Tensor] = {}

    def __call__(self, rank: int, tensor: Tensor) -> Tensor:
        self.given[rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack([self.given[member] for member in sorted(self.given)]).sum(dim=0)
        self.barrier.wait()  # nobody gives anew before everybody has read
        return total
