"""Stochastic Lanczos quadrature: moments and densities from nodes and weights (Ubaru, Chen & Saad 2017).

Arrays only. The quadrature rules of several probes are a pair `nodes`, `weights` of shape (probes, steps), where a
probe that ended early is padded with NaN nodes of weight 0, and the weights of each probe sum to 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

DENSITY_POINTS = 2048
SIGMAS_BEYOND = 6.0  # a Gaussian keeps all but 2e-9 of its mass within six standard deviations


def stack_rules(rules: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Stack (nodes, weights, ...) of several probes into arrays of shape (probes, most steps), padded.

    The nodes, the first array, are padded with NaN, the others with 0.
    """
    steps = max(len(rule[0]) for rule in rules)
    stacked = []
    for position, columns in enumerate(zip(*rules, strict=True)):
        array = np.full((len(rules), steps), np.nan if position == 0 else 0.0)
        for row, values in zip(array, columns, strict=True):
            row[: len(values)] = values
        stacked.append(array)
    return tuple(stacked)


def tridiagonal(nodes: Array, weights: Array) -> Array:
    """Return the tridiagonal matrix T that a Gauss quadrature rule determines, of shape (m, m), m at most the nodes.

    Lanczos on the diagonal matrix of the nodes, started at the square roots of the weights, gives it; `nodes` and
    `weights` have shape (steps,).

    Examples:
        >>> tridiagonal(np.array([-1.0, 1.0]), np.array([0.5, 0.5])).round(6).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    basis = (np.sqrt(weights) / np.sqrt(weights.sum()))[None]
    while len(basis) < len(nodes):
        remainder = nodes * basis[-1]
        for _ in range(2):
            remainder -= (basis @ remainder) @ basis
        norm = np.linalg.norm(remainder)
        if norm <= np.finfo(np.float64).eps * abs(nodes).max():
            break
        basis = np.vstack([basis, remainder / norm])
    return np.asarray((basis * nodes) @ basis.T)


def moments(nodes: Array, weights: Array, k: int) -> Array:
    """Return Σ τθᵏ of each probe, shape (probes,): estimates of trace(Hᵏ)/n.

    Raises:
        ValueError: If `k` is negative.
    """
    if k < 0:
        msg = f"`k` must be a non-negative integer, got {k}."
        raise ValueError(msg)
    return np.asarray(np.nansum(weights * nodes**k, axis=1))


def extreme_positions(nodes: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions of the smallest and the largest node; of the first entry, a NaN, if there is no node."""
    low, high = (int(np.argmin(np.where(np.isnan(nodes), np.inf, sign * nodes))) for sign in (1, -1))
    return (low // nodes.shape[1], low % nodes.shape[1]), (high // nodes.shape[1], high % nodes.shape[1])


def density(
    nodes: Array, weights: Array, grid: ArrayLike | None = None, sigma: float | None = None
) -> tuple[Array, Array]:
    """Return the spectral density smoothed by Gaussians, φ(t) = mean over probes of Σ τ·g_σ(t − θ).

    Args:
        nodes: Quadrature nodes, shape (probes, steps).
        weights: Quadrature weights, shape (probes, steps).
        grid: Points t, shape (points,); default: evenly spaced, reaching beyond both extremes so that the trapezoid
            rule over the grid gives 1.
        sigma: Standard deviation of the Gaussians; default: 1 % of the width of the spectrum.

    Returns:
        grid: The points, shape (points,).
        density: φ at these points, shape (points,), in inverse units of the eigenvalues.

    Raises:
        ValueError: If `sigma` is not positive, or `grid` is not one-dimensional.
    """
    probes = len(nodes)
    present = ~np.isnan(nodes)
    theta, tau = nodes[present], weights[present] / probes
    low, high = theta.min(), theta.max()
    if sigma is None:
        # One single eigenvalue has no width: its own size sets the scale then, and 1 for the zero matrix.
        width, size = float(high - low), float(max(abs(low), abs(high)))
        sigma = 0.01 * (width if width > 1e-10 * size else size or 1.0)
    if not sigma > 0:
        msg = f"`sigma` must be positive, got {sigma}."
        raise ValueError(msg)
    if grid is None:
        left, right = low - SIGMAS_BEYOND * sigma, high + SIGMAS_BEYOND * sigma
        points = np.linspace(left, right, max(DENSITY_POINTS, math.ceil(2 * (right - left) / sigma)))
    else:
        points = np.asarray(grid, dtype=np.float64)
        if points.ndim != 1:
            msg = f"`grid` must be one-dimensional, got shape {points.shape}."
            raise ValueError(msg)
    values = np.zeros_like(points)
    for node, weight in zip(theta, tau, strict=True):
        values += weight * np.exp(-0.5 * ((points - node) / sigma) ** 2)
    return points, values / (sigma * math.sqrt(2 * math.pi))


def histogram(nodes: Array, weights: Array, bins: int | ArrayLike = 120) -> tuple[Array, Array]:
    """Return the share of eigenvalues in each bin, the sum of quadrature weights: no smoothing, no sampling.

    Args:
        nodes: Quadrature nodes, shape (probes, steps).
        weights: Quadrature weights, shape (probes, steps).
        bins: Edges, shape (bins + 1,), which must enclose every node; or the approximate number of equal bins from the
            smallest to the largest node. Zero is an edge of equal bins where the spectrum has both signs, so that no
            bin mixes negative and positive curvature.

    Returns:
        mass: Share of each bin, shape (bins,), sum 1.
        edges: Bin edges, shape (bins + 1,).

    Raises:
        ValueError: If `bins` is less than 1, or edges leave out a node.
    """
    present = ~np.isnan(nodes)
    theta, tau = nodes[present], weights[present] / len(nodes)
    low, high = float(theta.min()), float(theta.max())
    if np.ndim(bins) == 0:
        edges = _equal_edges(low, high, int(bins))  # type: ignore[arg-type]
    else:
        edges = np.asarray(bins, dtype=np.float64)
        if edges.ndim != 1 or len(edges) < 2 or np.isnan(edges).any():
            msg = f"`bins` must be a number, or at least two edges, none of them NaN; got {bins!r}."
            raise ValueError(msg)
        if low < edges[0] or high > edges[-1]:
            msg = f"`bins` must enclose every node, from {low:.6g} to {high:.6g}, got edges {edges[0]} to {edges[-1]}."
            raise ValueError(msg)
    return np.histogram(theta, bins=edges, weights=tau)[0], edges


def _equal_edges(low: float, high: float, bins: int) -> Array:
    if bins < 1:
        msg = f"`bins` must be at least 1, got {bins}."
        raise ValueError(msg)
    if low == high:
        margin = abs(low) / 2 or 0.5
        return np.array([low - margin, low + margin])
    if low >= 0 or high <= 0:
        return np.linspace(low, high, bins + 1)
    width = (high - low) / bins
    edges = np.arange(math.floor(low / width), math.ceil(high / width) + 1, dtype=np.float64) * width
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def legible_sigma(low: float, high: float) -> float | None:
    """Return a standard deviation that lets the smaller extreme stand out from zero, 0.2 to 1 % of the width.

    None where all nodes are equal up to rounding: `density` then takes its default.
    """
    width = high - low
    if width <= 1e-10 * max(abs(low), abs(high)):
        return None
    return max(0.002 * width, min(0.01 * width, abs(low) / 4, abs(high) / 4))
