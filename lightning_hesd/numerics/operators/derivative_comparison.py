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

SHARE = SHARES_OF_RANDOM[1]
"""The same where only the gradient is compared."""


@dataclass(frozen=True)
class ComparedDerivatives:
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


class SlopeComparison:
    """A directional derivative gᵀv, and difference quotients of the loss at descending steps.

    It is compared to each of the `SHARES_OF_RANDOM`, and to the tolerance of its own size.
    """

    def __init__(self, slope: float, of_random: float, tolerance: float) -> None:
        """Take gᵀv, the size that it has for a random v, and the tolerance."""
        self._slope = slope
        self._by_share = [Comparison(slope, share, abs, scale=of_random) for share in SHARES_OF_RANDOM]
        self._to_tolerance = Comparison(slope, tolerance, abs)
        self._quotients: list[float] = []

    def add(self, quotient: float, rounding: float) -> None:
        """Add the quotient at the next step, with its absolute rounding error."""
        self._quotients.append(quotient)
        for comparison in (*self._by_share, self._to_tolerance):
            comparison.add(quotient, rounding)

    @property
    def closest(self) -> float:
        """The quotient that is closest to the derivative."""
        return min(self._quotients, key=lambda quotient: abs(quotient - self._slope))

    @property
    def is_hidden(self) -> bool:
        """Whether rounding hides the answer to every share, and to the tolerance."""
        return all(comparison.is_hidden for comparison in (*self._by_share, self._to_tolerance))

    @property
    def agrees_to_finest(self) -> bool:
        """Whether they agree to the smallest share that rounding does not hide."""
        return next((c.outcome == "agrees" for c in self._by_share if not c.is_hidden), False)

    @property
    def outcome(self) -> Outcome:
        """Outcome to the smallest share that has one."""
        known = (comparison.outcome for comparison in self._by_share if comparison.outcome != "undecided")
        return next(known, "differs" if self._to_tolerance.outcome == "differs" else "undecided")


def compare_derivatives(
    matrix: CurvatureMatrix, batch: WeightedBatch, space: VectorSpace, *, exact: bool
) -> ComparedDerivatives:
    """Compare in the present precision, along one line through the weights."""
    line = Line(matrix, batch, space)
    another, product = _evaluated_again(matrix, batch, line, exact=exact)
    facts = matrix.facts

    epsilon = matrix.epsilon
    tolerance = 2 * epsilon ** (1 / 3)
    loss_size = abs(line.loss)
    bend = None if product is None else line.along(product)  # vᵀHv, or vᵀGv
    is_ggn = isinstance(matrix, GaussNewtonMatrix)
    products = Comparison(bend, tolerance, abs) if is_ggn else Comparison(product, tolerance, line.norm)
    slope = SlopeComparison(line.slope, line.length / math.sqrt(space.dimension), tolerance)
    bends: Comparison | None = None
    changes: list[float] = []
    of_products: Outcome = "agrees"
    size = _size(line)
    longest, *_ = steps = [size * epsilon**exponent for exponent in STEP_EXPONENTS]
    for step in steps:
        ahead, difference = line.at(step)
        behind, gradient_behind = line.at(-step)
        difference.sub_(gradient_behind).div_(2 * step)
        del gradient_behind  # before the next two gradients
        rounding = ROUNDING_UNITS * epsilon / step
        if isinstance(matrix, GaussNewtonMatrix):
            second = output_bend(matrix, batch, line, step, longest)
            products.add(second, 4 * ROUNDING_UNITS * epsilon * loss_size / longest**2)
        elif product is not None:
            products.add(difference, rounding * line.length)
        of_products = "agrees" if product is None else products.outcome
        slope.add((ahead - behind) / (2 * step), rounding * loss_size)
        changes.append(max(abs(ahead - line.loss), abs(behind - line.loss)))
        bends = bends or Comparison(line.along(difference) if bend is None or is_ggn else bend, tolerance, abs)
        bends.add((ahead - 2 * line.loss + behind) / step**2, 4 * rounding * loss_size / step)
        if slope.agrees_to_finest and of_products == "agrees":
            break
    of_gradient = slope.outcome
    if bends is not None and slope.is_hidden and not facts.is_kinked:
        of_gradient = bends.outcome
    is_fine, device = epsilon <= torch.finfo(torch.float64).eps, matrix.parameters[0].device
    is_finest = epsilon <= torch.finfo(finest_dtype(device)).eps
    precision = f"a precision of {epsilon:.1g}" + (f", the finest on {device.type}" if is_finest else "")
    if of_products == "differs" and facts.is_kinked and not is_fine:
        of_products = "undecided"  # no step is short enough: the many kinks on its way look like a curvature
    return ComparedDerivatives(
        of_gradient,
        of_products,
        (line.slope, slope.closest),
        products.gap,
        0.0 if product is None else line.norm(product),
        changes[-1] <= max(CONTINUOUS * changes[0], ROUNDING_UNITS * epsilon * loss_size) or len(changes) == 1,
        2 * tolerance,  # the tolerance itself, and as much rounding
        is_finest,
        "float64" if is_fine else precision,
        facts,
        (line.loss, another),
        # The loss may be a small difference of large terms, whose sums an accelerator rounds as it likes.
        abs(line.loss - another) <= math.sqrt(epsilon) * max(loss_size, line.length * size)
        or not math.isfinite(line.loss + another)  # of a few samples the loss may be undefined
        or isinstance(matrix, OutputMatrix),
    )


def slope_agrees(matrix: CurvatureMatrix, batch: WeightedBatch, space: VectorSpace) -> bool | None:
    """Return whether the gradient agrees with differences of the loss along one line; False may mean undecided.

    That takes about a quarter of the time of `compare_derivatives`, because one step is mostly enough: it is short, so
    that few kinks lie on its way. None where the loss is not in the finest precision.
    """
    line = Line(matrix, batch, space)
    epsilon = matrix.epsilon
    if epsilon > torch.finfo(finest_dtype(matrix.parameters[0].device)).eps:
        return None
    comparison = Comparison(line.slope, SHARE, abs, scale=line.length / math.sqrt(space.dimension))
    size = _size(line)
    for exponent in sorted(STEP_EXPONENTS, key=lambda exponent: abs(exponent - 1 / 2)):
        step = size * epsilon**exponent
        quotient = (line.loss_at(step) - line.loss_at(-step)) / (2 * step)
        comparison.add(quotient, ROUNDING_UNITS * epsilon / step * abs(line.loss))
        if comparison.outcome == "agrees":
            return True
    return False


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
