"""Whether Hessian-vector products are those of the loss: compared with differences of its gradient and of its values.

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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_hesd.numerics.devices import finest_dtype, to_device
from lightning_hesd.numerics.krylov.vectors import in_shape
from lightning_hesd.numerics.operators.curvature import EVERYTHING, GaussNewtonMatrix
from lightning_hesd.numerics.operators.directional import Line, OutputLine
from lightning_hesd.numerics.operators.finite_differences import FiniteDifferences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from lightning_hesd.numerics.derivatives.graphs import GraphFacts
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import Matrix

    InFinest = Callable[[], AbstractContextManager[Callable[[Tensor], Tensor]]]

Verdict = Literal["yes", "no", "unknown"]
Outcome = Literal["agrees", "differs", "cannot be told"]
OUTCOMES: tuple[Outcome, ...] = ("differs", "agrees", "cannot be told")
"""In the order in which one outweighs the others: the first that a process found holds for all processes."""

STEP_EXPONENTS = (1 / 4, 3 / 8, 1 / 2, 9 / 16)
"""Steps h are these powers of the machine epsilon, relative to the size of the weights."""

ROUNDING_UNITS = 30.0
"""Rounding of losses and gradients that is allowed for, in machine epsilons."""

SETTLED = 0.1
"""Two estimates that lie closer together than this share of their distance from a claim speak against it."""

FEW = 4
"""Samples with which the comparison begins."""

MOVE = 1e-3
"""How far beside the weights the loss is looked at where they may lie at a kink, relative to their size."""

SLOPE_SHARE = 0.01
"""gᵀv must agree to this share of what it is for a random v: no part of the gradient may be missing."""


@dataclass(frozen=True)
class Verification:
    """What the comparison of a loss with its derivatives has shown.

    Attributes:
        gradient: Whether the gradient is that of the loss.
        products: Whether products by differentiating twice are those of the gradient.
        words: What was compared and found, in words.
    """

    gradient: Outcome
    products: Outcome
    words: str

    def verdict(self, *, exact: bool) -> Verdict:
        """Return whether products can be relied on.

        Args:
            exact: Whether they come from differentiating twice, not from differences of the gradient.
        """
        outcomes = {self.gradient, self.products} if exact else {self.gradient}
        if "differs" in outcomes:
            return "no"
        return "yes" if outcomes == {"agrees"} else "unknown"

    def codes(self) -> list[Tensor]:
        """Return the outcomes for gradient and products as one-hot vectors, which processes can add up."""
        return [torch.tensor([float(own == o) for o in OUTCOMES]) for own in (self.gradient, self.products)]


def joint_outcome(counts: Sequence[float]) -> Outcome:
    """Return the outcome that holds for all processes, given how many found each of `OUTCOMES`."""
    return next(outcome for outcome, count in zip(OUTCOMES, counts, strict=True) if count)


SHARDED_PART = Verification(
    "cannot be told", "cannot be told", "where parameters are sharded, parts of the Hessian are not compared"
)
"""The outputs of the network differ from process to process."""


class WrongDerivativeError(RuntimeError):
    """Autograd's derivatives are not those of the loss; the message says what was found.

    Attributes:
        loss: The mean loss.
    """

    def __init__(self, words: str, loss: float = math.nan) -> None:
        super().__init__(words)
        self.loss = loss


class Comparison:
    """A claim beside estimates of it at descending steps.

    Attributes:
        gap: Smallest distance of an estimate from the claim so far, relative to their size.
    """

    def __init__(self, claim: Any, tolerance: float, size: Callable[[Any], float], scale: float | None = None) -> None:
        """Take a claim.

        Args:
            claim: A number or a vector.
            tolerance: Up to which relative distance they agree.
            size: Absolute value of a number, or norm of a vector.
            scale: What distances are relative to; default: the size of the claim or of the estimate.
        """
        self.gap = math.inf
        self._claim, self._tolerance, self._size, self._scale = claim, tolerance, size, scale
        self._estimates: list[tuple[float, float]] = []  # gap and change, where rounding lets one tell
        self._agrees = False
        self._before: Any = None

    def add(self, value: Any, rounding: float) -> None:
        """Add the estimate at the next step, with its absolute rounding."""
        scale = max(self._size(self._claim), self._size(value)) if self._scale is None else self._scale
        before, self._before = self._before, value
        if not math.isfinite(scale) or rounding > self._tolerance * scale:
            return
        gap = self._size(value - self._claim)
        self._agrees |= gap <= self._tolerance * scale + rounding
        self._estimates.append((gap, math.inf if before is None else self._size(value - before)))
        self.gap = min(self.gap, gap / scale if scale else 0.0)

    @property
    def is_hidden(self) -> bool:
        """Whether rounding hides the answer at every step."""
        return not self._estimates

    @property
    def outcome(self) -> Outcome:
        """What the estimates say, as far as rounding lets them.

        The claim agrees if one of them comes within the tolerance. It differs if the last two lie close together and
        far from it. Otherwise the answer is hidden, by kinks or by rounding.
        """
        if self._agrees:
            return "agrees"
        if len(self._estimates) > 1 and self._estimates[-1][1] <= SETTLED * self._estimates[-1][0]:
            return "differs"
        return "cannot be told"


@dataclass(frozen=True)
class Findings:
    """What one precision shows.

    Attributes:
        gradient: Outcome for the gradient.
        products: Outcome for the products.
        slopes: gᵀv, and the difference of the loss that comes closest to it.
        product_gap: Smallest relative difference between Hv and differences of the gradient.
        is_continuous: Whether the loss changes less, the shorter the step.
        blur: Up to which relative difference numbers may seem to agree.
        precision: The floating-point type, in words.
        facts: What is known of the graphs.
    """

    gradient: Outcome
    products: Outcome
    slopes: tuple[float, float]
    product_gap: float
    is_continuous: bool
    blur: float
    precision: str
    facts: GraphFacts

    @property
    def slope_gap(self) -> float:
        """Difference of the slopes, relative to the larger one."""
        claimed, found = self.slopes
        return abs(claimed - found) / max(abs(claimed), abs(found), math.ulp(0.0))


def verify(
    matrix: Matrix,
    batch: WeightedBatch,
    space: VectorSpace,
    *,
    exact: bool,
    in_finest: InFinest | None = None,
    may_fail: bool = True,
) -> Verification:
    """Compare the products and the gradient of a batch's loss with differences.

    First in the finest precision of the device, float64 unless it has none, which tells almost everything apart: with a
    few samples of the batch, then with all of them, then beside the weights, as a kink at the weights themselves (zeros
    in the data under biases of zero) looks like a wrong gradient. If that is not to be had, or does not agree, in the
    precision of the module.

    Args:
        matrix: The matrix.
        batch: The batch.
        space: The space of vectors over all parameters.
        exact: Whether products come from differentiating twice; else only the gradient is compared.
        in_finest: Makes a context in which module and batches are in the finest precision of the device, and gives the
            function from a parameter to its counterpart there; None: there is none.
        may_fail: Whether an error makes the outcome "cannot be told"; processes that work together must raise it.
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
            samples = batch.split(math.ceil(batch.num_samples / FEW))[0] if few else batch
            with context() as counterpart:
                parameters = [counterpart(p) for p in matrix.parameters]
                plain = replace(matrix, parameters=parameters, blocks=(EVERYTHING,))
                with _beside(parameters, space) if beside else contextlib.nullcontext():
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
        return Verification("cannot be told", "cannot be told", f"the comparison with differences failed ({problem})")
    fine, coarse = found[-2:][0], found[-1]
    of_gradient = _joint(fine.gradient, coarse.gradient, hidden=fine.slope_gap <= coarse.blur)
    of_products = _joint(fine.products, coarse.products, hidden=fine.product_gap <= coarse.blur)
    told = coarse if of_gradient == of_products == "agrees" else fine
    return Verification(of_gradient, of_products, _words(told, of_gradient, of_products, exact=exact))


