"""Losses and data whose analysis fails."""

from collections.abc import Callable
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


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises an error, whatever it is called with."""

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


out_of_luck, out_of_memory = raising(OSError("no luck")), raising(MemoryError("no memory here"))


class Broken(Digits):
    __getitem__ = raising(OSError("unreadable file"))
