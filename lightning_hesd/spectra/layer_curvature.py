"""What one Lanczos run on the whole matrix tells of its diagonal blocks, the Hessians of single layers.

With the converged Ritz pairs (θ_i, y_i) the matrix is H = Σ θ_i y_i y_iᵀ + R, and the eigenvalues of R are those that
have not converged, and zeros. Hence, for the elements l of the vectors that belong to a layer:

- The trace of the layer's Hessian is Σ θ_i ‖y_i^(l)‖² + tr R_ll, and with z⊥, the part of a random start vector that is
  orthogonal to all y_i, z⊥^(l)·(R z⊥)^(l) estimates the latter: Hutchinson's estimator of a deflated matrix (Meyer et
  al. 2021). The same with min(θ, 0) for θ gives the trace of the layer's negative curvature.
- λ_max of the layer's Hessian is that of Σ θ_i y_i^(l) y_i^(l)ᵀ up to the eigenvalues of R_ll (Weyl), which lie between
  the extremes of R. Here pairs may count that have converged less: their residuals r_i are the only elements of the
  matrix between them and the rest, so that they change eigenvalues by no more than √(Σ r_i²).
- ‖y^(l)‖² is the share of an eigenvector in the layer.

All of it takes the inner products of the basis vectors' elements in each layer, and no product with the matrix.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra.deflation import converged_nodes
from lightning_hesd.spectra.eigenvalue_bounds import rest_bounds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lightning_hesd.spectra.deflation import Mask
    from lightning_hesd.spectra.quadrature import Array


CONVERGED_FOR_BOUNDS = 1e-3
"""Ritz residual, relative to the node, below which a pair helps to bound the eigenvalues of layers."""


@dataclass(frozen=True)
class LayerCurvature:
    """The diagonal block of one layer, as far as a Lanczos run on the whole matrix tells.

    The bounds hold with probability `Spectrum.confidence` if the converged nodes are simple eigenvalues, see
    `deflation.converged_nodes`.

    Attributes:
        dimension: Number of analyzed parameters of the layer.
        trace: Estimate of the trace of the layer's Hessian; those of all layers add up to that of the matrix.
        trace_error: Standard error of `trace`; it errs on the large side.
        trace_share: Share in the trace of the matrix; NaN where that is not positive.
        negative_share: Share in the trace of the matrix's negative curvature, Σ min(λ, 0); NaN where there is none.
        lambda_max_weight: Share of the eigenvector of the largest eigenvalue in the layer, between 0 and 1.
        lambda_min_weight: Share of the eigenvector of the smallest eigenvalue in the layer.
        lambda_max_bounds: (low, high) that contain the largest eigenvalue of the layer's Hessian.
        lambda_min_bounds: (low, high) that contain the smallest eigenvalue of the layer's Hessian.
        squared_norm: Squared Euclidean norm of the layer's parameters; NaN: unknown.
    """

    dimension: int
    trace: float
    trace_error: float
    trace_share: float
    negative_share: float
    lambda_max_weight: float
    lambda_min_weight: float
    lambda_max_bounds: tuple[float, float]
    lambda_min_bounds: tuple[float, float]
    squared_norm: float = math.nan

    @property
    def numbers(self) -> list[float]:
        """All numbers in the order of the fields, bounds as two each, for storage as a row of an array."""
        numbers: list[float] = np.hstack(astuple(self)).tolist()
        return numbers

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> LayerCurvature:
        """Return the curvature with these `numbers`."""
        dimension, trace, error, share, negative, largest, smallest, *bounds, norm = map(float, numbers)
        pairs = (bounds[0], bounds[1]), (bounds[2], bounds[3])
        return cls(int(dimension), trace, error, share, negative, largest, smallest, *pairs, norm)


NUMBERS = 12
"""How many `numbers` a layer has."""


@dataclass(frozen=True)
class RitzPairs:
    """Ritz pairs of one Lanczos run, and where their vectors lie.

    Attributes:
        nodes: Ritz values θ, ascending, shape (steps,).
        vectors: Eigenvectors of T as columns, shape (steps, steps): the Ritz vectors in the Krylov basis.
        residuals: Ritz residuals, shape (steps,).
        grams: Inner products of the elements that the basis vectors have in each layer, shape (layers, steps, steps).
    """

    nodes: Array
    vectors: Array
    residuals: Array
    grams: Array


@dataclass(frozen=True)
class RestProbe:
    """A random vector z without components along the converged Ritz vectors of the first run, and its product Rz.

    z is as long as one uniform on a sphere should be, the root of the number of other eigenvalues.

    Attributes:
        traces: z·(Rz) in each layer, shape (layers,).
        squares: ‖Rz‖² in each layer, shape (layers,).
    """

    traces: Array
    squares: Array


def layer_curvatures(
    runs: Sequence[RitzPairs],
    dimensions: Mapping[str, int],
    rounding: float,
    confidence: float,
    further: Sequence[RestProbe] = (),
) -> dict[str, LayerCurvature]:
    """Return the curvature of each layer from the Lanczos runs of all probes; none from a run of a single step.

    A single step does not tell where the product with its vector lies, unless that is a multiple of the vector.

    Args:
        runs: Ritz pairs of each probe; their start vectors are uniform on the sphere.
        dimensions: Number of parameters of each layer, by name, in the order of the Gram matrices.
        rounding: Size below which an eigenvalue cannot be told from zero.
        confidence: Probability, over the start vectors, with which the bounds of a layer hold.
        further: More random vectors, for the traces.
    """
    if any(len(run.nodes) == 1 and run.residuals[0] > rounding for run in runs):
        return {}
    sizes = np.array(list(dimensions.values()))
    failure = (1 - confidence) / (2 * len(runs))
    analyses = [_Deflated(run, sizes, rounding, failure) for run in runs]
    estimates = [run.traces(run.nodes) for run in analyses] + [analyses[0].known + probe.traces for probe in further]
    variances = [run.variances() for run in analyses] + [2 * probe.squares for probe in further]
    offsets = [run.offsets() for run in analyses]
    traces = np.mean(estimates, axis=0)
    errors = np.sqrt(np.sum(variances, axis=0)) / len(estimates) + np.mean(offsets, axis=0)
    negative = np.mean([run.traces(np.minimum(run.nodes, 0.0)) for run in analyses], axis=0)
    lowest = min(analyses, key=lambda run: run.nodes[0])
    highest = max(analyses, key=lambda run: run.nodes[-1])
    bounds = np.array([[run.bounds(index, n) for index, n in enumerate(sizes)] for run in analyses])
    lows, highs = bounds[..., 0].max(axis=0), bounds[..., 1].min(axis=0)  # shape (layers, 2): of λ_min and λ_max
    return {
        name: LayerCurvature(
            dimension=n,
            trace=float(traces[index]),
            trace_error=float(errors[index]),
            trace_share=_share(traces, index),
            negative_share=_share(-negative, index),
            lambda_max_weight=float(highest.shares[index, -1]),
            lambda_min_weight=float(lowest.shares[index, 0]),
            lambda_max_bounds=(float(lows[index, 1]), float(highs[index, 1])),
            lambda_min_bounds=(float(lows[index, 0]), float(highs[index, 0])),
        )
        for index, (name, n) in enumerate(dimensions.items())
    }


def _share(values: Array, index: int) -> float:
    total = float(values.sum())
    return float(values[index]) / total if total > 0 else math.nan


class _Deflated:
    """One Lanczos run, split into converged Ritz pairs and the rest.

    Attributes:
        nodes: Ritz values, shape (steps,).
        shares: Share of each Ritz vector in each layer, shape (layers, steps).
    """

    def __init__(self, run: RitzPairs, dimensions: NDArray[np.int64], rounding: float, failure: float) -> None:
        dimension = int(dimensions.sum())
        self.nodes, self._residuals = run.nodes, run.residuals
        self._dimensions, self._rounding = dimensions, rounding
        self._grams = run.vectors.T @ run.grams @ run.vectors  # of the Ritz vectors
        self.shares: Array = np.diagonal(self._grams, axis1=1, axis2=2)
        first = run.vectors[0]
        weights = first**2
        rules = run.nodes[None], weights[None], run.residuals[None]
        self._converged: Mask = converged_nodes(*rules, dimension, rounding)[0]
        rest = ~self._converged
        # The rest of the start vector, in Ritz vectors, as long as one of the rest's dimensions should be.
        count = dimension - int(np.count_nonzero(self._converged))
        left = float(weights[rest].sum())
        self._rest = np.where(rest, first, 0.0) * (math.sqrt(count / left) if left > 0 else 0.0)
        self._split: Mask = converged_nodes(*rules, dimension, rounding, relative=CONVERGED_FOR_BOUNDS)[0]
        low, high = rest_bounds(run.nodes, weights, run.residuals, self._split, dimension=dimension, failure=failure)
        # What the residuals leave out moves the eigenvalues of R from those of the matrix, and then the layer's.
        self._error = rounding + float(np.linalg.norm(run.residuals[self._split]))
        self._rest_low, self._rest_high = min(low - self._error, 0.0), max(high + self._error, 0.0)

    @property
    def known(self) -> Array:
        """The part of the layers' traces that the converged pairs tell, shape (layers,)."""
        return self.shares @ np.where(self._converged, self.nodes, 0.0)

    def traces(self, values: Array) -> Array:
        """Return the traces of the layers' blocks of f(H), shape (layers,), given f of each Ritz value."""
        known = np.where(self._converged, values, 0.0)
        return self.shares @ known + self._products(self._rest, self._rest * values)

    def variances(self) -> Array:
        """Return an estimate of the variance of each trace, shape (layers,), that errs on the large side.

        That of z⊥^(l)·(R z⊥)^(l) is ‖R_l‖² + ‖R_ll‖² ≤ 2‖R_l‖², with R_l the rows of the layer and Frobenius norms,
        and ‖(R z⊥)^(l)‖² estimates ‖R_l‖². Of a small layer this may be much too small by chance. It is at least what
        the Ritz pairs have of it; and a part of the vector that is too short for a layer's dimension is made longer.
        """
        product = self._rest * self.nodes
        squares = self._products(product, product)
        present = self._products(self._rest, self._rest)
        expected = self._dimensions - self.shares @ self._converged
        lengthening = np.divide(expected, present, out=np.ones_like(present), where=present > 0)
        known = self.shares @ np.where(self._converged, 0.0, self.nodes**2)
        variances: Array = 2 * np.maximum(squares * np.maximum(lengthening, 1.0), np.maximum(known, 0.0))
        return variances

    def offsets(self) -> Array:
        """Return what residuals and rounding may add to each trace, shape (layers,)."""
        known = np.where(self._converged, self._residuals + self._rounding, 0.0)
        relative = self._rounding / (float(np.abs(self.nodes).max()) or 1.0)
        product = self._rest * self.nodes
        present, squares = (np.sqrt(np.maximum(self._products(v, v), 0.0)) for v in (self._rest, product))
        offsets: Array = np.sqrt(np.maximum(self.shares, 0.0)) @ known + present * (relative * squares + self._rounding)
        return offsets

    def _products(self, first: Array, second: Array) -> Array:
        """Return the inner products of two vectors in each layer, given by their components along the Ritz vectors."""
        products: Array = self._grams @ second @ first
        return products

    def bounds(self, index: int, dimension: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return bounds on the smallest and on the largest eigenvalue of a layer's block."""
        gram, values = self._grams[index][np.ix_(self._split, self._split)], self.nodes[self._split]
        size = float(np.abs(self.nodes).max())
        factor, imprecision = _factor(gram, dimension, self._rounding / size if size > 0 else 0.0)
        low, high = _extremes(factor, values, dimension, self._rest_low, self._rest_high)
        error = self._error + 2 * imprecision * size
        return (low[0] - error, low[1] + error), (high[0] - error, high[1] + error)


def _extremes(
    factor: Array, values: Array, dimension: int, rest_low: float, rest_high: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bound λ_min and λ_max of Y diag(θ) Yᵀ + R_ll, given F, θ, and bounds on the eigenvalues of R."""
    # With the factor F of YᵀY = FFᵀ, Y = QFᵀ with orthonormal Q, so that the eigenvalues of Y diag(θ) Yᵀ are those of
    # Fᵀ diag(θ) F, and zeros.
    found, vectors = np.linalg.eigh(factor.T @ (values[:, None] * factor))
    # Of an eigenvector u only the part outside of the Ritz vectors, of squared length 1 − ‖Yᵀu‖², is curved by R.
    outside = np.maximum(1 - ((factor @ vectors) ** 2).sum(axis=0), 0.0)
    has_zero = len(values) < dimension  # of any vector orthogonal to Y
    low, high = (rest_low, rest_high), (rest_low, rest_high)
    if len(found) and not (has_zero and (values >= 0).all()):
        bottom = np.argmin(found)
        low = float(found[bottom]) + rest_low, float(found[bottom] + outside[bottom] * rest_high)
    if len(found) and not (has_zero and (values <= 0).all()):
        top = np.argmax(found)
        high = float(found[top] + outside[top] * rest_low), float(found[top]) + rest_high
    return low, high


def _factor(gram: Array, dimension: int, rounding: float) -> tuple[Array, float]:
    """Return F with FFᵀ = G for a Gram matrix G of vectors of some dimension, and how precise F is.

    By eigenvalues, which take longer, where G is nearly singular. Its rank is at most the dimension.
    """
    try:
        factor = np.asarray(np.linalg.cholesky(gram), dtype=np.float64)
        smallest = float(np.diagonal(factor).min(initial=1.0)) ** 2
    except np.linalg.LinAlgError:
        smallest = 0.0
    if len(gram) > dimension or smallest <= math.sqrt(rounding):
        sizes, axes = (part[..., -dimension:] for part in np.linalg.eigh(gram))
        factor = np.asarray(axes * np.sqrt(np.maximum(sizes, 0.0)), dtype=np.float64)
        smallest = float(sizes.min(initial=1.0))
    # A singular value σ of F is the root of an eigenvalue of G that rounding has changed.
    return factor, math.sqrt(rounding) if smallest <= rounding else rounding / math.sqrt(smallest)
