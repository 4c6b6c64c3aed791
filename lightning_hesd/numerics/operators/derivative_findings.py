"""Comparison of a loss's derivatives with differences in one precision, along one line through the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.operators.curvature import GaussNewtonMatrix, OutputMatrix
from lightning_hesd.numerics.operators.directional import Comparison, Line, output_bend

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_hesd.numerics.derivatives.graphs import GraphFacts
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix
    from lightning_hesd.numerics.operators.directional import Outcome

STEP_EXPONENTS = (1 / 4, 3 / 8, 1 / 2, 9 / 16)
"""Steps h are these powers of the machine epsilon, relative to the size of the weights."""

CONTINUOUS = 0.1
"""A loss is continuous if the shortest step changes it by at most this share of what the longest one does."""

ROUNDING_UNITS = 30.0
"""Rounding errors of losses and gradients, in machine epsilons."""

CHANGE = 1e3
"""Largest change of the loss, relative to its value and by its slope, over the size of the weights."""

SHARES_OF_RANDOM = (1e-6, 1e-4, 0.01)
"""gᵀv must be right to such a share of its size for a random v, so that no part of the gradient is missing.

A wrong gradient is right to the largest share along one direction in a hundred, or along most if the missing part is
small. So a share counts only where kinks or rounding hide whether the gradient is right to the smaller ones.
"""


@dataclass(frozen=True)
class Findings:
    """Result of the comparison in one precision.

    Attributes:
        gradient: Outcome for the gradient.
        products: Outcome for the products.
        directional: The directional derivative gᵀv, and the difference quotient of the loss that is closest to it.
        product_gap: Smallest relative difference between Hv and differences of the gradient.
        product_norm: Norm of Hv; 0 where products are not exact.
        is_continuous: Whether shorter steps change the loss less.
        blur: Largest relative difference of numbers that count as equal.
        is_finest: Whether the precision is the finest of the device.
        precision: The precision in words.
        facts: Properties of the graphs.
        losses: The loss at two evaluations at the same weights.
        is_repeatable: Whether these two are equal, up to rounding (that of sums in another order, on accelerators).
    """

    gradient: Outcome
    products: Outcome
    directional: tuple[float, float]
    product_gap: float
    product_norm: float
    is_continuous: bool
    blur: float
    is_finest: bool
    precision: str
    facts: GraphFacts
    losses: tuple[float, float]
    is_repeatable: bool

    @property
    def agrees(self) -> bool:
        """Whether gradient and products agree with differences."""
        return self.gradient == self.products == "agrees"

    @property
    def gradient_gap(self) -> float:
        """Difference of gᵀv and the difference quotient, relative to the larger one."""
        claimed, found = self.directional
        return abs(claimed - found) / max(abs(claimed), abs(found), math.ulp(0.0))


def findings(matrix: CurvatureMatrix, batch: WeightedBatch, space: VectorSpace, *, exact: bool) -> Findings:
    """Compare in the present precision, along one line through the weights."""
    line = Line(matrix, batch, space)
    another, product = _evaluated_again(matrix, batch, line, exact=exact)
    facts = matrix.facts

    epsilon = max(facts.epsilon, *(torch.finfo(p.dtype).eps for p in matrix.parameters))
    tolerance = 2 * epsilon ** (1 / 3)
    length, claimed = line.length, line.slope
    claimed_bend = None if product is None else line.along(product)
    is_ggn = isinstance(matrix, GaussNewtonMatrix)
    curves = Comparison(claimed_bend, tolerance, abs) if is_ggn else Comparison(product, tolerance, line.norm)
    of_random = length / math.sqrt(space.dimension)
    directional = [Comparison(claimed, share, abs, scale=of_random) for share in SHARES_OF_RANDOM]
    along = Comparison(claimed, tolerance, abs)
    bends: Comparison | None = None
    quotients: list[float] = []
    changes: list[float] = []
    of_products: Outcome = "agrees"
    size = _size(line)
    longest, *_ = steps = [size * epsilon**exponent for exponent in STEP_EXPONENTS]
    for step in steps:
        ahead, curve = line.at(step)
        behind, down = line.at(-step)
        curve.sub_(down).div_(2 * step)
        del down  # before the next two gradients
        rounding = ROUNDING_UNITS * epsilon / step
        if isinstance(matrix, GaussNewtonMatrix):
            bend = output_bend(matrix, batch, line, step, longest)
            curves.add(bend, 4 * ROUNDING_UNITS * epsilon * abs(line.loss) / longest**2)
        elif product is not None:
            curves.add(curve, rounding * length)
        of_products = "agrees" if product is None else curves.outcome
        quotients.append((ahead - behind) / (2 * step))
        changes.append(max(abs(ahead - line.loss), abs(behind - line.loss)))
        for comparison in (*directional, along):
            comparison.add(quotients[-1], rounding * abs(line.loss))
        bends = bends or Comparison(
            line.along(curve) if claimed_bend is None or is_ggn else claimed_bend, tolerance, abs
        )
        bends.add((ahead - 2 * line.loss + behind) / step**2, 4 * rounding * abs(line.loss) / step)
        finest = next((comparison.outcome for comparison in directional if not comparison.is_hidden), "undecided")
        if finest == of_products == "agrees":
            break
    told = (comparison.outcome for comparison in directional if comparison.outcome != "undecided")
    of_gradient: Outcome = next(told, "differs" if along.outcome == "differs" else "undecided")
    if bends is not None and not facts.is_kinked and all(comparison.is_hidden for comparison in (*directional, along)):
        of_gradient = bends.outcome
    is_fine, device = epsilon <= torch.finfo(torch.float64).eps, matrix.parameters[0].device
    is_finest = epsilon <= torch.finfo(finest_dtype(device)).eps
    precision = f"a precision of {epsilon:.1g}" + (f", the finest on {device.type}" if is_finest else "")
    if of_products == "differs" and facts.is_kinked and not is_fine:
        of_products = "undecided"  # no step is short enough: the many kinks on its way look like a curvature
    return Findings(
        of_gradient,
        of_products,
        (claimed, min(quotients, key=lambda quotient: abs(quotient - claimed))),
        curves.gap,
        0.0 if product is None else line.norm(product),
        changes[-1] <= max(CONTINUOUS * changes[0], ROUNDING_UNITS * epsilon * abs(line.loss)) or len(changes) == 1,
        2 * tolerance,  # the tolerance itself, and as much rounding
        is_finest,
        "float64" if is_fine else precision,
        facts,
        (line.loss, another),
        math.isclose(line.loss, another, rel_tol=math.sqrt(epsilon)) or isinstance(matrix, OutputMatrix),
    )


def _size(line: Line) -> float:
    """Return the size of the weights, or less where it would change the loss by many times its value.

    A single weight may be far larger than others, and all may be tiny (in units of physics, for example).
    """
    size, norm = max(line.differences.size, 1.0), line.differences.size
    reach = CHANGE * abs(line.loss / line.slope) if line.slope else math.inf
    return size if math.isnan(reach) else max(min(size, reach), min(norm, 1.0), math.ulp(0.0))


def _evaluated_again(
    matrix: CurvatureMatrix, batch: WeightedBatch, line: Line, *, exact: bool
) -> tuple[float, Tensor | None]:
    """Return the loss of a batch, and its product with the direction of a line, None where products are not exact."""
    if not exact:
        return matrix.loss(batch).item(), None
    loss, matvec = matrix.make_matvec(batch, retain=False)
    return loss.item(), line.flat(matvec(line.vector()))