def _as_it_is() -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    return contextlib.nullcontext(lambda parameter: parameter)


@contextlib.contextmanager
def _beside(parameters: Sequence[Tensor], space: VectorSpace) -> Iterator[None]:
    """Move parameters at random meanwhile."""
    differences = FiniteDifferences(parameters, space)
    noise = space.gaussian(torch.Generator().manual_seed(2))
    vector = to_device(noise / space.norm(noise), parameters[0].device)
    with differences.displaced(in_shape(vector, parameters), MOVE * max(differences.size, 1.0)):
        yield


def _joint(fine: Outcome, coarse: Outcome, *, hidden: bool) -> Outcome:
    """Join the outcomes in the finest precision and in that of the module.

    Operations may compute in a coarser precision than their types show: then the finest differs, and only then does the
    module's own precision agree. It says nothing where the difference is one that it cannot see.

    Args:
        fine: Outcome in the finest precision.
        coarse: Outcome in the precision of the module.
        hidden: Whether the difference in the finest precision is smaller than what counts as agreement in the other.
    """
    if fine == "differs":
        return "cannot be told" if coarse == "agrees" and not hidden else "differs"
    return coarse if fine == "cannot be told" else fine


def _findings(matrix: Matrix, batch: WeightedBatch, space: VectorSpace, *, exact: bool) -> Findings:
    """Compare in the present precision."""
    line = Line(matrix, batch, space)
    product = line.flat(matrix.product(batch, retain=False)[1](line.vector())) if exact else None
    facts = matrix.facts
    if not exact:
        facts.add([matrix.loss(batch)])

    epsilon = max(facts.epsilon, *(torch.finfo(p.dtype).eps for p in matrix.parameters))
    tolerance = 2 * epsilon ** (1 / 3)
    length, claimed = line.norm(line.gradient), line.along(line.gradient)
    claimed_bend = None if product is None else line.along(product)
    outputs = OutputLine(matrix, batch, line) if isinstance(matrix, GaussNewtonMatrix) else None
    curves = Comparison(product, tolerance, line.norm) if outputs is None else Comparison(claimed_bend, tolerance, abs)
    slopes = [
        Comparison(claimed, SLOPE_SHARE, abs, scale=length / math.sqrt(space.dimension)),
        Comparison(claimed, tolerance, abs),
    ]
    bends: Comparison | None = None
    rises: list[float] = []
    changes: list[float] = []
    of_products: Outcome = "agrees"
    of_gradient: Outcome = "cannot be told"
    for exponent in STEP_EXPONENTS:
        step = max(line.differences.size, 1.0) * epsilon**exponent
        (ahead, up), (behind, down) = line.at(step), line.at(-step)
        rounding = ROUNDING_UNITS * epsilon / step
        curve = (up - down) / (2 * step)
        if outputs is not None:
            far = max(line.differences.size, 1.0) * epsilon ** STEP_EXPONENTS[0]
            curves.add(outputs.bend(step, far), 4 * ROUNDING_UNITS * epsilon * abs(line.loss) / far**2)
        elif product is not None:
            curves.add(curve, rounding * length)
        of_products = "agrees" if product is None else curves.outcome
        rises.append((ahead - behind) / (2 * step))
        changes.append(max(abs(ahead - line.loss), abs(behind - line.loss)))
        for comparison in slopes:
            comparison.add(rises[-1], rounding * abs(line.loss))
        is_claimed = claimed_bend is not None and outputs is None
        bends = bends or Comparison(claimed_bend if is_claimed else line.along(curve), tolerance, abs)
        bends.add((ahead - 2 * line.loss + behind) / step**2, 4 * rounding * abs(line.loss) / step)
        of_gradient = _first_told(slopes)
        if of_gradient == of_products == "agrees":
            break
    if bends is not None and not facts.is_kinked and all(comparison.is_hidden for comparison in slopes):
        of_gradient = bends.outcome
    is_fine = epsilon <= torch.finfo(torch.float64).eps
    if of_products == "differs" and facts.is_kinked and not is_fine:
        of_products = "cannot be told"  # no step is short enough: the many kinks on its way look like a curvature
    return Findings(
        of_gradient,
        of_products,
        (claimed, min(rises, key=lambda rise: abs(rise - claimed))),
        curves.gap,
        changes[-1] <= max(SETTLED * changes[0], ROUNDING_UNITS * epsilon * abs(line.loss)) or len(changes) == 1,
        2 * tolerance,  # the tolerance itself, and as much rounding
        "float64" if is_fine else f"a precision of {epsilon:.1g}{_excuse(epsilon, matrix.parameters[0].device)}",
        facts,
    )


