"""Numbers of eigenvalues beyond a threshold, and a band for the cumulative distribution, each proven.

Two steps lead from a Lanczos run to a number of eigenvalues. The quadrature rule bounds the share of the start vector v
that lies in the eigenvectors with eigenvalues up to t: by Chebyshev, Markov and Stieltjes that share is between the sum
of the weights below t and that sum with the weight at t, in the Gauss-Radau rule that has a node at t (Golub & Meurant
2010, section 6.2). And if v is uniform on the sphere of n dimensions, its share in any k of them has the distribution
Beta(k/2, (n − k)/2), whose tails Dasgupta & Gupta (2003, lemma 2.2) bound by exp(−n·KL(k/n ‖ share)/2). Converged nodes
are eigenvalues: they count exactly, and both steps apply to the rest.

Arrays as in `quadrature`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lightning_hesd.spectra.deflation import Mask
    from lightning_hesd.spectra.quadrature import Array

MIN_SHARE = 1e-13
"""Smaller shares of a start vector are rounding."""


MIN_GAP = 1e-18
"""A node closer to a threshold, relative to the largest node, is at the threshold: nodes have a larger rounding."""


@dataclass(frozen=True)
class Rule:
    """Quadrature rule of one Lanczos run, without padding.

    Attributes:
        nodes: Nodes, ascending, shape (steps,).
        weights: Weights, shape (steps,).
        residuals: Ritz residuals, shape (steps,).
        converged: Nodes that are eigenvalues, shape (steps,).
        dimension: Size n of the matrix.
        rounding: Rounding of the nodes.
    """

    nodes: Array
    weights: Array
    residuals: Array
    converged: Mask
    dimension: int
    rounding: float

    @property
    def rest(self) -> int:
        """Number of eigenvalues that are not among the converged nodes."""
        return self.dimension - int(np.count_nonzero(self.converged))

    @property
    def thresholds(self) -> Array:
        """Where to bound the distribution: at the nodes, and on either side of those that stand apart."""
        margin = 2 * (self.residuals + self.rounding)
        gaps = np.diff(self.nodes, prepend=-math.inf, append=math.inf)
        apart = margin < np.minimum(gaps[:-1], gaps[1:]) / 4
        nodes, margin = self.nodes[apart], margin[apart]
        return np.concatenate([self.nodes[~apart], nodes - margin, nodes + margin])

    def known_between(self, above: float, below: float) -> tuple[int, int]:
        """Return the least and the largest number of converged eigenvalues in (above, below]."""
        known, error = self.nodes[self.converged], self.residuals[self.converged] + self.rounding
        inside = (known - error > above) & (known + error <= below)
        # A node at zero within rounding is not below minus the rounding, though its lower end is there.
        touching = inside | ((known + error > above) & (known - error < below))
        return int(np.count_nonzero(inside)), int(np.count_nonzero(touching))

    def rest_share_between(self, above: float, below: float) -> tuple[float, float]:
        """Bound the share of the rest of the start vector in eigenvectors with eigenvalues in (above, below]."""
        low_above, high_above = self.rest_share_below(above)
        low_below, high_below = self.rest_share_below(below)
        return max(low_below - high_above, 0.0), max(high_below - low_above, 0.0)

    def rest_share_below(self, threshold: float) -> tuple[float, float]:
        """Bound the share of the rest of the start vector in eigenvectors with eigenvalues up to a threshold."""
        if math.isinf(threshold):
            return (1.0, 1.0) if threshold > 0 else (0.0, 0.0)
        rest = np.flatnonzero(~self.converged)
        nodes, weights, residuals = self.nodes[rest], self.weights[rest], self.residuals[rest]
        total = float(weights.sum())
        if total < MIN_SHARE:
            return 0.0, 1.0
        size = max(float(np.abs(nodes).max()), abs(threshold)) or 1.0
        gaps, couplings = (nodes - threshold) / size, residuals / size
        others = np.abs(gaps) > MIN_GAP
        gaps, free = gaps[others], couplings[others]
        if couplings[~others].any():
            nearest = nodes[np.argmin(np.abs(nodes - threshold))]
            below, up_to = float(weights[nodes < nearest].sum()), float(weights[nodes <= nearest].sum())
        else:
            # The rule is that of T in the basis of its Ritz vectors, without those that have converged, with one more
            # row that makes the threshold an eigenvalue. First times last components of Ritz vectors alternate in sign.
            start: Array = np.where(rest % 2, -1.0, 1.0)[others] * np.sqrt(weights[others])
            at = float(start @ (free / gaps)) ** 2 / (1 + float((free / gaps) @ (free / gaps)))
            below = max((float(start @ start) - at - _sign(gaps, free, start)) / 2, 0.0)
            up_to = below + at + float(weights[~others].sum())  # T itself may have that node, too
        return min(below / total, 1.0), min(up_to / total, 1.0)


STEP = 0.3
"""Step of the integral in `_sign`: exp(−π²/step) is rounding."""

SCALES = np.exp(np.arange(math.log(1e-32), math.log(1e14), STEP))
"""Places of that integral, relative to the largest node; it is rounding beyond them."""


def _sign(gaps: Array, couplings: Array, start: Array) -> float:
    """Return vᵀ sign(A) v: the share of a vector in eigenvectors of positive eigenvalues minus that of negative ones.

    A has the diagonal `gaps`, one more row and column, `couplings`, and in their corner Σ couplings²/gaps, so that zero
    is an eigenvalue; v is `start`, and zero in the last place. All three have the shape (nodes,).

    sign(A) is (2/π) ∫ Re (A + is)⁻¹ ds over positive s, with a closed form of the inverse. In log s the integrand is
    analytic in a strip of width π around the real axis, and the error of equal steps decreases exponentially with their
    number: 1e-14 of |v|², at any distance of the threshold from the nodes. Eigenvectors would take several times as
    long, and lose half of the digits near nodes.
    """
    inverse = 1 / (gaps**2 + SCALES[:, None] ** 2)
    sums = inverse @ np.stack(
        [start**2 * gaps, start * couplings * gaps, start * couplings, couplings**2, couplings**2 / gaps], axis=1
    )
    own, real, imaginary, schur_real, schur_imaginary = sums.T
    schur = 1j * SCALES * (1 + schur_real - 1j * SCALES * schur_imaginary)
    integrand = own + ((real - 1j * SCALES * imaginary) ** 2 / schur).real
    return 2 / math.pi * STEP * float(integrand @ SCALES)


def rules(
    nodes: Array, weights: Array, residuals: Array, converged: Mask, *, dimension: int, rounding: float
) -> list[Rule]:
    """Return the rules of all probes; arguments as for `deflation.converged_nodes`."""
    return [
        Rule(theta[:steps], tau[:steps], residual[:steps], known[:steps], dimension, rounding)
        for theta, tau, residual, known in zip(nodes, weights, residuals, converged, strict=True)
        for steps in [int(np.count_nonzero(~np.isnan(theta)))]
    ]


def count_between(rules: list[Rule], above: float, below: float, failure: float) -> tuple[int, int]:
    """Bound the number of eigenvalues in (above, below]; thresholds may be infinite.

    Args:
        rules: Quadrature rule of each probe.
        above: Lower threshold.
        below: Upper threshold.
        failure: Probability, over the start vectors, that the number is not within the bounds.
    """
    bounds = [_count_between(rule, above, below, failure / (2 * len(rules))) for rule in rules]
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    return min(low, high), max(low, high)  # crossed bounds are a failure that shows


def _count_between(rule: Rule, above: float, below: float, failure: float) -> tuple[int, int]:
    known_low, known_high = rule.known_between(above, below)
    least, most = rule.rest_share_between(above, below)
    low, high = rest_counts(np.array([least]), np.array([most]), rule.rest, failure)
    return known_low + int(low[0]), known_high + int(high[0])


def rest_counts(low: Array, high: Array, dimension: int, failure: float) -> tuple[Array, Array]:
    """Bound the number k of eigenvectors that hold a share of a vector uniform on the sphere.

    Args:
        low: Least share, shape (thresholds,).
        high: Largest share, shape (thresholds,).
        dimension: Dimension n of the sphere's space.
        failure: Probability that k is below the lower bounds, and the same for the upper ones.

    Returns:
        Integers, each of shape (thresholds,).
    """
    if dimension == 0:
        return np.zeros_like(low), np.zeros_like(high)
    allowed = -2 * math.log(failure) / dimension
    ends = np.array([np.zeros_like(low), np.ones_like(high)])
    least, most = dimension * _farthest(np.array([low, high]), ends, allowed)
    least, most = np.ceil(least - 1e-9), np.floor(most + 1e-9)
    # A share that is more than rounding takes an eigenvector, and so does what is missing to 1.
    least = np.select([low <= MIN_SHARE, low >= 1 - MIN_SHARE], [0, dimension], np.clip(least, 1, dimension))
    most = np.select([high <= MIN_SHARE, high >= 1 - MIN_SHARE], [0, dimension], np.clip(most, 0, dimension - 1))
    return least, most


def _farthest(share: Array, end: Array, allowed: float) -> Array:
    """Return the p between a share and an end, farthest from the share, whose KL(p ‖ share) is allowed."""
    near, width = share, end - share
    # Bisection three steps at a time takes a third as long for few shares, where calls cost more than the logarithms.
    places = np.arange(1, 8).reshape(-1, *np.ones_like(share.shape))
    for _ in range(20):
        width = width / 8
        inside = _divergence(near + places * width, share) <= allowed
        near = near + np.count_nonzero(inside, axis=0) * width
    return np.where(_divergence(end, share) <= allowed, end, near)


def _divergence(p: Array, q: Array) -> Array:
    """Return the Kullback-Leibler divergence of Bernoulli distributions with probabilities p and q."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ones = np.where(p > 0, p * np.log(p / q), 0.0)
        zeros = np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
    return ones + zeros


