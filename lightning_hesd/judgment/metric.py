"""The metric by which picks are judged: its values in the states of a run, and how its numbers are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning_hesd.spectra.analyzed_state import AnalyzedState

LOWER_IS_BETTER = {"loss", "error", "err", "perplexity", "ppl", "nll", "mse", "rmse", "mae"}
"""Words in the name of a metric of which lower values are better."""

SHARES = {"acc", "accuracy", "f1", "precision", "recall", "auroc", "iou", "miou", "dice"}
"""Words in the name of a metric that is a share: values in [0, 1] are written as percentage points."""

VALIDATION = {"val", "valid", "validation", "dev"}
"""Words in the name of a metric on validation data."""

MAX_DECIMALS = 6

LARGEST = 1e100
"""Values beyond count as infinite: sums and squares of such values would overflow."""


@dataclass(frozen=True)
class Metric:
    """A metric by which weights are judged.

    Attributes:
        name: Key under which it was logged, or name of its column.
        mode: "max" if a higher value is better, else "min".
    """

    name: str
    mode: Literal["max", "min"]

    @classmethod
    def of(cls, name: str, mode: str | None) -> Metric:
        """Return a metric; without a mode, lower is better if the name says loss or error.

        Raises:
            ValueError: If the mode is unknown.

        Examples:
            >>> Metric.of("val_acc", None).mode, Metric.of("test/loss", None).mode
            ('max', 'min')
        """
        if mode is None:
            mode = "min" if words(name) & LOWER_IS_BETTER else "max"
        if mode not in {"max", "min"}:
            msg = f"`mode` must be 'max' or 'min', got {mode!r}."
            raise ValueError(msg)
        return cls(name, "max" if mode == "max" else "min")

    @property
    def sign(self) -> float:
        """The sign that makes higher values better."""
        return 1.0 if self.mode == "max" else -1.0

    @property
    def better(self) -> str:
        """Which values are better, in words."""
        return "higher is better" if self.mode == "max" else "lower is better"

    def is_share(self, values: Iterable[float]) -> bool:
        """Return whether values are shares of 1, both by the name of the metric and by their range."""
        return bool(words(self.name) & SHARES) and all(0 <= value <= 1 for value in values if not math.isnan(value))


def words(name: str) -> set[str]:
    """Return the words of the name of a metric, in lower case.

    Examples:
        >>> sorted(words("valLoss/epoch_mean"))
        ['epoch', 'loss', 'mean', 'val']
    """
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return set(re.findall(r"[a-z0-9]+", separated))


def logged_names(states: Iterable[AnalyzedState]) -> list[str]:
    """Return the names of all metrics of these states, in alphabetical order."""
    return sorted({name for state in states for name in state.metrics})


def logged_values(states: Iterable[AnalyzedState], name: str) -> list[float]:
    """Return the values of a metric; NaN where it is absent or infinite."""
    return [finite_or_nan(float(state.metrics.get(name, math.nan))) for state in states]


def finite_or_nan(value: float) -> float:
    """Return a value; NaN if its size is infinite or above `LARGEST`."""
    return value if abs(value) <= LARGEST else math.nan


@dataclass(frozen=True)
class NumberFormat:
    """How values of a metric, and differences between them, are written.

    Attributes:
        factor: By which they are multiplied.
        decimals: How many decimals they have.
        unit: Behind the number, with a space before it; empty: the metric's own unit.
    """

    factor: float
    decimals: int
    unit: str

    @classmethod
    def of(cls, differences: Sequence[float], *, is_share: bool) -> NumberFormat:
        """Return a format that gives the largest of some differences two digits."""
        factor, unit = (100.0, " points") if is_share else (1.0, "")
        largest = max((abs(factor * value) for value in differences if math.isfinite(value)), default=0.0)
        decimals = 1 - math.floor(math.log10(largest)) if largest > 0 else 1
        return cls(factor, min(max(decimals, int(is_share)), MAX_DECIMALS), unit)

    def value(self, value: float) -> str:
        """Return a value; an empty text for NaN."""
        return "" if math.isnan(value) else f"{self._rounded(value, self.decimals):.{self.decimals}f}"

    def difference(self, value: float) -> str:
        """Return a difference with its sign, with more decimals if it would seem to be none; an empty text for NaN."""
        return "" if math.isnan(value) else self._signed(value, self._decimals_of(value))

    def interval(self, low: float, high: float) -> str:
        """Return an interval of differences, with more decimals if it would seem to contain zero but does not.

        An empty text if there is none.
        """
        if math.isnan(low):
            return ""
        excludes_zero = low > 0 or high < 0
        decimals = self._decimals_of(min(abs(low), abs(high))) if excludes_zero else self.decimals
        return f"[{self._signed(low, decimals)}, {self._signed(high, decimals)}]"

    def _decimals_of(self, value: float) -> int:
        """Return how many decimals show that a value is not zero; the usual number if none do."""
        more = range(self.decimals, MAX_DECIMALS + 1)
        return next((decimals for decimals in more if self._rounded(value, decimals) != 0), self.decimals)

    def _signed(self, value: float, decimals: int) -> str:
        rounded = self._rounded(value, decimals)
        return f"{rounded:{'+' if rounded else ''}.{decimals}f}"

    def _rounded(self, value: float, decimals: int) -> float:
        return round(self.factor * value, decimals) + 0.0  # no negative zero
