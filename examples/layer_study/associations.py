"""Rank correlations of indicators with outcomes, with intervals and corrected p-values.

All arrays end with the axes (data sets, seeds, configurations). Networks are ranked only within a *stratum*, the
networks of one data set and seed, so differences between data sets or splits do not appear as effects. Correlations are
averaged over the seeds of a data set, then over the data sets.

Only the configuration is random. The runs of one configuration are not independent evidence, so bootstrap and
permutations move a configuration with all its runs: all strata use the same draw.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    View = Callable[[Array, Sequence[Array]], Array]  # of values, and of directions that are left out

RESAMPLES, PERMUTATIONS = 1000, 5000
CONFIDENCE = 0.95
ROUNDING = 1e-9
NO_SPREAD = 1e-6
"""A vector of ranks, or of their residuals, that is shorter than this counts as constant."""


@dataclass(frozen=True)
class Association:
    """Correlation of one indicator with one outcome.

    Attributes:
        by_dataset: Mean over seeds, shape (data sets,); NaN where an indicator or the outcome does not vary.
        mean: Mean over data sets.
        low: Lower end of the bootstrap interval of the mean.
        high: Upper end of this interval.
        p: p-value of the hypothesis that no indicator is correlated with the outcome, corrected for the number of
            indicators; NaN where this is not tested.
    """

    by_dataset: Array
    mean: float
    low: float
    high: float
    p: float


# Views: unit vectors whose products are correlations ------------------------------------------------------------------


def plain(values: Array, _directions: Sequence[Array] = ()) -> Array:
    """Return standardized ranks: their products are Spearman's correlation."""
    return _unit(_ranks(values))


def given(values: Array, directions: Sequence[Array]) -> Array:
    """Return the residuals of the ranks after regression on those of the controls: partial correlation."""
    return without(_ranks(values), directions)


def of_controls(controls: Sequence[Array]) -> list[Array]:
    """Return an orthonormal basis of the ranks of the controls."""
    directions: list[Array] = []
    for control in controls:
        directions.append(np.nan_to_num(without(_ranks(control), directions)))  # a constant one changes nothing
    return directions


def within(values: Array, _directions: Sequence[Array] = ()) -> Array:
    """Return the ranks without the mean of each configuration: equal architectures.

    The remaining differences come from initialization, order of samples, and how a split suits a configuration.
    """
    ranks = _ranks(values)
    rest = _unit(ranks - ranks.mean(axis=-2, keepdims=True), axes=(-2, -1))
    return rest * float(np.sqrt(values.shape[-2]))  # the mean over seeds is taken of the products


def without(centered: Array, directions: Sequence[Array]) -> Array:
    """Return the component orthogonal to the directions, scaled to length 1."""
    rest = _unit(centered)
    for direction in directions:
        rest = rest - (rest * direction).sum(axis=-1, keepdims=True) * direction
    return _unit(rest)


def _ranks(values: Array) -> Array:
    """Return centered ranks within each stratum; all are NaN if one is."""
    ranks = rankdata(values, axis=-1, nan_policy="propagate")
    centered: Array = ranks - ranks.mean(axis=-1, keepdims=True)
    return centered


def _unit(centered: Array, axes: int | tuple[int, ...] = -1) -> Array:
    """Scale to length 1; NaN where there is no spread."""
    length = np.sqrt(np.square(centered).sum(axis=axes, keepdims=True))
    unit: Array = centered / np.where(length > NO_SPREAD, length, np.nan)
    return unit


# Estimates ------------------------------------------------------------------------------------------------------------


def by_dataset(x: Array, y: Array) -> Array:
    """Return correlations of two views, mean over seeds, shape (..., data sets)."""
    return _mean((x * y).sum(axis=-1))


def associations(
    indicators: Array, outcome: Array, view: View, controls: Sequence[Array] = (), *, test: bool = True, seed: int = 0
) -> list[Association]:
    """Return the association of each indicator with the outcome.

    Args:
        indicators: Shape (indicators, data sets, seeds, configurations).
        outcome: Shape (data sets, seeds, configurations), as the controls.
        view: Transforms values to the vectors whose products are correlations.
        controls: Quantities to hold constant, for the view `given`.
        test: Whether to compute p-values; the view `within` has none, because it leaves no differences to permute.
        seed: Seed of bootstrap and permutations.
    """
    directions = of_controls(controls)
    x, y = view(indicators, directions), view(outcome, directions)
    observed = by_dataset(x, y)
    generator = np.random.default_rng(seed)
    count = outcome.shape[-1]
    draws = generator.integers(count, size=(RESAMPLES, count))
    drawn_directions = of_controls([_drawn(control, draws) for control in controls])
    drawn_y = view(_drawn(outcome, draws), drawn_directions)
    tails = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    intervals = [
        _percentiles(_mean(by_dataset(view(_drawn(values, draws), drawn_directions), drawn_y)), tails)
        for values in indicators
    ]
    p = corrected_p(x, y, directions, generator) if test else np.full(len(indicators), np.nan)
    return [
        Association(row, float(mean), low, high, float(value))
        for row, mean, (low, high), value in zip(observed, _mean(observed), intervals, p, strict=True)
    ]


def corrected_p(x: Array, y: Array, directions: Sequence[Array], generator: np.random.Generator) -> Array:
    """Return p-values corrected for the number of indicators: Westfall & Young's (1993) single-step max-T.

    A permutation gives every configuration the outcomes of another one, for all its runs, stratum by stratum. The
    p-value is the share of permutations in which the strongest of all mean correlations is at least as strong as this
    one. Unlike Holm's correction it stays powerful if indicators are correlated. Directions that were projected out are
    projected out again after permuting (Freedman & Lane 1983); without this, large correlations would be too rare.
    """
    orders = np.argsort(generator.random((PERMUTATIONS, y.shape[-1])), axis=-1)
    permuted = without(_drawn(y, orders), directions)
    strength = np.abs([_mean(by_dataset(row, permuted)) for row in x])
    observed = np.abs(_mean(by_dataset(x, y)))
    strongest = np.where(np.isnan(strength), 0, strength).max(axis=0)
    exceeded = (strongest >= observed[:, None] - ROUNDING).sum(axis=-1)
    return np.where(np.isnan(observed), np.nan, (1 + exceeded) / (1 + PERMUTATIONS))


def _drawn(values: Array, draws: NDArray[np.int64]) -> Array:
    """Return the values of the configurations drawn, shape (draws, data sets, seeds, configurations)."""
    return np.moveaxis(values[..., draws], -2, 0)


def _percentiles(values: Array, tails: tuple[float, float]) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    low, high = np.percentile(defined, tails) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)


def _mean(values: Array, axis: int = -1) -> Array:
    """Return the mean of the defined values; NaN if there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice", category=RuntimeWarning)
        mean: Array = np.nanmean(values, axis=axis)
    return mean
