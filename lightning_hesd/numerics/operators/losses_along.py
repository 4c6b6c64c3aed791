"""The mean loss at weights that are moved along a vector."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_hesd.numerics.operators.finite_differences import FiniteDifferences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock


def losses_along(block: DiagonalBlock, direction: Tensor, distances: Sequence[float]) -> list[float]:
    """Return the mean loss over the batches of all ranks at the weights plus each multiple of a direction.

    Each takes one evaluation of all batches. The weights are restored bit by bit. All ranks must take part.

    Args:
        block: The operator whose vectors the direction is one of.
        direction: Shape (n,).
        distances: Multiples of the direction, the same on all ranks.

    Returns:
        The losses; NaN or infinity where the loss is, and NaN where the loss function raises a ValueError or an
        ArithmeticError, as functions do that check their inputs.
    """
    risk, vector = block.risk, block.expand(direction)
    line = FiniteDifferences(risk.matrix.parameters, risk.space)

    def own_sum(distance: float) -> float:  # of the weighted losses of this rank's batches
        with line.displaced(vector, distance):
            try:
                return math.fsum(batch.weight * risk.matrix.loss(batch).item() for batch in risk.batches)
            except (ArithmeticError, ValueError):
                if risk.sharding.is_sharded:  # the other ranks are within the same evaluation
                    raise
                return math.nan

    own = risk.collectives.run_together(lambda: [own_sum(distance) for distance in distances])
    return [total / risk.weight for total in risk.collectives.sum_values(own)]
