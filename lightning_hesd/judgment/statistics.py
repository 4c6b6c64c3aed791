"""Paired comparisons of several rules with one baseline over runs.

Each rule has a test and an interval, and both hold for all rules together. They rest on different assumptions: the test
is exact if the differences are symmetric about zero where a rule makes no difference; the interval needs no symmetry,
but is approximate. Rules are only called better or worse where both agree.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

LEVEL = 0.05
"""By default, the probability that any of the rules is called better or worse although none is."""

MAX_ENUMERATED_RUNS = 14
"""With up to this many runs all flips of signs are enumerated."""

RESAMPLES = 9999
"""Bootstrap samples; random flips of signs where they are not enumerated."""

SAME = 1e-9
"""Statistics this close to each other, relative to their size, are the same up to rounding."""


@dataclass(frozen=True)
class PairedComparison:
    """Gains of rules over a baseline, a row for each run and a column for each rule.

    Attributes:
        gains: Differences to the baseline, positive where the rule is better, shape (runs, rules); NaN where a rule or
            the baseline has no value.
        low: Lower ends of the simultaneous intervals of the mean gains, shape (rules,); NaN where the data determine
            none.
        high: Their upper ends.
        p_values: Two-sided p-values, corrected for the number of rules, shape (rules,); NaN for a rule without gains.
        level: Probability that any p-value is below it, or any interval misses its mean, although no rule differs.
    """

    gains: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p_values: NDArray[np.float64]
    level: float

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of runs in which each rule has a gain, shape (rules,)."""
        return _count(np.isfinite(self.gains))

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean gains, shape (rules,); NaN for a rule without gains."""
        counts = self.counts
        return np.where(counts > 0, np.nansum(self.gains, axis=0) / np.maximum(counts, 1), math.nan)

    @property
    def wins(self) -> NDArray[np.int64]:
        """Number of runs in which each rule is better than the baseline, shape (rules,)."""
        return _count(self.gains > 0)

    @property
    def ties(self) -> NDArray[np.int64]:
        """Number of runs in which each rule is exactly as good as the baseline, shape (rules,)."""
        return _count(self.gains == 0)

    @property
    def losses(self) -> NDArray[np.int64]:
        """Number of runs in which each rule is worse than the baseline, shape (rules,)."""
        return _count(self.gains < 0)

    @property
    def better(self) -> NDArray[np.bool_]:
        """Which rules are evidently better than the baseline: by their interval and by their p-value."""
        return (self.low > 0) & (self.p_values <= self.level)

    @property
    def worse(self) -> NDArray[np.bool_]:
        """Which rules are evidently worse than the baseline, likewise."""
        return (self.high < 0) & (self.p_values <= self.level)


def _count(marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = marked.sum(axis=0, dtype=np.int64)
    return found


def runs_needed(level: float) -> int:
    """Return the least number R of runs with which a p-value can reach a level: 2^(1 − R) ≤ level.

    Examples:
        >>> runs_needed(0.05), runs_needed(0.01)
        (6, 8)
    """
    return math.ceil(1 - math.log2(level))


def check_level(level: float) -> None:
    """Check a level.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 < level < 0.5:
        msg = f"`level` must be between 0 and 0.5, got {level}."
        raise ValueError(msg)


