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
