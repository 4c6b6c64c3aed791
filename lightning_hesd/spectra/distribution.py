"""`Distribution`: the estimate of the distribution of eigenvalues, for densities, histograms and cumulative numbers.

A converged node is one eigenvalue. Any other node stands for all eigenvalues around it, hundreds in the bulk, so its
weight is spread over a cell: uniformly on each side of the node, such that the node is the mean. A cell ends

- halfway to the neighboring node, but at zero where that is between the two nodes: the share of negative eigenvalues
  stays that of the nodes, and a peak at zero is not smeared over the other sign;
- no farther from the node than its Ritz residual, within which an eigenvalue lies: a node that has nearly converged,
  or one for a multiple eigenvalue, stays a point;
- at the node itself if that is the first or the last one: no eigenvalue is known to be beyond.

At each node the cumulative distribution is then between the sums of weights without and with that node, as the bounds
of Chebyshev, Markov and Stieltjes demand (see `counts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lightning_hesd.spectra.deflation import Mask
    from lightning_hesd.spectra.quadrature import Array

DENSITY_POINTS = 2048
SIGMAS_BEYOND = 6.0  # a Gaussian keeps all but 2e-9 of its mass within six standard deviations

PANEL_POINTS = 5
"""Gauss-Legendre points for each stretch of one standard deviation: the smoothed density of a uniform piece is right to
1e-4 of itself where it is 1e-10 of its peak, and far better where it is more. NumPy has no error function."""


@dataclass(frozen=True)
class Distribution:
    """A mean of uniform distributions around nodes, and of points.

    Attributes:
        nodes: The nodes of all probes, shape (nodes,).
        weights: Share of eigenvalues that each stands for, shape (nodes,), sum 1.
        left: Distance from each node to the lower end of its cell, shape (nodes,).
        right: Distance to the upper end, shape (nodes,).
    """

    nodes: Array
    weights: Array
    left: Array
    right: Array

    @cached_property
    def pieces(self) -> tuple[Array, Array, Array]:
        """Lower end, upper end and mass of uniform pieces, each of shape (pieces,); equal ends are a point."""
        width = self.left + self.right
        # The shorter side has the larger share, so that the node is the mean.
        below = self.weights * np.divide(self.right, width, out=np.ones_like(width), where=width > 0)
        low = np.concatenate([self.nodes - self.left, self.nodes])
        high = np.concatenate([self.nodes, self.nodes + self.right])
        mass = np.concatenate([below, self.weights - below])
        present = mass > 0
        return low[present], high[present], mass[present]

    def cumulative(self, points: ArrayLike, *, strictly: bool = False) -> Array:
        """Return the share of eigenvalues up to each point, shape (points,); `strictly`: of those below it."""
        places = np.asarray(points, dtype=np.float64)
        shares = np.zeros_like(places)
        for low, high, mass in zip(*self.pieces, strict=True):
            if low < high:
                shares += mass * ((places - low) / (high - low)).clip(0, 1)
            else:
                shares += mass * (places > low if strictly else places >= low)
        return shares

    def density(self, grid: ArrayLike | None = None, sigma: float | None = None) -> tuple[Array, Array]:
        """Return the density smoothed by Gaussians.

        Args:
            grid: Points, shape (points,); default: evenly spaced, reaching beyond both extremes so that the trapezoid
                rule over the grid gives 1.
            sigma: Standard deviation of the Gaussians; default: 1 % of the width of the spectrum.

        Returns:
            grid: The points, shape (points,).
            density: Density at these points, shape (points,), in inverse units of the eigenvalues.

        Raises:
            ValueError: If `sigma` is not positive, or `grid` is not one-dimensional.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if sigma is None:
            # One single eigenvalue has no width: its own size sets the scale then, and 1 for the zero matrix.
            width, size = high - low, max(abs(low), abs(high))
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
        for center, mass in zip(*self._centers(sigma), strict=True):
            values += mass * np.exp(-0.5 * ((points - center) / sigma) ** 2)
        return points, values / (sigma * math.sqrt(2 * math.pi))

    def _centers(self, sigma: float) -> tuple[Array, Array]:
        """Return points and their weights that give the same density where `sigma` smooths it."""
        places, shares = np.polynomial.legendre.leggauss(PANEL_POINTS)
        centers, weights = [], []
        for low, high, mass in zip(*self.pieces, strict=True):
            panels = math.ceil((high - low) / sigma)
            if panels == 0:
                centers.append(np.array([low]))
                weights.append(np.array([mass]))
                continue
            half = (high - low) / (2 * panels)
            middles = low + half * (2 * np.arange(panels) + 1)
            centers.append(np.add.outer(middles, half * places).ravel())
            weights.append(np.tile(mass * shares / (2 * panels), panels))
        return np.concatenate(centers), np.concatenate(weights)

    def histogram(self, bins: int | ArrayLike = 120) -> tuple[Array, Array]:
        """Return the share of eigenvalues in each bin: no smoothing, no sampling.

        Args:
            bins: Edges, shape (bins + 1,), which must enclose every node; or the approximate number of equal bins from
                the smallest to the largest node. Zero is an edge of equal bins where the spectrum has both signs, so
                that no bin mixes negative and positive curvature.

        Returns:
            mass: Share of each bin, shape (bins,), sum 1. The last bin contains its upper edge.
            edges: Bin edges, shape (bins + 1,).

        Raises:
            ValueError: If `bins` is less than 1, or edges are not ascending or leave out a node.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if np.ndim(bins) == 0:
            edges = _equal_edges(low, high, int(bins))  # type: ignore[arg-type]
        else:
            edges = np.asarray(bins, dtype=np.float64)
            if edges.ndim != 1 or len(edges) < 2 or not (edges[:-1] <= edges[1:]).all():
                msg = f"`bins` must be a number, or at least two edges, ascending and none of them NaN; got {bins!r}."
                raise ValueError(msg)
            if low < edges[0] or high > edges[-1]:
                msg = (
                    f"`bins` must enclose every node, from {low:.6g} to {high:.6g}, got edges {edges[0]} to "
                    f"{edges[-1]}."
                )
                raise ValueError(msg)
        below = self.cumulative(edges, strictly=True)
        below[-1] = self.cumulative(edges[-1:])[0]
        # Sums of equal shares in another order may differ in the last digit.
        return np.diff(below).clip(0), edges

    def largest_distance(self, points: Array, low: Array, high: Array) -> float:
        """Bound the Wasserstein-1 distance from distributions within a band.

        Args:
            points: Points, ascending, that enclose this distribution, shape (points,).
            low: Least share of eigenvalues from each point to the next, shape (points,).
            high: Largest share, shape (points,).
        """
        starts, ends, _ = self.pieces
        places = np.unique(np.concatenate([points, starts, ends]))
        places = places[(points[0] <= places) & (places <= points[-1])]
        band = np.searchsorted(points, places[:-1], side="right") - 1
        low, high = low[band], high[band]

        def farther(shares: Array) -> Array:
            return np.maximum(high - shares, shares - low)

        # The share is linear between two places, so the distance is convex: it is at most the mean of its ends.
        sides = farther(self.cumulative(places[:-1])), farther(self.cumulative(places[1:], strictly=True))
        return float((sides[0] + sides[1]) @ np.diff(places) / 2)


def spread(nodes: Array, weights: Array, residuals: Array, converged: Mask) -> Distribution:
    """Return the distribution for quadrature rules: the mean over the probes.

    Args:
        nodes: Quadrature nodes, shape (probes, steps), padded with NaN.
        weights: Their weights, shape (probes, steps).
        residuals: Ritz residuals, shape (probes, steps).
        converged: Nodes that are eigenvalues, shape (probes, steps).
    """
    low, high = nodes[:, :-1], nodes[:, 1:]
    ends = np.where((low <= 0) & (high >= 0), 0.0, (low + high) / 2)
    left, right = np.zeros_like(nodes), np.zeros_like(nodes)
    left[:, 1:], right[:, :-1] = high - ends, ends - low
    present = ~np.isnan(nodes)
    reach = np.where(converged, 0.0, residuals)[present]
    # Next to the padding, which is no neighbor, the distances are NaN.
    left, right = (np.minimum(np.nan_to_num(distances[present]), reach) for distances in (left, right))
    return Distribution(nodes[present], weights[present] / len(nodes), left, right)


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
