"""Which checkpoint a rule picks, and which candidates can no longer be picked (Gabdullin 2025, section 4.2).

Among the states of the weights whose training metric is within a tolerance of the best one, the state with the highest
criterion is picked. Plain Python: no files, no trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lightning_hesd.spectra.analyzed_state import analyzed_states
from lightning_hesd.spectra.record import START_EPOCH
from lightning_hesd.spectra.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning_hesd.spectra.analyzed_state import AnalyzedState
    from lightning_hesd.spectra.record import SpectrumRecord

LOSS_SHARE = 0.05
"""By default, losses count as nearly the same up to this share of the drop from the first analyzed loss to the best."""


@dataclass(frozen=True)
class Candidate:
    """One analyzed state of the weights.

    Attributes:
        epoch: Epoch of the analysis.
        global_step: Optimizer steps taken by then.
        score: Training metric, with the sign that makes higher better.
        criterion: Criterion of the rule, higher is better.
        mainly_positive: Whether the HESD type is MP.
        path: Path of its checkpoint file.
        mark: Random text that is in no other checkpoint file; empty: no text.
    """

    epoch: int
    global_step: int
    score: float
    criterion: float
    mainly_positive: bool
    path: str
    mark: str = ""


@dataclass(frozen=True)
class CandidateFilter:
    """The condition for candidates among which the criterion decides.

    Attributes:
        tolerance: Largest distance of the training metric from the best one, absolute. The tolerance may grow with the
            best metric, by less than that itself grows, as `progress_tolerance` does.
        require_mp: Whether only MP spectra qualify; if no spectrum does, the best training metric wins.
    """

    tolerance: float
    require_mp: bool

    def near(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return the candidates within the tolerance of the best score, of either type."""
        return [c for c in candidates if best - c.score <= self.tolerance]

    def qualified(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return the candidates among which the criterion decides; none if `require_mp` excludes all.

        Args:
            candidates: Candidates in the order of training.
            best: Best score over all analyzed states, also those no longer among `candidates`.
        """
        return [c for c in self.near(candidates, best) if c.mainly_positive or not self.require_mp]

    def pick(self, candidates: Sequence[Candidate], best: float) -> Candidate | None:
        """Return the pick, the earliest if several are equal; None without candidates."""
        if qualified := self.qualified(candidates, best):
            return max(qualified, key=lambda c: c.criterion)  # max returns the first of equals
        return max(candidates, key=lambda c: c.score, default=None)

    def pareto_front(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return the candidates that some continuation of training could still make the pick.

        The best metric only ever improves, and more so than a tolerance relative to the progress grows. So a candidate
        outside the tolerance stays outside, and one that another beats on both metric and criterion stays beaten,
        because the other is within the tolerance whenever it is. While some candidate qualifies, an unqualified one can
        never be picked: only a better metric can end that, and then the pick is the latest that brought it.
        """
        qualified = self.qualified(candidates, best)
        if not qualified:
            return [c for c in candidates if c.score == best][:1]
        return [
            c
            for position, c in enumerate(qualified)
            if not any(
                other.score >= c.score
                and (other.criterion > c.criterion or (other.criterion == c.criterion and rival < position))
                for rival, other in enumerate(qualified)
            )
        ]


def progress_tolerance(first: float | None, best: float) -> float:
    """Return `LOSS_SHARE` of the progress from the first score, a loss with its sign reversed, to the best one.

    The unit of the loss, and a constant added to it, then make no difference. Zero without progress.

    Args:
        first: Score of the first analyzed state; None: not known.
        best: Best score so far.

    Examples:
        >>> progress_tolerance(-2.0, -1.0), progress_tolerance(-1.0, -2.0)
        (0.05, 0.0)
    """
    if first is None or not (math.isfinite(first) and math.isfinite(best)):
        return 0.0
    return LOSS_SHARE * max(best - first, 0.0)


# Rules that go by the loss over the analysis samples ------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The decision of a checkpoint rule among candidates, in the order of training, that pass a filter."""

    candidates: tuple[Candidate, ...]
    filter: CandidateFilter

    @property
    def best(self) -> float:
        """The best score."""
        return max((c.score for c in self.candidates), default=-math.inf)

    @cached_property
    def near(self) -> list[Candidate]:
        """The candidates within the metric tolerance of the best, of either type."""
        return self.filter.near(self.candidates, self.best)

    @cached_property
    def qualified(self) -> list[Candidate]:
        """The candidates among which the criterion decides."""
        return self.filter.qualified(self.candidates, self.best)

    @property
    def pick(self) -> Candidate | None:
        """The pick, the earliest if several are equal; None without candidates."""
        return self.filter.pick(self.candidates, self.best)


def rank_by_loss(states: Sequence[AnalyzedState], rule: str | None, tolerance: float | None = None) -> Ranking:
    """Return the ranking of a rule that goes by the loss over the analysis samples and requires MP spectra.

    The state before the first step is no candidate, nor is a state whose C_t or criterion is undefined.

    Args:
        states: States of a run, or of several checkpoints.
        rule: Name of the rule; None: no criterion, to ask for the qualified candidates only.
        tolerance: How far the loss may lie above the lowest one, absolute; None: `LOSS_SHARE` of its drop.

    Returns:
        The ranking; the `path` of each candidate is the position of its state in `states`, as text.
    """
    candidates = tuple(
        Candidate(s.epoch, s.global_step, -s.loss, criterion, s.hesd_type == "MP", path=str(position))
        for position, s in enumerate(states)
        for criterion in [0.0 if rule is None else s.scores.get(rule, math.nan)]
        if s.epoch != START_EPOCH and s.hesd_type is not None and not (math.isnan(s.loss) or math.isnan(criterion))
    )
    if tolerance is None:
        first = _first_loss((s.global_step, s.loss) for s in states)
        best = max((c.score for c in candidates), default=-math.inf)
        tolerance = progress_tolerance(None if first is None else -first, best)
    return Ranking(candidates, CandidateFilter(tolerance, require_mp=True))


def first_loss(records: Sequence[SpectrumRecord]) -> float | None:
    """Return the finite loss after the fewest optimizer steps, the highest of several; None if no loss is finite."""
    return _first_loss((record.global_step, record.spectrum.loss) for record in records if record.spectrum)


def with_first_loss(records: Sequence[SpectrumRecord]) -> list[SpectrumRecord]:
    """Return the records of a run, or of its checkpoints, such that the later ones know the loss of the first."""
    start = min((record.global_step for record in records), default=0)
    first = first_loss(records)
    return [replace(record, first_loss=first) if record.global_step > start else record for record in records]


def _first_loss(losses: Iterable[tuple[int, float]]) -> float | None:
    """Return the first of losses that are given with their steps."""
    finite = [(step, -loss) for step, loss in losses if math.isfinite(loss)]
    return -min(finite)[1] if finite else None


def loss_tolerance(states: Sequence[AnalyzedState]) -> float:
    """Return the largest difference of losses of these states that count as nearly the same."""
    first = _first_loss((s.global_step, s.loss) for s in states)
    if first is None:
        return 0.0
    return progress_tolerance(-first, max(-s.loss for s in states if math.isfinite(s.loss)))


def candidates_of(
    records: Sequence[SpectrumRecord], tolerance: float | None = None, *, fallback: bool = True
) -> list[SpectrumRecord]:
    """Return the records among which the rules decide, by the loss over the analysis samples.

    Args:
        records: Records of a run, or of several checkpoints.
        tolerance: As for `rank_by_loss`.
        fallback: Whether the lowest loss is the candidate if no spectrum is MP, rather than none.
    """
    ranking = rank_by_loss(analyzed_states(records), None, tolerance)
    lowest = [ranking.pick] if fallback and ranking.pick else []
    return [records[int(candidate.path)] for candidate in ranking.qualified or lowest]


def picks(
    records: Sequence[SpectrumRecord], tolerance: float | None = None, *, fallback: bool = True
) -> dict[str, SpectrumRecord]:
    """Return the pick of each rule that is shown, by the rule's name; arguments as for `candidates_of`."""
    states = analyzed_states(records)
    rankings = {name: rank_by_loss(states, name, tolerance) for name, rule in RULES.items() if rule.is_shown}
    return {
        name: records[int(ranking.pick.path)]
        for name, ranking in rankings.items()
        if ranking.pick and (fallback or ranking.qualified)
    }


@dataclass(frozen=True)
class SelectionEvent:
    """The decision of a checkpoint callback after one analysis.

    Attributes:
        rule: Name of its rule.
        train_metric: Key of the training metric; None: the mean loss of the analysis.
        train_metric_mode: "max" if a higher metric is better, else "min".
        filter: Condition for the candidates, with the tolerance as of now.
        latest: The state that was analyzed.
        pick: The pick as of now.
        is_relative: Whether the tolerance is a share of the progress.
        rivals: Epochs of the candidates that are not evidently worse than the pick.
    """

    rule: str
    train_metric: str | None
    train_metric_mode: Literal["min", "max"]
    filter: CandidateFilter
    latest: Candidate
    pick: Candidate | None
    is_relative: bool = False
    rivals: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Text that distinguishes the callback from others in the same run."""
        metric, condition = self.train_metric or "loss", "mp" if self.filter.require_mp else "all"
        tolerance = "relative" if self.is_relative else f"{self.filter.tolerance:g}"
        return f"{self.rule}/{metric}/{tolerance}/{condition}"
