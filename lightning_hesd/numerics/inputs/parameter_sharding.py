"""How the parameters lie in the processes: each holds all of them, unless `sharding` says otherwise."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lightning_hesd.numerics.krylov.vectors import VectorSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from lightning_hesd.numerics.inputs.batches import WeightedBatch

    AllReduce = Callable[[Tensor], Tensor]
    """Sums a tensor over all processes."""


class Layout:
    """Every process holds all parameters, and works on its own batches by itself.

    Attributes:
        all_reduce: Sums a tensor over the processes that work on one batch together; None: they do not.
    """

    all_reduce: AllReduce | None = None

    def check(self, *, groups: bool, scaled: bool, weighed: bool) -> None:
        """Raise a ValueError if there cannot be, with this layout, what an analysis needs.

        Args:
            groups: Whether it needs the products of groups of samples, each by itself.
            scaled: Whether it needs them in other coordinates.
            weighed: Whether it needs the losses of parts of batches to tell how the batches are weighed.
        """

    def parts(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what this process holds of each parameter to analyse: what to differentiate by."""
        return parameters

    def opened(self, module: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return the context in which losses depend on the parts."""
        return contextlib.nullcontext()

    def space(self, parts: Sequence[Tensor]) -> VectorSpace:
        """Return the space of vectors over some of the parameters, given what this process holds of them."""
        return VectorSpace(sum(p.numel() for p in parts))

    def joint(self, batches: Sequence[WeightedBatch]) -> Sequence[WeightedBatch]:
        """Return the batches as they are worked on."""
        return batches

    def evaluation(self) -> AbstractContextManager[None]:
        """Return the context in which the user's functions are called."""
        return contextlib.nullcontext()

    def loss(self, own: Tensor, batch: WeightedBatch) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch, given what the user's function found, a scalar."""
        return own

    def largest(self, value: float) -> float:
        """Return the largest of the values in the processes that work on one batch together."""
        return value
