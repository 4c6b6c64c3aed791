"""Distance between an estimated distribution of eigenvalues and the eigenvalues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.spectra.distribution import Distribution

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def points(nodes: Array, weights: Array) -> Distribution:
    """Return the distribution with weights at nodes, each of shape (nodes,)."""
    return Distribution(nodes, weights, np.zeros_like(nodes), np.zeros_like(nodes))


def wasserstein(found: Distribution, eigenvalues: Array) -> float:
    """Return the Wasserstein-1 distance, the area between the cumulative distributions, in units of the eigenvalues."""
    low, high, _ = found.pieces
    places = np.unique(np.concatenate([low, high, eigenvalues]))
    true = np.searchsorted(np.sort(eigenvalues), places[:-1], side="right") / len(eigenvalues)
    # Between two places the difference is linear.
    first, last = found.cumulative(places[:-1]) - true, found.cumulative(places[1:], strictly=True) - true
    crossing = first * last < 0
    triangles = (first**2 + last**2) / (2 * np.where(crossing, np.abs(first - last), 1.0))
    return float(np.where(crossing, triangles, np.abs(first + last) / 2) @ np.diff(places))
