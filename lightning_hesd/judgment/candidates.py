"""What each rule and each baseline picks in one run, and how good the pick is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_hesd.judgment.metric import logged_values
from lightning_hesd.spectra.record import START_EPOCH
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.selection import candidates_of, loss_tolerance, picks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_hesd.judgment.metric import Metric
    from lightning_hesd.spectra.record import SpectrumRecord

Candidates: TypeAlias = Literal["near", "all"] | float
"""The records among which rules decide: see `judge`."""

LAST_EPOCH, RANDOM_CANDIDATE, BEST_POSSIBLE = "last_epoch", "random_candidate", "best_possible"
BEST_TRAINING_LOSS, BEST_VALIDATION_LOSS = "best_training_loss", "best_validation_loss"
BEST_VALIDATION_METRIC = "best_validation_metric"

BASELINES = {
    LAST_EPOCH: "last epoch",
    BEST_TRAINING_LOSS: "best training loss",
    BEST_VALIDATION_LOSS: "best validation loss",
    BEST_VALIDATION_METRIC: "best validation metric",
    RANDOM_CANDIDATE: "random candidate",
    BEST_POSSIBLE: "best possible",
}
"""Titles of the baselines, by name. They pick among all analyzed epochs, but the random candidate."""


@dataclass(frozen=True)
class PickSettings:
    """Which rules and baselines pick, and among which records.

    Attributes:
        metric: The metric by which picks are judged.
        candidates: The candidates of the rules.
        rules: Names of the rules.
        train_loss: Key of the training loss that a baseline goes by; None: the mean loss over the analysis samples.
        val_loss: Key of the validation loss that a baseline goes by; None: no such baseline.
        val_metric: Another metric that a baseline goes by; None: no such baseline.
    """

    metric: Metric
    candidates: Candidates = "near"
    rules: tuple[str, ...] = tuple(RULES)
    train_loss: str | None = None
    val_loss: str | None = None
    val_metric: Metric | None = None


@dataclass(frozen=True)
class Pick:
    """The pick of a rule or a baseline in one run.

    Attributes:
        epoch: Epoch of the picked record; None for the expectation over several.
        global_step: Its optimizer steps, likewise.
        value: The metric by which it is judged; for several records its mean.
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
        judged: How many records of trained weights have the metric.
        trained: How many records of trained weights there are.
        candidates: How many of the judged records are candidates.
        is_fallback: Whether no candidate is MP, so that the lowest loss decides.
    """

    run: str
    picks: Mapping[str, Pick]
    judged: int
    trained: int
    candidates: int
    is_fallback: bool


def run_picks(run: str, records: Sequence[SpectrumRecord], values: Sequence[float], settings: PickSettings) -> RunPicks:
    """Return the picks of all rules and baselines in a run, the earliest of equals.

    Only records with a value of the metric are picked: what another pick is worth is not known. The record before the
    first step is never picked.

    Args:
        run: Name of the run.
        records: Its records in the order of training.
        values: The metric of each record; NaN: not known.
        settings: Which rules and baselines pick, and among which records.
    """
    trained = [(r, v) for r, v in zip(records, values, strict=True) if r.epoch != START_EPOCH]
    known = [(r, v) for r, v in trained if not math.isnan(v)]
    judged, value_of = [record for record, _ in known], {id(record): value for record, value in known}
    chosen, among, is_fallback = _chosen_by_rules(records, judged, settings.candidates)
    chosen = {rule: record for rule, record in chosen.items() if rule in settings.rules}
    for name, scores in _baseline_scores(judged, [value for _, value in known], settings).items():
        place = _first_highest(scores)
        if place is not None:
            chosen[name] = judged[place]
    found = {name: Pick(record.epoch, record.global_step, value_of[id(record)]) for name, record in chosen.items()}
    if among:
        found[RANDOM_CANDIDATE] = Pick(None, None, fmean(value_of[id(record)] for record in among))
    return RunPicks(run, found, len(judged), len(trained), len(among), is_fallback)


def _baseline_scores(
    judged: Sequence[SpectrumRecord], values: Sequence[float], settings: PickSettings
) -> dict[str, list[float]]:
    """Return the score of each record by each baseline, higher is better; NaN: not known."""
    if settings.train_loss is None:
        losses = [record.spectrum.loss if record.spectrum else math.nan for record in judged]
    else:
        losses = logged_values(judged, settings.train_loss)
    scores = {
        LAST_EPOCH: [float(position) for position in range(len(judged))],
        BEST_TRAINING_LOSS: [-loss for loss in losses],
        BEST_POSSIBLE: [settings.metric.sign * value for value in values],
    }
    if settings.val_loss is not None:
        scores[BEST_VALIDATION_LOSS] = [-loss for loss in logged_values(judged, settings.val_loss)]
    if settings.val_metric is not None:
        sign = settings.val_metric.sign
        scores[BEST_VALIDATION_METRIC] = [sign * value for value in logged_values(judged, settings.val_metric.name)]
    return scores


def _chosen_by_rules(
    records: Sequence[SpectrumRecord], judged: Sequence[SpectrumRecord], candidates: Candidates
) -> tuple[dict[str, SpectrumRecord], list[SpectrumRecord], bool]:
    """Return the pick of each rule that has one, the candidates, and whether the lowest loss decides for want of MP."""
    if candidates == "all":
        chosen = {}
        for name, rule in RULES.items():
            place = _first_highest([rule.score(record) for record in judged])
            if place is not None:
                chosen[name] = judged[place]
        return chosen, list(judged), False
    # The drop of the loss is that of the whole run, whichever of its records can be judged.
    tolerance = loss_tolerance(records) if candidates == "near" else float(candidates)
    among = candidates_of(judged, tolerance)
    return picks(judged, tolerance), among, bool(among) and not candidates_of(judged, tolerance, fallback=False)


def _first_highest(scores: Sequence[float]) -> int | None:
    """Return the position of the highest score, the first of equals; None if all are NaN."""
    known = [place for place, score in enumerate(scores) if not math.isnan(score)]
    return max(known, key=lambda place: scores[place], default=None)
