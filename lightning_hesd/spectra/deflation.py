"""Deflated quadrature: a converged Ritz pair is an eigenpair, and counts as one eigenvalue instead of by its weight.

The quadrature weight τ of an eigenvalue is the squared component of a random start vector along one eigenvector. Its
mean is 1/n, and its standard deviation is larger than that. With a kept Krylov basis the converged Ritz pairs are
eigenpairs, so each gets the weight 1/n exactly, and the other nodes share the rest in proportion to their weights: of v
uniform on the sphere, the part orthogonal to these eigenvectors is uniform on a smaller sphere.

Arrays as in `quadrature`: shape (probes, steps), padded with NaN nodes of weight 0.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_hesd.spectra.quadrature import Array

    Mask = NDArray[np.bool_]

CONVERGED = 1e-6
"""Ritz residual, relative to the node, below which a node is an eigenvalue. Residuals fall fast once a node converges:
1e-4 finds hardly more nodes, but takes the mean of two eigenvalues that differ by 1e-6 for one."""

ACCURATE = 1e-2
"""Largest rounding of an eigenvalue, relative to it."""

COPY = 1e-8
"""An eigenvalue's squared component n·τ is below this with probability 8e-5. Rounding makes a Lanczos run find the
second copy of a multiple eigenvalue, of which the start vector has nothing, with a weight far below this."""

FALSE_ALARM = 0.01
"""Probability of taking simple eigenvalues for multiple ones by their weights."""


def converged_nodes(
    nodes: Array, weights: Array, residuals: Array, dimension: int, rounding: float, *, relative: float = CONVERGED
) -> Mask:
    """Return the nodes that are simple eigenvalues, as a mask of shape (probes, steps).

    A Lanczos run sees one eigenvector of an eigenvalue of multiplicity k, with k times the weight to be expected.
    Eigenvalues of generic matrices are simple, but those of a matrix with a structure may not be (I ⊗ A has them all
    several times). No node of a probe counts as converged if its run has found a second copy of an eigenvalue, or if
    the weights of its converged nodes together are too large for simple eigenvalues; and no node whose own weight is.

    Args:
        nodes: Quadrature nodes.
        weights: Quadrature weights.
        residuals: Ritz residuals.
        dimension: Size n of the matrix.
        rounding: Size below which an eigenvalue cannot be told from zero.
        relative: Largest Ritz residual of a converged node, relative to the node.
    """
    size = np.abs(nodes)  # NaN compares as False
    converged = (residuals < relative * size) & (rounding < ACCURATE * size)
    rows = zip(converged, dimension * weights, strict=True)
    return np.array([row & _simple(row, components, dimension) for row, components in rows])


def _simple(converged: Mask, components: Array, dimension: int) -> Mask:
    """Return which of a probe's converged nodes are simple eigenvalues, given the squared components n·τ."""
    steps, count = int(np.count_nonzero(components)), int(np.count_nonzero(converged))
    nothing = np.zeros_like(converged)
    if steps == dimension:
        return converged  # all eigenvalues are known, simple or not
    if (components[converged] < COPY).any():
        return nothing
    simple: Mask = converged & (components < _chi_squared_quantile(1, 1 - FALSE_ALARM / max(count, 1)))
    count = int(np.count_nonzero(simple))
    # As many eigenvalues as steps, but fewer than n, cannot all be simple: the Krylov space is invariant.
    if count in {0, steps} or components[simple].sum() > _chi_squared_quantile(count, 1 - FALSE_ALARM):
        return nothing
    return simple


def _chi_squared_quantile(degrees: int, probability: float) -> float:
    """Return the quantile of χ², exact for one degree of freedom, else by Wilson and Hilferty (1931)."""
    if degrees == 1:
        return NormalDist().inv_cdf((1 + probability) / 2) ** 2
    variance = 2 / (9 * degrees)
    return float(degrees * (1 - variance + NormalDist().inv_cdf(probability) * math.sqrt(variance)) ** 3)


def deflated_weights(weights: Array, converged: Mask, dimension: int) -> Array:
    """Return the weights, shape (probes, steps), with 1/n for converged nodes; those of each probe sum to 1."""
    shared = np.where(converged, 0.0, weights)
    total = shared.sum(axis=1, keepdims=True)
    left = 1 - converged.sum(axis=1, keepdims=True) / dimension
    scale = np.divide(left, total, out=np.ones_like(total), where=converged.any(axis=1, keepdims=True) & (total > 0))
    return np.where(converged, 1 / dimension, shared * scale)


def trace_error(
    nodes: Array, weights: Array, residuals: Array, converged: Mask, dimension: int, *, on_sphere: bool
) -> float:
    """Return the standard error of the trace, n·Σ τ'θ with deflated weights τ', of which only the rest is random.

    The second moment of the rest comes from the same start vector, so that a vector with small components along the
    largest eigenvectors of the rest would understate its own error: one standard error of the second moment, from the
    fourth, is added.

    Args:
        nodes: Quadrature nodes.
        weights: Quadrature weights, not deflated.
        residuals: Ritz residuals.
        converged: Nodes that are eigenvalues.
        dimension: Size n of the matrix.
        on_sphere: Whether start vectors are uniform on the sphere, rather than Rademacher. For v uniform on the sphere
            Var(n·vᵀHv) = 2n/(n + 2)·(tr H² − (tr H)²/n); for Rademacher vectors the variance is at most 2 tr H².
    """
    variances = []
    for theta, tau, residual, known in zip(nodes, weights, residuals, converged, strict=True):
        rest = (tau > 0) & ~known
        n = dimension - np.count_nonzero(known)
        if not rest.any():
            variances.append(0.0)
            continue
        share = tau[rest] / tau[rest].sum()
        center = float(share @ theta[rest]) if on_sphere else 0.0
        # After a single step the rule is not exact to degree 2: ‖Hv‖² = α² + β².
        beyond = float(residual[0] ** 2) if np.count_nonzero(tau) == 1 else 0.0
        second = float(share @ (theta[rest] - center) ** 2) + beyond
        fourth = float(share @ (theta[rest] - center) ** 4)
        second += math.sqrt(2 * max(fourth - second**2, 0.0) / n)
        variances.append((2 * n**2 / (n + 2) if on_sphere else 2 * n) * second)
    return math.sqrt(sum(variances)) / len(variances) + float(residuals[converged].sum()) / len(variances)
