"""Comparison of the derivatives of a loss with differences: of its gradient and of its values.

Autograd can be wrong without an error: the formula of a second derivative may be false, a custom backward pass need not
be the derivative of its forward pass, and a loss may hide a part of itself (`detach`, NumPy). So the chain from loss to
product is checked once for each loss L with gradient g, along one direction v, half random and half gradient:

    gᵀv  against  (L(w + hv) − L(w − hv)) / 2h,
    Hv   against  (g(w + hv) − g(w − hv)) / 2h,
    vᵀHv against  (L(w + hv) − 2 L(w) + L(w − hv)) / h², where the gradient is too small to be compared;
    vᵀGv against  the second difference of the loss of the outputs along Jv, for the Gauss-Newton matrix G = Jᵀ∂²L J.

The step h descends: truncation falls with it and rounding grows, and a step that is short enough crosses no kink of a
piecewise smooth network. In float64 the steps reach from 1e-4 to 1e-9 of the size of the weights, in float32, on
devices that have no other, from 0.02 to 1e-4: kinks hide more.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.operators.curvature import EVERYTHING, GaussNewtonMatrix
from lightning_hesd.numerics.operators.directional import Comparison, Line, beside_the_weights, output_bend
from lightning_hesd.numerics.operators.memory import FEW

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from lightning_hesd.numerics.derivatives.graphs import GraphFacts
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix
    from lightning_hesd.numerics.operators.directional import Outcome

    InFinest = Callable[[], AbstractContextManager[Callable[[Tensor], Tensor]]]

Verdict = Literal["yes", "no", "unknown"]

STEP_EXPONENTS = (1 / 4, 3 / 8, 1 / 2, 9 / 16)
"""Steps h are these powers of the machine epsilon, relative to the size of the weights."""

CONTINUOUS = 0.1
"""A loss is continuous if the shortest step changes it by at most this share of what the longest one does."""

ROUNDING_UNITS = 30.0
"""Rounding errors of losses and gradients, in machine epsilons."""

SHARES_OF_RANDOM = (1e-6, 1e-4, 0.01)
"""gᵀv must be right to such a share of its size for a random v, so that no part of the gradient is missing.

