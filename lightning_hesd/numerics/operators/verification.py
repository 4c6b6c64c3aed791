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
devices that have no other, from 0.02 to 1e-4: kinks hide more. So a loss that casts to float32 itself is compared
without its casts, if it can be evaluated so.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from lightning_hesd.numerics.krylov.vectors import in_shape
from lightning_hesd.numerics.operators.curvature import EVERYTHING, gradient
from lightning_hesd.numerics.operators.derivative_comparison import ROUNDING_UNITS, compare_derivatives, slope_agrees
from lightning_hesd.numerics.operators.directional import Line, beside_the_weights
from lightning_hesd.numerics.operators.memory import COMPARED_SAMPLES
from lightning_hesd.spectra.validation import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix
    from lightning_hesd.numerics.operators.derivative_comparison import ComparedDerivatives
    from lightning_hesd.numerics.operators.directional import Outcome

    InFinest = Callable[..., AbstractContextManager[Callable[[Tensor], Tensor]]]

Verdict = Literal["yes", "no", "unknown"]

SINGULAR = 1e3
"""Products at the weights that are so many times as long as beside them are those of a singularity, not of a kink."""

LEAST_GAP = 1e-3
"""Relative difference between products in two precisions that is rounding in any case."""


@dataclass(frozen=True)
class Verification:
    """Result of the comparison of a loss with its derivatives.

    Attributes:
        gradient: Outcome for the gradient, against differences of the loss.
        products: Outcome for products by differentiating twice, against differences of the gradient.
        words: The comparison and its result in words.
        kinds: Names of the operations in the graph that was compared.
    """

    gradient: Outcome
    products: Outcome
    words: str
    kinds: frozenset[str] = frozenset()

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

    def __init__(self, words: str, loss: float) -> None:
        super().__init__(words)
        self.loss = loss


def verify(
    matrix: CurvatureMatrix,
    batch: WeightedBatch,
    space: VectorSpace,
    *,
    exact: bool,
    in_finest: InFinest | None = None,
    may_fail: bool = True,
    few_first: bool = True,
) -> Verification:
    """Compare the products and the gradient of a batch's loss with differences.

    The first comparisons are in the finest precision of the device (float64, if it has it), where rounding hides almost
    nothing: with a few samples of the batch, then with all of them, then beside the weights, because a kink at the
    weights themselves (zeros in the data under biases of zero) looks like a wrong gradient. Where constants or casts
    make the loss less precise, or fail, they get the finest precision, too. If none of these is possible or agrees, the
    last comparison is in the precision of the module.

    Args:
        matrix: The curvature matrix.
        batch: The batch.
        space: The space of vectors over all parameters.
        exact: Whether products come from differentiating twice; else only the gradient is compared.
        in_finest: Makes a context in which module and batches are in the finest precision of the device (with
            `throughout=True` also constants, batches of any class and what the loss casts), and yields the function
            from a parameter to its copy there; None: there is no such context.
        may_fail: Whether an error makes the outcome "undecided"; ranks that evaluate together must raise it.
        few_first: Whether a few samples are compared first, and their agreement is enough.
    """
    attempts: list[tuple[InFinest, bool, bool]] = [(_as_it_is, False, False)]
    if in_finest is not None:
        in_float64 = [(in_finest, True, False), (in_finest, False, False), (in_finest, False, True)]
        attempts = [*in_float64[0 if few_first else 1 :], *attempts]
    found: list[ComparedDerivatives] = []
    problem = ""
    for context, few, beside in attempts:
        if beside and found and not found[-1].is_continuous:
            continue  # beside the weights is another function
        try:
            samples = batch.cut_at([COMPARED_SAMPLES])[0] if few and batch.length() > COMPARED_SAMPLES else batch
            subject = _Subject(matrix, samples, space, exact, beside)
            found.append(subject.compared(context) if context is _as_it_is else _finest(subject, context))
        except Exception as error:
            if not may_fail:
                raise
            problem = f"{type(error).__name__}: {first_line(str(error))}"
            continue
        if not found[-1].is_repeatable:
            return Verification("differs", "undecided", _words_of_change(found[-1]))
        if beside and len(found) > 1 and found[-2].product_norm > SINGULAR * found[-1].product_norm:
            found.pop()  # the curvature at the weights is not that beside them
            continue
        if found[-1].agrees:
            found = [found[-1]] if context is not _as_it_is else found
            break
    if not found:
        return Verification("undecided", "undecided", f"the comparison with differences failed ({problem})")
    fine, coarse = found[-2:][0], found[-1]
    of_gradient = _joint(fine.gradient, coarse.gradient, hidden=fine.gradient_gap <= coarse.blur)
    of_products = _joint(fine.products, coarse.products, hidden=fine.product_gap <= coarse.blur)
    told = coarse if of_gradient == of_products == "agrees" else fine
    words = _words(told, of_gradient, of_products, exact=exact, is_hessian=matrix.is_hessian)
    return Verification(of_gradient, of_products, words, frozenset(told.facts.kinds))


