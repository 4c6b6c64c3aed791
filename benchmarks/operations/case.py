"""A layer or a function of PyTorch as a small problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """An operation with arguments.

    Attributes:
        name: Name in PyTorch.
        make: Returns the operation, a layer or a function.
        shapes: Shapes of its arguments.
        bounds: Range of uniformly distributed elements of the arguments; None: they are normal.
        mode: Mode of the layer.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    shapes: tuple[Shape, ...]
    bounds: tuple[float, float] | None = None
    mode: Literal["train", "eval"] = "train"

    def arguments(self) -> list[Tensor]:
        """Return the arguments, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        if self.bounds is None:
            return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        low, high = self.bounds
        return [low + (high - low) * torch.rand(s, generator=generator, dtype=torch.float64) for s in self.shapes]


def indices(*shape: int, high: int = 3) -> Tensor:
    """Return integers from 0 to below `high`, the same at every call."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))
