"""Bounds on the extreme eigenvalues of which Lanczos runs may have fallen short, from their quadrature rules.

Van Dorsselaer, Hochstenbach & van der Vorst (2001); Kuczyński & Woźniakowski (1992). Arrays as in `quadrature`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd.spectra.deflation import Mask
    from lightning_hesd.spectra.quadrature import Array

    Probe = tuple[Array, Array, Array]
    """Nodes, weights and Ritz residuals of one probe, without padding, each of shape (steps,)."""


def spectrum_bounds(
    nodes: Array, weights: Array, residuals: Array, dimension: int, failure: float
) -> tuple[float, float]:
    """Bound the smallest and the largest eigenvalue from outside, each with a given probability of failure.

    Let q be the unit eigenvector of the largest eigenvalue λ, v the start vector and p_0, ..., p_m the orthonormal
    polynomials of the Lanczos run, whose vectors are v_{j+1} = p_j(H)v. Then qᵀv_{j+1} = p_j(λ)·qᵀv, and as these
    vectors are orthonormal, (qᵀv)²·K(λ) ≤ 1 with K = Σ_j p_j². Beyond the largest node K grows without bound, so a λ
    far out means a start vector almost orthogonal to q; and for v uniform on the sphere it is known how improbable
    that is. The λ at which it becomes as improbable as `failure` is the bound: van Dorsselaer, Hochstenbach & van der
    Vorst (SIAM J. Matrix Anal. Appl. 22(3), 2001). The inequality holds for every m with the same qᵀv, so a run
    that is stopped as soon as the bound is good enough fails no more often than one with fixed m.

    Args:
        nodes: Quadrature nodes, shape (probes, steps).
        weights: Quadrature weights, shape (probes, steps).
        residuals: Residual bounds of the nodes, shape (probes, steps).
        dimension: Size n of the matrix.
        failure: Probability that an eigenvalue lies below the lower bound, and the same for the upper one.

    Returns:
        The lower bound, at most the smallest node, and the upper bound, at least the largest.

    Examples:
        >>> from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
        >>> from lightning_hesd.spectra.quadrature import stack_rules
        >>> low, high = spectrum_bounds(*stack_rules([gauss_quadrature([0.0, 0.0], [1.0, 1e-6])]), 100, 0.05)
        >>> -1.0001 < low < -1 and 1 < high < 1.0001
        True
    """
    probes = [
        (theta[:m], tau[:m], r[:m])
        for theta, tau, r in zip(nodes, weights, residuals, strict=True)
        for m in [int(np.count_nonzero(~np.isnan(theta)))]
    ]
    mirrored = [(-theta[::-1], tau[::-1], r[::-1]) for theta, tau, r in probes]
    return -_upper_bound(mirrored, dimension, failure), _upper_bound(probes, dimension, failure)


def log_excess(alphas: Array, betas: Array, limits: tuple[float, float], dimension: int, failure: float) -> float:
    """Return the log of how many times more probable than `failure` an eigenvalue beyond the limits is.

    If positive, `spectrum_bounds` of the run certainly lie beyond the limits; else probably within. It takes the
    kernel K at the limits, by the recurrence of the polynomials p_j, and no search: a tenth of the time.

    Args:
        alphas: Diagonal of T, shape (m,).
        betas: Off-diagonal of T and, last, the norm of the remainder vector, shape (m,).
        limits: The lowest lower bound and the highest upper bound; infinite ones limit nothing.
        dimension: Size n of the matrix.
        failure: As for `spectrum_bounds`.

    Examples:
        >>> round(log_excess(np.array([0.0, 0.0]), np.array([1.0, 1e-6]), (-1.0001, 1.0001), 100, 0.05), 1)
        -0.2
        >>> round(log_excess(np.array([0.0, 0.0]), np.array([1.0, 1e-2]), (-1.0001, 1.0001), 100, 0.05), 1)
        4.7
    """
    log_most = _log_scale(dimension) - math.log(failure)
    pairs = list(zip(alphas.tolist(), betas.tolist(), strict=True))
    mirrored = [(-alpha, beta) for alpha, beta in pairs]
    ends = ((mirrored, -limits[0]), (pairs, limits[1]))
    kernels = [_log_kernel_outside(steps, limit) for steps, limit in ends if math.isfinite(limit)]
    return log_most - min(kernels, default=math.inf) / 2


def _log_kernel_outside(steps: Sequence[tuple[float, float]], point: float) -> float:
    """Return log K at a point x, given α and β of each step; −∞ if it is not above all Ritz values.

    With the pivots d_j = x − α_j − β_{j−1}²/d_{j−1} of x − T, which are positive above all Ritz values, the polynomials
    grow by the ratios p_j/p_{j−1} = d_j/β_j.
    """
    log_last = 0.0  # log p_j²
    in_last = 1.0  # Σ_{i≤j} p_i², in p_j²
    carry = 0.0  # β_{j−1}²/d_{j−1}
    for alpha, beta in steps:
        pivot = point - alpha - carry
        if pivot <= 0:
            return -math.inf
        if beta == 0:
            return math.inf  # the Krylov space is invariant
        square = (pivot / beta) ** 2
        log_last += math.log(square)
        in_last = 1 + in_last / square
        carry = beta**2 / pivot
    return log_last + math.log(in_last)


def rest_bounds(
    nodes: Array, weights: Array, residuals: Array, converged: Mask, *, dimension: int, failure: float
) -> tuple[float, float]:
    """Bound the eigenvalues that are not among the converged nodes of one probe, as `spectrum_bounds` bounds all.

    The kernel K is large between converged nodes outside of the others, so an eigenvalue there is as improbable as one
    beyond all nodes. One that equals a converged node cannot be excluded: those nodes must be simple eigenvalues.

    Args:
        nodes: Quadrature nodes of one probe, shape (steps,).
        weights: Quadrature weights, shape (steps,).
        residuals: Ritz residuals, shape (steps,).
        converged: Nodes that are simple eigenvalues, shape (steps,).
        dimension: Size n of the matrix.
        failure: Probability that another eigenvalue lies below the lower bound, and the same for the upper one.

    Returns:
        The lower and the upper bound; (0, 0) if there is no other eigenvalue.
    """
    if converged.all():
        return 0.0, 0.0
    high = _rest_upper_bound((nodes, weights, residuals), converged, dimension, failure)
    mirrored = (-nodes[::-1], weights[::-1], residuals[::-1])
    return -_rest_upper_bound(mirrored, converged[::-1], dimension, failure), high


def _rest_upper_bound(probe: Probe, converged: Mask, dimension: int, failure: float) -> float:
    theta = probe[0]
    # Where a gap above the last other node is too narrow to exclude an eigenvalue, the next node is its end.
    for origin in range(int(np.flatnonzero(~converged)[-1]), len(theta)):
        room = float(theta[origin + 1] - theta[origin]) / 2 if origin + 1 < len(theta) else math.inf
        bound = _upper_bound([probe], dimension, failure, float(theta[origin]), room)
        if bound < theta[origin] + room:
            return bound
    return float(theta[-1])


def _upper_bound(
    probes: Sequence[Probe], dimension: int, failure: float, origin: float | None = None, room: float = math.inf
) -> float:
    """Return the bound above `origin`, by default the largest node; at most `room` above it."""
    if origin is None:
        origin = max(float(theta[-1]) for theta, _, _ in probes)
    if any(not (tau * r**2 > 0).any() for _, tau, r in probes):
        return origin  # Πβ_j = 0, an invariant Krylov space: almost surely nothing is outside
    kernels = [_log_christoffel(*probe, origin) for probe in probes]
    log_scale = _log_scale(dimension)
    allowed = _log_product_quantile(failure, len(probes))

    def log_probability(log_distance: float) -> float:
        """Log of the probability of start vectors like these if λ lies at this distance beyond the origin."""
        distance = math.exp(log_distance)
        return sum(min(0.0, log_scale - log_kernel(distance) / 2) for log_kernel in kernels)

    size = max(float(np.abs(theta).max()) for theta, _, _ in probes) or max(float(r.max()) for _, _, r in probes)
    low, high = math.log(size) - 50.0, min(math.log(size), math.log(room))
    # A last node of improbably small weight shows that the start vectors are unlucky ones: allow for that.
    allowed += log_probability(low)
    while log_probability(high) > allowed:
        if high >= math.log(room):
            return origin + room
        high = min(high + 2.0, math.log(room))
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if log_probability(middle) > allowed else (low, middle)
    return origin + math.exp(high)


def _log_scale(dimension: int) -> float:
    """Return log s, at least 0, such that P(|qᵀv| ≤ z) ≤ s·z for unit vectors q, and v uniform on the sphere."""
    n = max(dimension, 2)
    # The density of one coordinate on the sphere is largest at zero.
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    return math.log(max(1.0, scale))


def _log_christoffel(theta: Array, tau: Array, residuals: Array, origin: float) -> Callable[[float], float]:
    """Return d -> log K(origin + d), from the rule alone.

    p_m(x) = Π(x − θ_i)/Πβ_j, and by Christoffel and Darboux Πβ_j = √τ_i·r_i·Π_{j≠i}|θ_i − θ_j| for every i, and the
    polynomials below p_m add up to p_m(x)²·Σ r_i²/(x − θ_i)².
    """
    best = int(np.argmax(tau * residuals**2))  # the one that rounding harms least
    rounding = np.finfo(np.float64).eps * np.abs(theta).max()
    others = np.maximum(np.abs(theta[best] - np.delete(theta, best)), rounding)
    log_betas = 0.5 * math.log(tau[best]) + math.log(residuals[best]) + np.log(others).sum()
    gaps = origin - theta  # apart from d, which may be too small to show in origin + d

    def log_kernel(distance: float) -> float:
        distances = np.abs(gaps + distance)
        return 2 * float(np.log(distances).sum() - log_betas) + math.log1p(float(((residuals / distances) ** 2).sum()))

    return log_kernel


@functools.cache
def _log_product_quantile(probability: float, count: int) -> float:
    """Return log q such that the product of `count` uniform random numbers falls below q with that probability.

    Fisher's combination of independent tests: P(Πu ≤ q) = q·Σ_{j<count} (−log q)ʲ/j!.
    """

    def log_probability(log_q: float) -> float:
        logs = [j * math.log(-log_q) - math.lgamma(j + 1) for j in range(count)]  # factorials of many would overflow
        largest = max(logs)
        return log_q + largest + math.log(sum(math.exp(log - largest) for log in logs))

    low, high = math.log(probability), 0.0
    while log_probability(low) > math.log(probability):
        low *= 2
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if log_probability(middle) < math.log(probability) else (low, middle)
    return low


def miss_probability(dimension: int, steps_per_probe: Sequence[int], tolerance: float) -> float:
    """Bound the probability that the extremes of all probes miss a true extreme by more than `tolerance`.

    Kuczyński & Woźniakowski (SIAM J. Matrix Anal. Appl. 13(4), 1992, theorem 4.2): from a start vector uniform on the
    sphere, m steps miss the largest eigenvalue by more than ε(λ_max − λ_min) with probability at most
    1.648·√n·exp(−√ε(2m − 1)). Probes are independent, so their probabilities multiply; both ends add up.

    Args:
        dimension: Size n of the matrix.
        steps_per_probe: Steps m of each probe.
        tolerance: ε, relative to the width of the spectrum.

    Examples:
        >>> miss_probability(100, [100], 0.05)  # as many steps as dimensions: nothing is missed
        0.0
    """
    if max(steps_per_probe) >= dimension:
        return 0.0
    one_end = 1.0
    for steps in steps_per_probe:
        one_end *= min(1.0, 1.648 * math.sqrt(dimension) * math.exp(-math.sqrt(tolerance) * (2 * steps - 1)))
    return min(1.0, 2 * one_end)