def gradient_agrees(
    matrix: CurvatureMatrix, batch: WeightedBatch, space: VectorSpace, in_finest: InFinest, kinds: frozenset[str]
) -> bool:
    """Return whether the gradient of a batch's loss agrees with differences, given that products of others agreed.

    That takes about a quarter of the time of `verify`, which must tell if it is False: the gradient may be wrong or
    undecided, or there are custom functions, or operations besides those `kinds` that products were compared for.
    """
    try:
        return _Subject(matrix, batch, space, exact=False, beside=False).has_right_slope(in_finest, kinds)
    except Exception:  # noqa: BLE001 - whatever the user's loss raises
        return False


@dataclass(frozen=True)
class _Subject:
    """What is compared: the derivatives of the loss of a batch, at the weights or beside them."""

    matrix: CurvatureMatrix
    batch: WeightedBatch
    space: VectorSpace
    exact: bool
    beside: bool

    def compared(self, context: InFinest) -> ComparedDerivatives:
        """Compare in the precision of a context."""
        with self._within(context) as matrix:
            return compare_derivatives(matrix, self.batch, self.space, exact=self.exact)

    def compared_throughout(self, in_finest: InFinest) -> ComparedDerivatives | None:
        """Compare in the finest precision throughout the loss; None where that tells nothing about the analyzed one.

        The loss may need its casts, backward passes of custom functions may have further ones, and casts may lose
        derivatives: the one that is analyzed must be the same up to rounding.
        """
        context = partial(in_finest, throughout=True)
        try:
            found = self.compared(context)
            if not found.agrees:
                return None if found.facts.custom else found
            return found if self._is_the_analyzed_one(context) else None
        except Exception:  # noqa: BLE001 - whatever the user's loss raises
            return None

    def has_right_slope(self, in_finest: InFinest, kinds: frozenset[str]) -> bool:
        """Return whether the gradient agrees with differences, and the graph has operations of these kinds only."""
        for throughout in (False, True):
            context = partial(in_finest, throughout=throughout)
            with self._within(context) as matrix:
                agrees = slope_agrees(matrix, self.batch, self.space)
            if agrees is not None:
                is_known = not matrix.facts.custom and matrix.facts.kinds <= kinds
                return agrees and is_known and not (throughout and not self._is_the_analyzed_one(context))
        return False

    def _is_the_analyzed_one(self, context: InFinest) -> bool:
        """Return whether the derivatives within a context are those of the loss as it is analyzed, up to rounding."""
        with self._within(context) as matrix:
            line = Line(matrix, self.batch, self.space)
            expected = self._derivative(matrix, line)
        with self._within(_as_it_is) as matrix:
            computed = self._derivative(matrix, line)
        allowed = max(ROUNDING_UNITS * matrix.epsilon, LEAST_GAP) * line.norm(expected)
        return line.norm(computed - expected) <= allowed

    @contextlib.contextmanager
    def _within(self, context: InFinest) -> Iterator[CurvatureMatrix]:
        with context() as counterpart:
            parameters = [counterpart(p) for p in self.matrix.parameters]
            matrix = replace(self.matrix, parameters=parameters, blocks=(EVERYTHING,))
            with beside_the_weights(parameters, self.space) if self.beside else contextlib.nullcontext():
                yield matrix

    def _derivative(self, matrix: CurvatureMatrix, line: Line) -> Tensor:
        """Return the product with the direction of a line, or the gradient where products are differences of it."""
        if not self.exact:
            return line.flat(gradient(matrix.loss(self.batch), matrix.parameters))
        direction = in_shape(line.direction, matrix.parameters)
        vector = [v.to(p.dtype) for v, p in zip(direction, matrix.parameters, strict=True)]
        return line.flat(matrix.make_matvec(self.batch, retain=False)[1](vector))


def _finest(subject: _Subject, in_finest: InFinest) -> ComparedDerivatives:
    """Compare in the finest precision, throughout the loss where that of parameters and batch is not enough."""
    try:
        found = subject.compared(in_finest)
    except Exception:
        finer = subject.compared_throughout(in_finest)
        if finer is None:
            raise
        return finer
    return found if found.is_finest else subject.compared_throughout(in_finest) or found


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


def _words_of_change(found: ComparedDerivatives) -> str:
    return (
        "the loss function returned {:.8g} and {:.8g} for the same weights, batch and seed".format(*found.losses)
        + ". It may draw from a random generator of its own, change an object outside of the module (a counter, a "
        "teacher network), or a batch that cannot be copied. Make such objects attributes of the module: the analysis "
        "restores these"
    )


def _words(
    found: ComparedDerivatives, of_gradient: Outcome, of_products: Outcome, *, exact: bool, is_hessian: bool
) -> str:
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
    if of_products == "differs" and not is_hessian:
        return (
            f"products with the Gauss-Newton matrix differ by {found.product_gap:.2g} of their size from differences "
            f"of the outputs and their loss ({found.precision}): `output_fn` or `output_loss` hides a part of itself "
            f"(`detach`, `no_grad`, `.item()`, NumPy), or a custom function{custom} in them has a wrong derivative"
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
    constant = "; rows of embeddings for padding count as constants" if found.facts.has_constant_rows else ""
    compared = f"products agree with differences of the gradient to {found.product_gap:.1g}, and " if exact else ""
    return f"{compared}the gradient agrees with differences of the loss ({found.precision}){constant}"
