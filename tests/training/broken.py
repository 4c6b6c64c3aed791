"""Losses and data whose analysis fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases import OnceDifferentiable
from tests.training.modules import Digits, plain_loss


def once_differentiable_loss(module: Any, batch: Any) -> Tensor:
    return plain_loss(module, [OnceDifferentiable.apply(module.net[0].weight).sum() * 1e-3 + batch[0], batch[1]])


def nan_curvature(module: Any, batch: Any) -> Tensor:
    """A norm at zero: its value is fine, its second derivative is not."""
    weight = module.net[0].weight
    return plain_loss(module, batch) + torch.linalg.vector_norm(weight - weight.detach())


def nan_loss(module: Any, batch: Any) -> Tensor:
    return plain_loss(module, batch) * float("nan")


def out_of_luck(module: Any, batch: Any) -> Tensor:
    msg = "no luck"
    raise OSError(msg)


class Broken(Digits):
    def __getitem__(self, position: int) -> Any:
        msg = "unreadable file"
        raise OSError(msg)
