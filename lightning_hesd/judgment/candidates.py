"""What each rule and each baseline picks in one run, and how good the pick is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_hesd.judgment.metric import logged_values
from lightning_hesd.spectra.record import START_EPOCH
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.selection import loss_tolerance, rank_by_loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_hesd.judgment.metric import Metric
    from lightning_hesd.spectra.analyzed_state import AnalyzedState
    from lightning_hesd.spectra.record import SpectrumRecord

Candidates: TypeAlias = Literal["near", "all"] | float
"""The states among which rules decide: see `judge`."""

LAST, LOWEST_VALIDATION_LOSS = "last", "lowest_validation_loss"
"""The baselines of `RULES` that everything else is compared with."""

VALIDATION_METRIC, RANDOM_CANDIDATE, BEST_POSSIBLE = "best_validation_metric", "random_candidate", "best_possible"

REFERENCES = {
    VALIDATION_METRIC: "best validation metric",
    RANDOM_CANDIDATE: "random candidate",
    BEST_POSSIBLE: "best possible",
}
"""Titles of the baselines that are no checkpoint rules, by name."""


@dataclass(frozen=True)
class PickSettings:
    """Which rules and baselines pick, and among which states.

    Attributes:
        metric: The metric by which picks are judged.
        candidates: The candidates of the rules that are no baselines.
        rules: Names of the rules and of the baselines in `RULES`.
        val_loss: Key of the validation loss; None: as the rule finds it.
        val_metric: Another metric that a baseline goes by; None: no such baseline.
    """

    metric: Metric
    candidates: Candidates
    rules: tuple[str, ...]
    val_loss: str | None = None
    val_metric: Metric | None = None


@dataclass(frozen=True)
class Pick:
    """The pick of a rule or a baseline in one run.

    Attributes:
        epoch: Epoch of the picked state; None for the expectation over several.
        global_step: Its optimizer steps, likewise.
        value: The metric by which it is judged; for several states its mean.
    """

    epoch: int | None
    global_step: int | None
    value: float


@dataclass(frozen=True)
class RunPicks:
    """The picks in one run.

    Attributes:
        run: Name of the run.
        picks: By name of the rule or baseline; those without a pick are absent.
        judged: How many states of trained weights have the metric.
        trained: How many states of trained weights there are.
        candidates: How many of the judged states are candidates.
        is_fallback: Whether no candidate is MP, so that the lowest loss decides.
        rivals: Epochs of the candidates that are not evidently worse than the pick, by name of the rule; only of rules
            and runs whose errors are known.
    """

    run: str
    picks: Mapping[str, Pick]
    judged: int
    trained: int
    candidates: int
    is_fallback: bool
    rivals: Mapping[str, Sequence[int]]


def run_picks(run: str, states: Sequence[AnalyzedState], values: Sequence[float], settings: PickSettings) -> RunPicks:
    """Return the picks of all rules and baselines in a run, the earliest if several are equal.

    Only states with a value of the metric are picked: what another pick is worth is not known. The state before the
    first step is never picked. Rules pick among candidates, baselines among all other states.

    Args:
        run: Name of the run.
        states: Its states in the order of training.
        values: The metric of each state; NaN: not known.
        settings: Which rules and baselines pick, and among which states.
    """
    trained = [(s, v) for s, v in zip(states, values, strict=True) if s.epoch != START_EPOCH]
    known = [(s, v) for s, v in trained if not math.isnan(v)]
    judged, judged_values = [state for state, _ in known], [value for _, value in known]
    among, is_fallback, tolerance = _candidates(states, judged, settings.candidates)
    places: dict[str, int | None] = {}
    for name in settings.rules:
        if RULES[name].is_baseline or tolerance is None:
            places[name] = _first_highest(_scores(judged, name, settings))
        else:
            pick = rank_by_loss(judged, name, tolerance).pick
            places[name] = None if pick is None else int(pick.path)
    if settings.val_metric is not None:
        sign = settings.val_metric.sign
        places[VALIDATION_METRIC] = _first_highest(
            [sign * value for value in logged_values(judged, settings.val_metric.name)]
        )
    places[BEST_POSSIBLE] = _first_highest([settings.metric.sign * value for value in judged_values])
    found = {
        name: Pick(judged[place].epoch, judged[place].global_step, judged_values[place])
        for name, place in places.items()
        if place is not None
    }
    if among:
        found[RANDOM_CANDIDATE] = Pick(None, None, fmean(judged_values[place] for place in among))
    candidates = [judged[place].record for place in among]
    rivals = {
        name: _rivals(name, judged[place].record, candidates)
        for name, place in places.items()
        if place is not None and place in among
    }
    rivals = {name: epochs for name, epochs in rivals.items() if epochs}
    return RunPicks(run, found, len(judged), len(trained), len(among), is_fallback, rivals)


def _rivals(name: str, pick: SpectrumRecord | None, candidates: Sequence[SpectrumRecord | None]) -> list[int]:
    if pick is None or name not in RULES:
        return []
    return [record.epoch for record in RULES[name].rivals(pick, filter(None, candidates))]


def _candidates(
    states: Sequence[AnalyzedState], judged: Sequence[AnalyzedState], candidates: Candidates
) -> tuple[list[int], bool, float | None]:
    """Return the positions of the candidates, whether none is MP, and the tolerance of the loss; None: no condition."""
    if candidates == "all":
        return list(range(len(judged))), False, None
    # The drop of the loss is that of the whole run, whichever of its states can be judged.
    tolerance = loss_tolerance(states) if candidates == "near" else float(candidates)
    ranking = rank_by_loss(judged, None, tolerance)
    if ranking.qualified or ranking.pick is None:
        return [int(candidate.path) for candidate in ranking.qualified], False, tolerance
    return [int(ranking.pick.path)], True, tolerance


def _scores(judged: Sequence[AnalyzedState], name: str, settings: PickSettings) -> list[float]:
    """Return the score of each state by a rule, higher is better; NaN: not known."""
    if name == LOWEST_VALIDATION_LOSS and settings.val_loss is not None:
        return [-loss for loss in logged_values(judged, settings.val_loss)]
    return [state.scores.get(name, math.nan) for state in judged]


def _first_highest(scores: Sequence[float]) -> int | None:
    """Return the position of the highest score, the first of equals; None if all are NaN."""
    known = [place for place, score in enumerate(scores) if not math.isnan(score)]
    return max(known, key=lambda place: scores[place], default=None)
