"""Stochastic Lanczos quadrature: moments from nodes and weights (Ubaru, Chen & Saad 2017).

Arrays only. The quadrature rules of several probes are a pair `nodes`, `weights` of shape (probes, steps), where a
probe that ended early is padded with NaN nodes of weight 0, and the weights of each probe sum to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


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
        >>> (tridiagonal(np.array([-1.0, 1.0]), np.array([0.5, 0.5])).round(6) + 0.0).tolist()
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


def legible_sigma(low: float, high: float) -> float | None:
    """Return a standard deviation that lets the smaller extreme stand out from zero, 0.2 to 1 % of the width.

    None where all nodes are equal up to rounding: `density` then takes its default.
    """
    width = high - low
    if width <= 1e-10 * max(abs(low), abs(high)):
        return None
    return max(0.002 * width, min(0.01 * width, abs(low) / 4, abs(high) / 4))