A wrong gradient is right to the largest share along one direction in a hundred, or along most if the missing part is
small. So a share counts only where kinks or rounding hide whether the gradient is right to the smaller ones.
"""


@dataclass(frozen=True)
class Verification:
    """Result of the comparison of a loss with its derivatives.

    Attributes:
        gradient: Outcome for the gradient, against differences of the loss.
        products: Outcome for products by differentiating twice, against differences of the gradient.
        words: The comparison and its result in words.
    """

    gradient: Outcome
    products: Outcome
    words: str

    def verdict(self, *, exact: bool) -> Verdict:
        """Return whether products are right: `exact` ones, or differences of the gradient."""
        outcomes = {self.gradient, self.products} if exact else {self.gradient}
        if "differs" in outcomes:
            return "no"
        return "yes" if outcomes == {"agrees"} else "unknown"


class WrongDerivativeError(RuntimeError):
    """Autograd's derivatives are not those of the loss; the message states both.

    Attributes:
        loss: The mean loss.
    """

    def __init__(self, words: str, loss: float = math.nan) -> None:
        super().__init__(words)
        self.loss = loss


@dataclass(frozen=True)
class Findings:
    """Result of the comparison in one precision.

    Attributes:
        gradient: Outcome for the gradient.
        products: Outcome for the products.
        directional: The directional derivative gᵀv, and the difference quotient of the loss that is closest to it.
        product_gap: Smallest relative difference between Hv and differences of the gradient.
        is_continuous: Whether shorter steps change the loss less.
        blur: Largest relative difference of numbers that count as equal.
        precision: The precision in words.
        facts: Properties of the graphs.
    """

    gradient: Outcome
    products: Outcome
    directional: tuple[float, float]
    product_gap: float
    is_continuous: bool
    blur: float
    precision: str
    facts: GraphFacts

    @property
    def gradient_gap(self) -> float:
        """Difference of gᵀv and the difference quotient, relative to the larger one."""
        claimed, found = self.directional
        return abs(claimed - found) / max(abs(claimed), abs(found), math.ulp(0.0))


def verify(
    matrix: CurvatureMatrix,
    batch: WeightedBatch,
    space: VectorSpace,
    *,
    exact: bool,
    in_finest: InFinest | None = None,
    may_fail: bool = True,
) -> Verification:
    """Compare the products and the gradient of a batch's loss with differences.

    The first comparisons are in the finest precision of the device (float64, if it has it), where rounding hides almost
    nothing: with a few samples of the batch, then with all of them, then beside the weights, because a kink at the
    weights themselves (zeros in the data under biases of zero) looks like a wrong gradient. If none of them is possible
    or agrees, the last one is in the precision of the module.

    Args:
        matrix: The curvature matrix.
        batch: The batch.
        space: The space of vectors over all parameters.
        exact: Whether products come from differentiating twice; else only the gradient is compared.
        in_finest: Makes a context in which module and batches are in the finest precision of the device, and yields the
            function from a parameter to its copy there; None: there is no such context.
        may_fail: Whether an error makes the outcome "undecided"; ranks that evaluate together must raise it.
    """
    attempts: list[tuple[InFinest, bool, bool]] = [(_as_it_is, False, False)]
    if in_finest is not None:
        attempts = [(in_finest, True, False), (in_finest, False, False), (in_finest, False, True), *attempts]
    found: list[Findings] = []
    problem = ""
    for context, few, beside in attempts:
        if beside and found and not found[-1].is_continuous:
            continue  # beside the weights is another function
        try:
            samples = batch.cut_at([FEW])[0] if few and batch.length() > FEW else batch
            with context() as counterpart:
                parameters = [counterpart(p) for p in matrix.parameters]
                plain = replace(matrix, parameters=parameters, blocks=(EVERYTHING,))
                with beside_the_weights(parameters, space) if beside else contextlib.nullcontext():
                    found.append(_findings(plain, samples, space, exact=exact))
        except Exception as error:
            if not may_fail:
                raise
            problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            continue
        if found[-1].gradient == found[-1].products == "agrees":
            found = [found[-1]] if context is not _as_it_is else found
            break
    if not found:
        return Verification("undecided", "undecided", f"the comparison with differences failed ({problem})")
    fine, coarse = found[-2:][0], found[-1]
    of_gradient = _joint(fine.gradient, coarse.gradient, hidden=fine.gradient_gap <= coarse.blur)
    of_products = _joint(fine.products, coarse.products, hidden=fine.product_gap <= coarse.blur)
    told = coarse if of_gradient == of_products == "agrees" else fine
    return Verification(of_gradient, of_products, _words(told, of_gradient, of_products, exact=exact))


def _as_it_is() -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    return contextlib.nullcontext(lambda parameter: parameter)


def _joint(fine: Outcome, coarse: Outcome, *, hidden: bool) -> Outcome:
    """Join the outcomes in the finest precision and in that of the module.

    Operations may compute in a coarser precision than their dtypes show: then derivatives differ in the finest
    precision, and agree in that of the module. That agreement means nothing if the difference is too small to show
    there (`hidden`).
    """
    if fine == "differs":
        return "undecided" if coarse == "agrees" and not hidden else "differs"
    return coarse if fine == "undecided" else fine


def _findings(matrix: CurvatureMatrix, batch: WeightedBatch, space: VectorSpace, *, exact: bool) -> Findings:
    """Compare in the present precision, along one line through the weights."""
    line = Line(matrix, batch, space)
    product = line.flat(matrix.make_matvec(batch, retain=False)[1](line.vector())) if exact else None
    facts = matrix.facts
    if not exact:
        facts.add([matrix.loss(batch)])

    epsilon = max(facts.epsilon, *(torch.finfo(p.dtype).eps for p in matrix.parameters))
    tolerance = 2 * epsilon ** (1 / 3)
    length, claimed = line.length, line.slope
    claimed_bend = None if product is None else line.along(product)
    is_ggn = isinstance(matrix, GaussNewtonMatrix)
    curves = Comparison(claimed_bend, tolerance, abs) if is_ggn else Comparison(product, tolerance, line.norm)
    of_random = length / math.sqrt(space.dimension)
    directional = [Comparison(claimed, share, abs, scale=of_random) for share in SHARES_OF_RANDOM]
    directional.append(Comparison(claimed, tolerance, abs))
    bends: Comparison | None = None
    quotients: list[float] = []
    changes: list[float] = []
    of_products: Outcome = "agrees"
    size = max(line.differences.size, 1.0)
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
        for comparison in directional:
            comparison.add(quotients[-1], rounding * abs(line.loss))
        bends = bends or Comparison(
            line.along(curve) if claimed_bend is None or is_ggn else claimed_bend, tolerance, abs
        )
        bends.add((ahead - 2 * line.loss + behind) / step**2, 4 * rounding * abs(line.loss) / step)
        finest = next((comparison.outcome for comparison in directional if not comparison.is_hidden), "undecided")
        if finest == of_products == "agrees":
            break
    told = (comparison.outcome for comparison in directional if comparison.outcome != "undecided")
    of_gradient: Outcome = next(told, "undecided")
    if bends is not None and not facts.is_kinked and all(comparison.is_hidden for comparison in directional):
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
        changes[-1] <= max(CONTINUOUS * changes[0], ROUNDING_UNITS * epsilon * abs(line.loss)) or len(changes) == 1,
        2 * tolerance,  # the tolerance itself, and as much rounding
        "float64" if is_fine else precision,
        facts,
    )


def _words(found: Findings, of_gradient: Outcome, of_products: Outcome, *, exact: bool) -> str:
    custom = f" ({', '.join(sorted(found.facts.custom))})" if found.facts.custom else ""
    if of_gradient == "differs":
        return (
            "the gradient that autograd computes is not the derivative of the loss: its slope in a test direction is "
            "{:.6g}, that of the loss {:.6g} ".format(*found.directional)
            + f"({found.precision}). The loss "
            "hides a part of itself (`detach`, `no_grad`, `.item()`, NumPy), or the backward pass of a custom "
            f"function{custom}, of a hook or of an embedding with `scale_grad_by_freq` is not the derivative of the "
            "forward pass (straight-through estimators, gradient reversal)"
        )
    if of_products == "differs":
        culprit = f"a custom function{custom}" if custom else "an operation of PyTorch"
        return (
            f"products by differentiating twice differ from differences of the gradient by {found.product_gap:.2g} of "
            f"their size ({found.precision}): {culprit} has a wrong second derivative"
        )
    if "undecided" in {of_gradient, of_products}:
        what = "the gradient is" if of_gradient == "undecided" else "the products are"
        return f"kinks or rounding ({found.precision}) hide whether {what} right"
    compared = f"products agree with differences of the gradient to {found.product_gap:.1g}, and " if exact else ""
    return f"{compared}the gradient agrees with differences of the loss ({found.precision})"
