"""When to check the accuracy of a Lanczos run, and what it must fulfill: most checks end with a cheap test."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from lightning_hesd.numerics.krylov.ritz import extreme_ritz_values
from lightning_hesd.spectra import criteria
from lightning_hesd.spectra.eigenvalue_bounds import log_excess
from lightning_hesd.spectra.spectrum import MIN_SCALE, SHARE_OF_SAMPLING_ERROR

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd.numerics.krylov.lanczos import Lanczos

COARSE = 0.2
"""Relative accuracy of C_t at which the extreme Ritz vectors are good enough for the sampling error."""


class Pace(NamedTuple):
    """How soon one check follows another.

    Attributes:
        least: Least share of the steps so far between two checks.
        most: Largest share.
        forecast: Share of the steps that the run is forecast to need, after which it is checked again.
    """

    least: float
    most: float
    forecast: float


FOR_C_T = Pace(0.03, 1 / 6, 0.5)
"""A test takes a tenth of the time of a product on tiny networks. Of 33 runs on 17 spectra one ended two steps late."""

FOR_DENSITY = Pace(0.2, 0.5, 0.7)
"""The density's error takes a hundred times longer."""


class CheckSchedule:
    """The numbers of steps after which a Lanczos run is checked."""

    def __init__(self) -> None:
        self._next = 0
        self._last = (0, math.inf)  # number of steps, and excess

    def is_due(self, steps: int) -> bool:
        """Whether to check after so many steps."""
        return steps >= self._next

    def after(self, steps: int, excess: float, pace: Pace) -> None:
        """Schedule the next check.

        Args:
            steps: Number of steps so far.
            excess: Distance from the goal, on a scale on which it falls evenly; at most 0 if it is reached.
            pace: How soon the next check may follow.
        """
        before, self._last = self._last, (steps, excess)
        pause = pace.least * steps
        if before[0] < steps and math.inf > before[1] > excess > 0:
            forecast = pace.forecast * excess * (steps - before[0]) / (before[1] - excess)
            pause = max(pause, min(forecast, pace.most * steps))
        self._next = steps + int(pause)


def c_t_excess(
    run: Lanczos,
    tolerance: float | Literal["type", "auto"],
    sampling_error: float | None,
    rounding_of: Callable[[float], float],
    *,
    dimension: int,
    confidence: float,
) -> float:
    """Return how far the interval of C_t is from as narrow as the tolerance asks: certainly not so if positive.

    It takes a fifth of the time of the interval itself. The excess is that of `eigenvalue_bounds.log_excess`.

    Args:
        run: The Lanczos run.
        tolerance: Accuracy of C_t, as in `AnalysisOptions`.
        sampling_error: Sampling error of C_t, which "auto" refers to; None: not estimated.
        rounding_of: Function from the norm of T to the rounding of the eigenvalues.
        dimension: Size n of the matrix.
        confidence: Probability with which the interval holds.
    """
    low, high = extreme_ritz_values(run.alphas, run.betas)
    rounding = rounding_of(max(-low, high))
    wanted = _widest_interval(criteria.c_t(low, high, rounding), tolerance, sampling_error)
    limits = criteria.extremes_within(wanted, low, high, rounding)
    return log_excess(run.alphas, run.betas, limits, dimension, (1 - confidence) / 2)


def _widest_interval(
    c_t: float, tolerance: float | Literal["type", "auto"], sampling_error: float | None
) -> tuple[float, float]:
    """Return the ends of the widest interval of C_t that a tolerance allows; with "auto" first a coarse one."""
    if tolerance == "type":
        threshold = criteria.MP_THRESHOLD
        return (threshold, math.inf) if c_t > threshold else (-math.inf, threshold)
    error = (COARSE if tolerance == "auto" else tolerance) * max(abs(c_t), MIN_SCALE)
    if tolerance == "auto" and sampling_error is not None:
        error = SHARE_OF_SAMPLING_ERROR * sampling_error
    return c_t - error, c_t + error
