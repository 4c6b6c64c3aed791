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

CONVERGED = 1e-8
"""Ritz residual, relative to the node, below which a node is an eigenvalue. Residuals fall fast once a node converges:
1e-4 finds hardly more nodes, but takes the mean of two eigenvalues that differ by 1e-6 for one."""

ACCURATE = 1e-2
"""Largest rounding of an eigenvalue, relative to it."""

NOTHING_LEFT = 1e-8
"""The sum of the squared components n·τ of some eigenvalues is below this with a probability of 8e-5 at most."""

FALSE_ALARM = 0.001
"""Probability of taking simple eigenvalues for multiple ones by one of their weights, or by the sum: small, because an
eigenvalue left among the rest for its large weight makes bounds on the rest fail, and then all noise returns."""


def converged_nodes(
    nodes: Array, weights: Array, residuals: Array, dimension: int, rounding: float, *, relative: float = CONVERGED
) -> Mask:
    """Return the nodes that are simple eigenvalues, as a mask of shape (probes, steps).

    A Lanczos run sees one eigenvector of an eigenvalue of multiplicity k, with k times the weight to be expected.
    Eigenvalues of generic matrices are simple, but those of a matrix with a structure may not be (I ⊗ A has them all
    several times), and a null space may be shifted. No node whose own weight is too large for a simple eigenvalue
    counts as converged. Of the other nodes of a probe none counts if two are equal up to rounding, which makes a run
    find the second copy of a multiple eigenvalue, or if their weights together are too large for simple eigenvalues.
    After n steps all nodes are eigenvalues.

    Args:
        nodes: Quadrature nodes.
        weights: Quadrature weights.
        residuals: Ritz residuals.
        dimension: Size n of the matrix.
        rounding: Size below which an eigenvalue cannot be told from zero.
        relative: Largest Ritz residual of a converged node, relative to the node.
    """
    size = np.abs(nodes)  # NaN compares as False
    ended = residuals.max(axis=1, keepdims=True) <= rounding  # in an invariant space, where residuals fall no further
    found = ((residuals < relative * size) | ended) & (rounding < ACCURATE * size)
    rows = zip(nodes, dimension * weights, found, strict=True)
    return np.array([_simple(*row, dimension, rounding) for row in rows])


def _simple(nodes: Array, components: Array, found: Mask, dimension: int, rounding: float) -> Mask:
    """Return which of the eigenvalues that a probe has found are simple, given the squared components n·τ."""
    present = ~np.isnan(nodes)
    if np.count_nonzero(present) == dimension:
        return present
    nothing = np.zeros_like(found)
    count = max(int(np.count_nonzero(found)), 1)
    multiple = found & (components > _chi_squared_quantile(1, 1 - FALSE_ALARM / count))
    copies = (np.abs(nodes[:, None] - nodes[multiple]) <= rounding).any(axis=1)
    simple: Mask = found & ~copies
    count = int(np.count_nonzero(simple))
    if (np.diff(nodes[simple]) <= rounding).any():
        return nothing
    # Fewer than n eigenvalues that hold all of the start vector cannot all be simple: the Krylov space is invariant.
    if count == 0 or components[~simple].sum() < NOTHING_LEFT:
        return nothing
    plausible = components[simple].sum() <= _chi_squared_quantile(count, 1 - FALSE_ALARM)
    return simple if plausible else nothing


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
    nodes: Array,
    weights: Array,
    residuals: Array,
    converged: Mask,
    *,
    dimension: int,
    rounding: float,
    on_sphere: bool,
) -> float:
    """Return the standard error of the trace, n·Σ τ'θ with deflated weights τ', of which only the rest is random.

    The second moment of the rest comes from the same start vector, so that a vector with small components along the
    largest eigenvectors of the rest would understate its own error: one standard error of the second moment, from the
    fourth, is added. Residuals and rounding are on top.

    Args:
        nodes: Quadrature nodes.
        weights: Quadrature weights, not deflated.
        residuals: Ritz residuals.
        converged: Nodes that are eigenvalues.
        dimension: Size n of the matrix.
        rounding: Rounding of the nodes.
        on_sphere: Whether start vectors are uniform on the sphere, rather than Rademacher. For v uniform on the sphere
            Var(n·vᵀHv) = 2n/(n + 2)·(tr H² − (tr H)²/n); for Rademacher vectors the variance is at most 2 tr H².
    """
    relative = rounding / (float(np.nanmax(np.abs(nodes))) or 1.0)
    variances, offsets = [], []
    for theta, tau, residual, known in zip(nodes, weights, residuals, converged, strict=True):
        rest = (tau > 0) & ~known
        n = dimension - np.count_nonzero(known)
        offset = float(residual[known].sum()) + rounding * np.count_nonzero(known)
        if n and rest.any():
            share = tau[rest] / tau[rest].sum()
            # Rounding of the rest's share in the products, and that of the nodes, which averages out.
            offset += n * relative * math.sqrt(share @ theta[rest] ** 2) + math.sqrt(n) * rounding
            # After a single step the rule is not exact to degree 2: ‖Hv‖² = α² + β².
            beyond = float(residual[0] ** 2) if np.count_nonzero(tau) == 1 else 0.0
            second = _second_moment(theta[rest], share, n, centered=on_sphere) + beyond
            variances.append((2 * n**2 / (n + 2) if on_sphere else 2 * n) * second)
        offsets.append(offset)
    return (math.sqrt(sum(variances)) + sum(offsets)) / len(offsets)


def _second_moment(theta: Array, share: Array, n: int, *, centered: bool) -> float:
    """Return the second moment of n eigenvalues, plus its standard error, from their nodes and weights."""
    squares = (theta - (share @ theta if centered else 0.0)) ** 2
    second, fourth = float(share @ squares), float(share @ squares**2)
    return second + math.sqrt(2 * max(fourth - second**2, 0.0) / n)
