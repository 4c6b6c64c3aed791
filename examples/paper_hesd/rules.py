"""Checkpoint rules, and differences in generalization between their picks."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from scipy.stats import t as student

from examples.paper_hesd.outcomes import TOLERANCE
from lightning_hesd.spectra.selection import Candidate, CandidateFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.paper_hesd.outcomes import Point

HIGHEST_C_T, LOWEST_MAX, LAST, BEST = "highest C_t", "lowest λ_max", "last epoch", "best possible"
CONFIDENCE = 0.95


def _delta_r_e(point: Point) -> float:
    return point.record.assessment.delta_r_e if point.record.assessment else math.nan


def _preconditioned(point: Point) -> float:
    return point.record.preconditioned.lambda_max if point.record.preconditioned else math.nan


RULES: Mapping[str, Callable[[Point], float]] = {
    HIGHEST_C_T: lambda point: point.spectrum.c_t,
    LOWEST_MAX: lambda point: -point.spectrum.lambda_max,
    "best validation accuracy": lambda point: point.val_acc,
    LAST: lambda point: point.epoch,
    "lowest trace": lambda point: -point.spectrum.trace,
    "lowest λ_max·‖w‖²": lambda point: -point.spectrum.lambda_max * point.squared_norm,
    "lowest K_H05": lambda point: -point.spectrum.k_h(0.5),
    "lowest preconditioned λ_max": lambda point: -_preconditioned(point),
    "lowest Δr_e": lambda point: -_delta_r_e(point),
    BEST: lambda point: point.gen_acc,
}
"""Score of each rule, higher is better. The last rule uses the answer: no rule can be better."""


def pick(points: Sequence[Point], criterion: Callable[[Point], float]) -> Point:
    """Return the pick among the MP epochs with close to the best training accuracy; of equals, the earliest."""
    candidates = [
        Candidate(p.epoch, p.record.global_step, p.train_acc, _defined(criterion(p)), p.spectrum.hesd_type == "MP", "")
        for p in points
    ]
    rule = CandidateFilter(tolerance=TOLERANCE, require_mp=True)
    picked = rule.pick(candidates, max(p.train_acc for p in points))
    return next(p for p in points if picked is not None and p.epoch == picked.epoch)


def _defined(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def picks(points: Sequence[Point]) -> dict[str, Point]:
    """Return the picks of all rules."""
    return {name: pick(points, criterion) for name, criterion in RULES.items()}


class Difference(NamedTuple):
    """A mean of paired differences with its confidence interval; NaN for a single pair."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, else 0.

        An interval of zero width means nothing: accuracies are shares of few images, and their differences are often
        equal.
        """
        if not self.high - self.low > 1e-9:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def shown(self, form: str) -> str:
        """Return the mean and the interval as text."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the mean of `ours - theirs` with Student's interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, math.nan, math.nan)
    half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half)
