"""Criteria of Gabdullin (2025, arXiv:2504.17618): every sign convention and every edge case lives here.

Arrays and plain numbers only. Eigenvalues are curvatures (loss units per squared parameter unit).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HesdType = Literal["MP", "MN"]

MP_THRESHOLD = -0.6
"""C_t above which a trained network counts as mainly positive (eq. 2)."""

UNTRAINED_C_T = (-1.0, -0.73)
"""C_t of random initializations: about -1, because their spectra are symmetric, but up to -0.73 for ResNet18 in
evaluation mode (section 2.2). The type is meaningless for such networks."""

DELTA_R_E_THRESHOLD = 1.5
DELTA_K_H05_THRESHOLD = 1.2
"""Below both of these a network generalizes well (eqs. 3 and 4)."""

QS_FACTOR = 10.0
"""Fall of λ_max at unchanged training metric from which on a spectrum counts as quasi-singular. The paper gives no
number."""

ROUNDING_UNITS = 16.0
ROUNDING_UNITS_PER_ROOT_N = 0.05


def rounding_threshold(norm: float, epsilon: float, dimension: int) -> float:
    """Return the absolute size below which an eigenvalue cannot be told from zero.

    Measured in float32 on positive semidefinite Hessians, where every negative eigenvalue is rounding, and against
    float64 on small networks, eigenvalues are off by up to 3 epsilons of the norm for n up to 10,000; then the sums
    over n elements begin to tell: 3.8 at n = 100,000 and 11.6 at n = 800,000. This leaves a factor of four or more.

    Args:
        norm: Spectral norm of the matrix.
        epsilon: Machine epsilon of the arithmetic behind the matrix-vector products.
        dimension: Size n of the matrix.
    """
    return max(ROUNDING_UNITS, ROUNDING_UNITS_PER_ROOT_N * math.sqrt(dimension)) * epsilon * norm


def undefined_reason(
    norm: float, loss: float, squared_weight_norm: float, epsilon: float, rounding: float = 0.0
) -> str | None:
    """Return the reason why C_t is undefined; None where it is defined.

    A second-order change of the loss is at most norm/2 times the squared length of the step. If even a step as long
    as the weights themselves (or of unit length, if they are shorter) changes the loss by less than the loss is
    rounded to, the spectrum holds rounding only.

    Args:
        norm: Spectral norm of the Hessian.
        loss: Mean loss at these weights.
        squared_weight_norm: Squared Euclidean norm of the analyzed weights.
        epsilon: Machine epsilon of the arithmetic behind the loss.
        rounding: Error of the eigenvalues.
    """
    floor = epsilon * abs(loss) / max(1.0, squared_weight_norm)
    if norm > max(floor, rounding):
        return None
    if norm > floor:
        return (
            f"no eigenvalue is known: the largest that was found is {norm:.3g} in size, and the error of the products "
            f"is {rounding:.3g}. Is the loss at a kink, or noisy?"
        )
    return (
        f"no curvature: the largest |eigenvalue| is {norm:.3g}, which does not exceed the rounding of the loss "
        f"({floor:.3g}); is the loss linear in these parameters, or do they not take part in it?"
    )


def c_t(lambda_min: float, lambda_max: float, rounding: float = 0.0) -> float:
    """Return C_t = min(negative eigenvalues) / max(positive eigenvalues), at most 0 (eq. 1).

    Args:
        lambda_min: Smallest eigenvalue.
        lambda_max: Largest eigenvalue.
        rounding: Eigenvalues within `rounding` of zero count as neither negative nor positive.

    Returns:
        The ratio; 0 without negative eigenvalues, -inf without positive ones, NaN with neither.

    Examples:
        >>> c_t(-1.0, 4.0)
        -0.25
        >>> c_t(0.5, 4.0), c_t(-1.0, -0.5)
        (0.0, -inf)
    """
    negative = lambda_min < -rounding
    positive = lambda_max > rounding
    if negative and positive:
        return lambda_min / lambda_max
    if positive:
        return 0.0
    return -math.inf if negative else math.nan


def c_t_interval(
    lambda_min: float, lambda_max: float, error_min: float, error_max: float, rounding: float
) -> tuple[float, float]:
    """Return the (low, high) values that C_t can take given the residual bounds of both extremes.

    Ritz values lie inside the spectrum, so the true extremes lie outward, by at most the residual if these Ritz
    values approximate the outermost eigenvalues; inward only rounding is possible. C_t grows with both extremes,
    hence its ends belong to the ends of theirs.

    Args:
        lambda_min: Smallest Ritz value.
        lambda_max: Largest Ritz value.
        error_min: How far below `lambda_min` the smallest eigenvalue may lie.
        error_max: How far above `lambda_max` the largest eigenvalue may lie.
        rounding: Rounding of the eigenvalues, see `rounding_threshold`.
    """
    point = c_t(lambda_min, lambda_max, rounding)
    if math.isnan(point):
        return math.nan, math.nan
    low = c_t(lambda_min - error_min, lambda_max - rounding)
    # A smallest eigenvalue that is positive, or zero within rounding, may have no negative one beside it.
    high = c_t(lambda_min + rounding, lambda_max + error_max)
    return min(low, point), max(high, point)


def extremes_within(
    c_t_limits: tuple[float, float], lambda_min: float, lambda_max: float, rounding: float
) -> tuple[float, float]:
    """Return limits that bounds on all eigenvalues must keep for `c_t_interval` to lie within limits of C_t.

    Args:
        c_t_limits: Lowest and highest C_t, which enclose that of the Ritz values; infinite ones limit nothing.
        lambda_min: Smallest Ritz value.
        lambda_max: Largest Ritz value.
        rounding: Rounding of the eigenvalues, which is on top of the bounds.

    Returns:
        The lowest lower bound and the highest upper bound, infinite where there is no limit.

    Examples:
        >>> extremes_within((-0.3, -0.2), lambda_min=-1.0, lambda_max=4.0, rounding=0.0)
        (-1.2, 5.0)
    """
    low, high = c_t_limits
    if lambda_max <= rounding:
        return -math.inf, math.inf  # C_t is infinite or undefined, and so is the width of its interval
    lowest = low * (lambda_max - rounding) + rounding if math.isfinite(low) else -math.inf
    return lowest, (lambda_min + rounding) / high - rounding if high < 0 else math.inf


def r_e(c_t: float) -> float:
    """Return r_e = -C_t, the criterion of arXiv:2412.10146; 0 where no eigenvalue is negative.

    Examples:
        >>> r_e(-0.25), r_e(0.0)
        (0.25, 0.0)
    """
    return abs(c_t)


def hesd_type(c_t: float, threshold: float = MP_THRESHOLD) -> HesdType:
    """Classify a spectrum as mainly positive ("MP", C_t > threshold) or mainly negative ("MN") (eq. 2).

    The criterion is meant for trained networks: random initialization lies near -1.

    Args:
        c_t: The criterion C_t, at most 0; -inf is allowed.
        threshold: The paper's -0.6, unless you have a reason.

    Raises:
        ValueError: If `c_t` is NaN: an undefined C_t has no type.

    Examples:
        >>> hesd_type(-0.1), hesd_type(-0.6)
        ('MP', 'MN')
    """
    if math.isnan(c_t):
        msg = "`c_t` is NaN, so the HESD type is undefined; `Spectrum.reason` says why."
        raise ValueError(msg)
    return "MP" if c_t > threshold else "MN"


def type_certain(interval: tuple[float, float], threshold: float = MP_THRESHOLD) -> bool:
    """Whether every C_t in `interval` (low, high) gives the same type; False for an undefined interval."""
    low, high = interval
    return low > threshold or high <= threshold


def k_h(
    nodes: NDArray[np.float64], weights: NDArray[np.float64], n: float = 0.5, rounding: float = 0.0
) -> NDArray[np.float64]:
    """Return K_Hn of each probe, Σ_{θ<0} |θτ|ⁿ / Σ_{θ>0} (θτ)ⁿ (arXiv:2412.10146).

    It depends on the number of quadrature nodes and on the probe: compare values of equal steps and probes only.

    Args:
        nodes: Quadrature nodes θ, shape (probes, steps); NaN pads probes that ended early.
        weights: Quadrature weights τ, shape (probes, steps).
        n: Exponent, positive; 0.5 gives K_H05.
        rounding: Nodes within `rounding` of zero count as neither negative nor positive.

    Returns:
        One value per probe, shape (probes,); NaN where a probe has no positive node.

    Raises:
        ValueError: If `n` is not positive.
    """
    if not n > 0:
        msg = f"`n` must be positive, got {n}."
        raise ValueError(msg)
    parts = np.abs(nodes * weights) ** n
    negative = np.where(nodes < -rounding, parts, 0.0).sum(axis=1)
    positive = np.where(nodes > rounding, parts, 0.0).sum(axis=1)
    ratio = np.full(len(nodes), np.nan)
    np.divide(negative, positive, out=ratio, where=positive > 0)
    return ratio


def delta(generalization: float, training: float) -> float:
    """Return Δ, the criterion on generalization data over that on training data (eqs. 3 and 4).

    Args:
        generalization: r_e or K_H05 on the generalization data, at least 0.
        training: The same on the training data.

    Returns:
        The ratio; NaN where `training` is 0 or one of the two is not finite.

    Examples:
        >>> delta(0.3, 0.2), delta(0.3, 0.0)
        (1.4999999999999998, nan)
    """
    defined = training > 0 and math.isfinite(training) and math.isfinite(generalization)
    return generalization / training if defined else math.nan


def delta_interval(generalization: tuple[float, float], training: tuple[float, float]) -> tuple[float, float]:
    """Return the (low, high) that Δ can take if both criteria lie in these intervals; (NaN, NaN) if one is undefined.

    Examples:
        >>> delta_interval((0.2, 0.4), (0.1, 0.2)), delta_interval((0.2, 0.4), (0.0, 0.2))
        ((1.0, 4.0), (1.0, inf))
    """
    low, high = delta(generalization[0], training[1]), delta(generalization[1], training[0])
    return low, math.inf if math.isnan(high) and not math.isnan(low) else high


def quasi_singular(
    lambda_max: Sequence[float], metric: Sequence[float], *, tolerance: float, factor: float = QS_FACTOR
) -> bool:
    """Whether the last of these states is quasi-singular (QS): excessive training shrank its spectrum (section 4.1).

    That is, its largest eigenvalue is that of an earlier state with nearly the same training metric, divided by
    `factor` or more. λ_max and trace then do not measure flatness; C_t is the ratio of two eigenvalues and stays valid.

    Args:
        lambda_max: Largest eigenvalue of each state, in the order of training.
        metric: Training metric of each state.
        tolerance: Metrics count as the same up to this, absolute.
        factor: Positive.

    Examples:
        >>> quasi_singular([5.0, 40.0, 3.0], [0.7, 0.98, 0.99], tolerance=0.02)
        True
    """
    same = np.abs(np.asarray(metric) - metric[-1]) <= tolerance
    peak = float(np.max(np.asarray(lambda_max)[same], initial=-math.inf))
    return peak > 0 and lambda_max[-1] <= peak / factor