def _excuse(epsilon: float, device: torch.device) -> str:
    """Say that there is no finer precision, if so."""
    return f", the finest on {device.type}" if epsilon <= torch.finfo(finest_dtype(device)).eps else ""


def _first_told(comparisons: Sequence[Comparison]) -> Outcome:
    outcomes = (comparison.outcome for comparison in comparisons)
    return next((outcome for outcome in outcomes if outcome != "cannot be told"), "cannot be told")


def _words(found: Findings, of_gradient: Outcome, of_products: Outcome, *, exact: bool) -> str:
    custom = f" ({', '.join(sorted(found.facts.custom))})" if found.facts.custom else ""
    if of_gradient == "differs":
        return (
            "the gradient that autograd computes is not the derivative of the loss: its slope in a test direction is "
            "{:.6g}, that of the loss {:.6g} ".format(*found.slopes)
            + f"({found.precision}). The loss hides a part of "
            f"itself (`detach`, `no_grad`, `.item()`, NumPy), or the backward pass of a custom function{custom}, of a "
            "hook or of an embedding with `scale_grad_by_freq` is not the derivative of the forward pass "
            "(straight-through estimators, gradient reversal)"
        )
    if of_products == "differs":
        culprit = f"a custom function{custom}" if custom else "an operation of PyTorch"
        return (
            f"products by differentiating twice differ from differences of the gradient by {found.product_gap:.2g} of "
            f"their size ({found.precision}): {culprit} has a wrong second derivative"
        )
    if "cannot be told" in {of_gradient, of_products}:
        what = "the gradient is" if of_gradient == "cannot be told" else "the products are"
        return f"kinks or rounding ({found.precision}) hide whether {what} right"
    compared = f"products agree with differences of the gradient to {found.product_gap:.1g}, and " if exact else ""
    return f"{compared}the gradient agrees with differences of the loss ({found.precision})"