def cumulative_band(rules: list[Rule], low_end: float, high_end: float, failure: float) -> tuple[Array, Array, Array]:
    """Return a band that the whole cumulative distribution of the eigenvalues is within.

    Args:
        rules: Quadrature rule of each probe.
        low_end: Bound that no eigenvalue is below.
        high_end: Bound that no eigenvalue is above.
        failure: Probability, over the start vectors, that the distribution leaves the band anywhere.

    Returns:
        points: Thresholds, ascending, from `low_end` to `high_end`, shape (points,).
        low: Least share of eigenvalues up to each point, shape (points,); it holds until the next point.
        high: Largest share of eigenvalues below the next point, shape (points,).
    """
    points = np.unique(np.concatenate([[low_end, high_end], *(rule.thresholds for rule in rules)]))
    points = points[(low_end <= points) & (points <= high_end)]
    low, high = np.zeros(len(points)), np.ones(len(points))
    for rule in rules:
        # The points depend on the start vector, so the bounds must hold for every number k at once.
        each = failure / (2 * len(rules) * max(rule.rest, 1))
        # Bounds at the other rules' thresholds would take a Gauss-Radau rule each, and hardly be tighter.
        own = np.intersect1d(points, [low_end, high_end, *rule.thresholds])
        known = np.array([rule.known_between(-math.inf, point) for point in own])
        share_low, share_high = np.array([rule.rest_share_below(point) for point in own]).T
        least, most = rest_counts(share_low, share_high, rule.rest, each)
        least = np.maximum.accumulate((known[:, 0] + least) / rule.dimension)
        most = np.minimum.accumulate(((known[:, 1] + most) / rule.dimension)[::-1])[::-1]
        low = np.maximum(low, np.append(0.0, least)[np.searchsorted(own, points, side="right")])
        high = np.minimum(high, np.append(most, 1.0)[np.searchsorted(own, points, side="left")])
    low[-1], high[-1] = 1.0, 1.0
    low = np.maximum.accumulate(low)
    high = np.minimum.accumulate(high[::-1])[::-1]
    # Between two points the distribution is at least that of the left one and at most that of the right one.
    return points, low, np.maximum(np.append(high[1:], 1.0), low)
