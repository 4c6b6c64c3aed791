"""Trends over a sweep with intervals over seeds, and the rules that judge them, which were fixed in advance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from examples.shared import AGREES, DIFFERS, UNSEEN
from lightning_hesd.spectra.intervals import student_quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from examples.shared import Verdict

    Array = NDArray[np.float64]

CONFIDENCE = 0.95
STRAIGHT = 0.9
"""Minimum coefficient of determination R² of a line that fits."""


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval; NaN with fewer than two values."""

    mean: float
    low: float
    high: float

    def shown(self, form: str = "+.2g") -> str:
        if math.isnan(self.mean):
            return "undefined"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def factor(self) -> str:
        """Return the interval of a logarithm as that of the factor."""
        return Interval(*map(math.exp, self)).shown("#.3g")


class Trend(NamedTuple):
    """The trend of the logarithm of a quantity over a sweep.

    Attributes:
        slope: Slope by least squares for each seed.
        change: Last value minus first.
        straightness: R² of a line through the means over seeds.
    """

    slope: Interval
    change: Interval
    straightness: float


def student(values: ArrayLike) -> Interval:
    """Return the mean of independent values with Student's interval; values that are not finite are left out."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if len(found) < 2:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(found.mean())
    half = student_quantile(CONFIDENCE, len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Interval(mean, mean - half, mean + half)


def logarithm(values: ArrayLike) -> Array:
    """Return logarithms; NaN for 0, which networks with only dead units have."""
    found = np.asarray(values, dtype=float)
    return np.log(np.where(found > 0, found, np.nan))


def trend(values: Array, abscissa: Sequence[float]) -> Trend:
    """Return the trend of positive values, shape (seeds, sizes), over an abscissa, shape (sizes,)."""
    logs, x = logarithm(values), np.asarray(abscissa, dtype=float)
    slopes = [
        np.polyfit(x[there], row[there], 1)[0] if (there := np.isfinite(row)).sum() > 1 else math.nan for row in logs
    ]
    means = np.array([student(column).mean for column in logs.T])
    there = np.isfinite(means)
    with np.errstate(invalid="ignore"):  # a constant has none
        straightness = float(np.corrcoef(x[there], means[there])[0, 1] ** 2) if there.sum() > 1 else math.nan
    return Trend(student(slopes), student(logs[:, -1] - logs[:, 0]), straightness)


def rank_correlation(first: Array, second: Array) -> float:
    """Return Spearman's correlation of values without ties; NaN if there are fewer than three."""
    ranks = [values.argsort().argsort().astype(float) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(first) > 2 else math.nan


RULE = "agrees if the 95 % interval of {of} lies {region}{all}, differs if it lies outside{one}"


class Region(NamedTuple):
    """The region in which a number must lie for a statement to hold."""

    low: float
    high: float
    words: str

    def judge(self, found: Sequence[Interval]) -> Verdict:
        """Judge the claim that all numbers lie in the region, by their intervals."""
        if any(one.high < self.low or one.low > self.high for one in found):
            return DIFFERS
        return AGREES if found and all(self.low < one.low <= one.high < self.high for one in found) else UNSEEN


POSITIVE = Region(0, math.inf, "above 0")
NEGATIVE = Region(-math.inf, 0, "below 0")
SLIGHT = Region(-math.log(2), math.log(2), "between 1/2 and 2")
"""Region of logarithms of factors; the paper gives no number, this one is ours."""
INVERSE = Region(-1.1, -0.9, "within -1 ± 0.1")
INVERSE_SQUARE = Region(-2.2, -1.8, "within -2 ± 0.2")
EQUAL = Region(-0.05, 0.05, "within ± 5 %")
BELOW_ONE = Region(-math.inf, 1, "below 1")
AT_LEAST_ONE = Region(1 - 1e-9, math.inf, "at or above 1")


def judge_growth(found: Trend) -> Verdict:
    """Judge the claim that a logarithm grows linearly."""
    verdict = POSITIVE.judge([found.slope])
    return UNSEEN if verdict == AGREES and not found.straightness >= STRAIGHT else verdict


def judge_same(first: Interval, second: Interval) -> Verdict:
    """Judge the claim that two slopes have the same sign."""
    signs = {POSITIVE.judge([slope]) for slope in (first, second)}
    return UNSEEN if UNSEEN in signs else AGREES if len(signs) == 1 else DIFFERS
