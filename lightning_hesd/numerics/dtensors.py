"""DTensors, of which every rank has a shard; recognized without importing their module."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def is_dtensor(tensor: object) -> bool:
    """Whether an object is a DTensor; none exists before their module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, in the same memory; other tensors are returned unchanged."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # with gradients it would be a view with a graph
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return shard