def compare(gains: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> PairedComparison:
    """Compare rules with a baseline by their gains in independent runs.

    Args:
        gains: Differences to the baseline, positive where the rule is better, shape (runs, rules); NaN: no value.
        level: Probability of an error in any of the p-values or intervals, between 0 and 0.5.
        resamples: Number of bootstrap samples, and of random flips of signs with many runs.
        seed: Seed of the resampling; the same seed gives the same result.

    Raises:
        ValueError: If gains are not a table, if a gain is infinite, or if the level is out of range.
    """
    table = np.asarray(gains, dtype=np.float64)
    if table.ndim != 2 or np.isinf(table).any():
        msg = f"`gains` must be finite or NaN, of shape (runs, rules); got the shape {table.shape}."
        raise ValueError(msg)
    check_level(level)
    generator = np.random.default_rng(seed)
    p_values = sign_flip_p_values(table, resamples, generator)
    low, high = bootstrap_intervals(table, level, resamples, generator)
    return PairedComparison(table, low, high, p_values, level)


# The test -------------------------------------------------------------------------------------------------------------


def sign_flip_p_values(
    gains: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return two-sided p-values of zero mean gains, corrected for the number of rules, shape (rules,).

    If a rule makes no difference, its gain in a run is as likely to have the other sign. So the signs of whole runs are
    flipped, which keeps the dependence between rules, and the largest statistic over all rules is noted each time
    (Westfall & Young 1993). The statistic is |Σ d| / √(Σ d²), a monotone function of Student's t that is at most the
    root of the number of gains: rules that have few gains do not dominate the others.

    Args:
        gains: As for `compare`.
        resamples: Number of random flips with more than `MAX_ENUMERATED_RUNS` runs; else all flips are enumerated.
        generator: Source of random flips.
    """
    known = np.isfinite(gains)
    filled = np.where(known, gains, 0.0)
    sizes = np.sqrt((filled**2).sum(axis=0))
    scaled = filled / np.where(sizes > 0, sizes, 1.0)
    largest = np.abs(_flips(len(gains), resamples, generator) @ scaled).max(axis=1, initial=0.0)
    observed = np.abs(scaled.sum(axis=0))
    p_values: NDArray[np.float64] = (largest[:, None] >= observed * (1 - SAME)).mean(axis=0)
    return np.where(known.any(axis=0), p_values, math.nan)


def _flips(runs: int, resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return flips of signs, shape (flips, runs), the first of which leaves all signs as they are.

    A flip and its opposite give the same statistics, so enumeration leaves the sign of the first run.
    """
    if runs <= MAX_ENUMERATED_RUNS:
        rest = itertools.product((1.0, -1.0), repeat=max(runs - 1, 0))
        return np.array([(1.0, *signs)[:runs] for signs in rest])
    flips = generator.choice((1.0, -1.0), size=(resamples + 1, runs))
    flips[0] = 1.0
    return flips


# The interval ---------------------------------------------------------------------------------------------------------


def bootstrap_intervals(
    gains: NDArray[np.float64], level: float, resamples: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of intervals that contain all mean gains together with probability 1 − `level`.

    Runs are resampled as a whole. Each interval is mean ± c · standard error, with c a quantile of the resampled
    |t| of the rule (Efron 1979: bootstrap-t, here symmetric: Hall 1988). It is the same quantile for every rule, chosen
    so that they hold together (Beran 1988). Where runs hardly ever differ from the baseline, c is infinite, and the
    data determine no interval.

    Args:
        gains: As for `compare`.
        level: As for `compare`.
        resamples: Number of bootstrap samples.
        generator: Source of bootstrap samples.

    Returns:
        Lower and upper ends, of shape (rules,) each; NaN where there is no interval.
    """
    runs, rules = gains.shape
    known = np.isfinite(gains)
    counts = known.sum(axis=0)
    compared = np.flatnonzero(counts >= runs_needed(level))
    low, high = np.full((2, rules), math.nan)
    if len(compared) == 0:
        return low, high
    known = known[:, compared]
    filled = np.where(known, gains[:, compared], 0.0)
    means, errors, _ = _moments(np.ones((1, runs)), filled, known)
    drawn = generator.multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(np.float64)
    resampled_means, resampled_errors, determined = _moments(drawn, filled, known)
    deviations = np.abs(resampled_means - means)
    deviations[deviations <= SAME * np.abs(filled).max(axis=0)] = 0.0
    t = np.where(deviations > 0, math.inf, 0.0)
    np.divide(deviations, resampled_errors, out=t, where=resampled_errors > 0)
    t[~determined] = math.inf
    factors = _simultaneous_quantiles(t, level)
    # Runs that are all exactly as good as the baseline do not say how often others would differ.
    usable = np.isfinite(factors) & ((errors[0] > 0) | (means[0] != 0))
    reach = np.where(usable, factors, math.nan) * errors[0]
    low[compared], high[compared] = means[0] - reach, means[0] + reach
    return low, high


def _moments(
    weights: NDArray[np.float64], values: NDArray[np.float64], known: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return means, standard errors, and whether there are two values at least, shape (samples, rules) each.

    Args:
        weights: How often each sample has each run, shape (samples, runs).
        values: Shape (runs, rules); 0 where they are not known.
        known: Shape (runs, rules).
    """
    counts = weights @ known
    at_least_one = np.maximum(counts, 1.0)
    means = weights @ values / at_least_one
    # About a center: squares of values far from zero would cancel.
    center = values.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    centered = np.where(known, values - center, 0.0)
    squares = weights @ centered**2 / at_least_one - (weights @ centered / at_least_one) ** 2
    rounding = SAME * (centered**2).max(axis=0, initial=0.0)
    variances = np.where(squares > rounding, squares, 0.0)
    return means, np.sqrt(variances / np.maximum(counts - 1, 1.0)), counts >= 2


def _simultaneous_quantiles(t: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Return a bound for each rule, so that a share of at most `level` of the samples exceeds any of them.

    Args:
        t: Statistics of the samples, shape (samples, rules); may be infinite.
        level: The share.
    """
    samples = len(t)
    ordered = np.sort(t, axis=0)
    # How many samples have a statistic at least as large: one-sided p-values, times the number of samples.
    exceeding = np.stack(
        [samples - np.searchsorted(column, values, side="left") for column, values in zip(ordered.T, t.T, strict=True)],
        axis=1,
    )
    rarest = np.sort(exceeding.min(axis=1))
    allowed = int(rarest[math.floor(level * samples)]) - 1
    bounds: NDArray[np.float64] = ordered[samples - 1 - allowed]
    return bounds
