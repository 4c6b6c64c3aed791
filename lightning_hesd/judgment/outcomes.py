"""What the picks of rules and baselines were worth, and how they compare over runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.judgment.candidates import BEST_POSSIBLE, LAST, LOWEST_VALIDATION_LOSS
from lightning_hesd.judgment.metric import NumberFormat
from lightning_hesd.judgment.statistics import PairedComparison, compare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lightning_hesd.judgment.candidates import Candidates, RunPicks
    from lightning_hesd.judgment.metric import Metric

AGAINST = (LAST, LOWEST_VALIDATION_LOSS)
"""The baselines that everything else is compared with."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of all others with one baseline.

    Attributes:
        names: Names of the rules and baselines, in the order of the columns of `statistics`.
        statistics: Their gains over the baseline.
    """

    names: tuple[str, ...]
    statistics: PairedComparison


@dataclass(frozen=True)
class Outcomes:
    """The picks of rules and baselines in runs, and comparisons of what they were worth.

    Attributes:
        metric: The metric by which picks are judged.
        candidates: The candidates of the rules: see `judge`.
        level: Probability that any rule or baseline of a comparison is called better or worse although none is.
        runs: The picks in each run.
        titles: Titles of the rules and baselines that pick in some run, by name, the rules first.
        rules: Names of the rules among them that are no baselines.
        notes: What a reader of the numbers should know, in sentences.
    """

    metric: Metric
    candidates: Candidates
    level: float
    runs: tuple[RunPicks, ...]
    titles: Mapping[str, str]
    rules: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """The metric of the picks in all runs, by name of the rule or baseline; NaN where there is no pick."""
        return {
            name: np.array([run.picks[name].value if name in run.picks else math.nan for run in self.runs])
            for name in self.titles
        }

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Comparisons with the last epoch, and with the lowest validation loss if there is one, by baseline.

        The best possible pick is not compared: it is never worse.
        """
        found = {}
        for against in AGAINST:
            names = tuple(name for name in self.titles if name not in {against, BEST_POSSIBLE})
            if against in self.titles and names:
                gains = np.stack([self.gains(name, against) for name in names], axis=1)
                found[against] = Comparison(names, compare(gains, level=self.level))
        return found

    @cached_property
    def numbers(self) -> NumberFormat:
        """How values of the metric are written."""
        gains = [self.gains(name, against) for name in self.titles for against in self.comparisons]
        means = [float(np.nanmean(gain)) for gain in gains if np.isfinite(gain).any()]
        every = np.concatenate(list(self.values.values()))
        return NumberFormat.of(means, is_share=self.metric.is_share(every.tolist()))

    def gains(self, name: str, against: str) -> NDArray[np.float64]:
        """Return how much better a rule or baseline is than another in each run; NaN where one has no pick."""
        return self.metric.sign * (self.values[name] - self.values[against])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each rule and baseline, with numbers in the unit of the metric; NaN where there is none.

        `kind` is "rule" or "baseline", `runs` the number of runs with a pick, `mean` the mean metric of the picks, and
        `regret` how much better the best possible picks are. `gain_over_last` is the mean gain, positive if
        better, with the ends of its interval, its p-value, the numbers of runs won, tied and lost, and `evidently`:
        "better", "worse" or nothing. The same follows for `lowest_validation_loss`.
        """
        return [self._row(name) for name in self.titles]

    def _row(self, name: str) -> dict[str, Any]:
        values, regrets = self.values[name], self.gains(BEST_POSSIBLE, name)
        row: dict[str, Any] = {
            "name": name,
            "title": self.titles[name],
            "kind": "rule" if name in self.rules else "baseline",
            "runs": int(np.isfinite(values).sum()),
            "mean": float(np.nanmean(values)),
            "regret": float(np.nanmean(regrets)),
        }
        for against, comparison in self.comparisons.items():
            gain = math.nan if name == against else _mean(self.gains(name, against))
            numbers = {"gain": gain, **_comparison(comparison, name)}
            row |= {f"{key}_over_{against}": value for key, value in numbers.items()}
        return row


def _mean(gains: NDArray[np.float64]) -> float:
    """Return the mean of the known gains; NaN if a rule and the baseline never pick in the same run."""
    known = gains[np.isfinite(gains)]
    return float(known.mean()) if known.size else math.nan


def _comparison(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return the numbers of one rule or baseline; NaN and None of what is not compared."""
    if name not in comparison.names:
        numbers = dict.fromkeys(("low", "high", "p_value"), math.nan)
        return {**numbers, "wins": None, "ties": None, "losses": None, "evidently": None}
    column, found = comparison.names.index(name), comparison.statistics
    evidently = "better" if found.better[column] else "worse" if found.worse[column] else ""
    return {
        "low": float(found.low[column]),
        "high": float(found.high[column]),
        "p_value": float(found.p_values[column]),
        "wins": int(found.wins[column]),
        "ties": int(found.ties[column]),
        "losses": int(found.losses[column]),
        "evidently": evidently,
    }
