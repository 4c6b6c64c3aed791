"""Tensors of which every process holds a part (DTensor), told apart without loading what they need."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def is_distributed(tensor: object) -> bool:
    """Whether this is a DTensor: there can be none before somebody else has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory: of an ordinary one, all of it."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():  # with gradients it would be a view with a graph
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part
