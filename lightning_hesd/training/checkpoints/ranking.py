"""The ranking of a HessianCheckpoint: metric, criterion, candidates and pick; its state is read without trust."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.selection import Candidate, CandidateFilter, progress_tolerance
from lightning_hesd.spectra.validation import each, having, integer, number, of, optional, text
from lightning_hesd.training.compat.logged_metrics import current_metrics
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.fresh_metrics import FreshMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import lightning.pytorch as pl

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.error_policy import ErrorPolicy

    Mode = Literal["min", "max"]
    Ties = Literal["first", "metric"]

_CANDIDATE = {
    "epoch": integer,
    "global_step": integer,
    "score": number,
    "criterion": number,
    "mainly_positive": of(bool),
    "path": text,
    "mark": text,
}
STATE = {
    "candidates": each(having(_CANDIDATE)),
    "best_score": number,
    "first_score": optional(number),
    "ranked": each(having({"global_step": integer, "score": number, "mainly_positive": of(bool)})),
    "offered_step": integer,
    "preferred_step": optional(integer),
    "best_model_path": text,
    "last_model_path": text,
    "dirpath": text,
}
"""Checks of the state of a HessianCheckpoint."""


def check_rule(rule: object, ties: Ties | None) -> None:
    """Check that a rule is a known name or a function, and that its errors are known if they are to break ties.

    Raises:
        MisconfigurationException: If not.
    """
    if not callable(rule) and rule not in RULES:
        msg = f"`rule` must be one of {', '.join(map(repr, RULES))}, or a function of the record, got {rule!r}."
        raise MisconfigurationException(msg)
    if ties is not None and (callable(rule) or RULES[str(rule)].difference is None):
        known = ", ".join(repr(name) for name, each in RULES.items() if each.difference is not None)
        msg = f"`ties={ties!r}` needs a rule whose errors are known, {known}, got {rule!r}."
        raise MisconfigurationException(msg)


class RunRanking:
    """The analyzed states of the weights, ranked by training metric and criterion.

    Attributes:
        tolerance: Distance from the best metric within which a state qualifies; None: a share of the progress.
        require_mp: Whether only MP spectra qualify.
        ties: Which of the candidates that are not evidently worse than the best is picked: the "first", or the one with
            the best "metric"; None: the best.
        candidates: The Pareto front, in the order of training; with `ties` all states that qualify.
        best_score: Best score over all ranked states; -inf before the first.
        first_score: Score of the first analyzed state; None: not known.
        offered_step: Optimizer steps of the latest record that was ranked or passed over; -1: none was.
    """

    def __init__(self, tolerance: float | None, *, require_mp: bool, ties: Ties | None = None) -> None:
        if tolerance is not None and not tolerance >= 0:
            msg = f"`tolerance` must not be negative, got {tolerance!r}."
            raise MisconfigurationException(msg)
        if ties not in {None, "first", "metric"}:
            msg = f"`ties` must be 'first', 'metric' or None, got {ties!r}."
            raise MisconfigurationException(msg)
        self.tolerance = tolerance
        self.require_mp = require_mp
        self.ties = ties
        self.clear()

    def clear(self) -> None:
        """Forget all states."""
        self.candidates: list[Candidate] = []
        self.best_score = -math.inf
        self.first_score: float | None = None
        self.offered_step = -1
        self._ranked: list[Candidate] = []
        self._preferred_step: int | None = None

    @property
    def filter(self) -> CandidateFilter:
        """The condition for candidates at present; a tolerance relative to the progress grows with it."""
        return self._filter(self.best_score)

    def _filter(self, best: float) -> CandidateFilter:
        tolerance = progress_tolerance(self.first_score, best) if self.tolerance is None else self.tolerance
        return CandidateFilter(tolerance=tolerance, require_mp=self.require_mp)

    @property
    def pick(self) -> Candidate | None:
        """The candidate that the rule takes; None without candidates."""
        preferred = (c for c in self.candidates if c.global_step == self._preferred_step)
        return next(preferred, None) or self.filter.pick(self.candidates, self.best_score)

    def break_ties(self, rivals: Callable[[Candidate], Collection[int]]) -> None:
        """Pick one of the candidates that are not evidently worse than the best; `rivals` returns their steps."""
        self._preferred_step = None
        best = self.pick
        if self.ties is None or best is None or not self.is_decided:
            return
        steps = {best.global_step, *rivals(best)}
        tied = [c for c in self.filter.qualified(self.candidates, self.best_score) if c.global_step in steps]
        self._preferred_step = (tied[0] if self.ties == "first" else max(tied, key=lambda c: c.score)).global_step

    @property
    def is_decided(self) -> bool:
        """Whether some candidate qualifies."""
        return bool(self.filter.qualified(self.candidates, self.best_score))

    @property
    def qualified_steps(self) -> list[int]:
        """Optimizer steps of all ranked states that qualify, those without a file, too."""
        near = self.filter.qualified(self._ranked, self.best_score)
        return [c.global_step for c in near or self.candidates]

    def front_with(self, latest: Candidate) -> tuple[list[Candidate], float]:
        """Note that a state was ranked, and return the Pareto front and the best score with it."""
        best = max(latest.score, self.best_score)
        self._ranked = [*self._ranked, latest]
        among, everyone = self._filter(best), [*self.candidates, latest]
        # One that is beaten may be a tie with the pick of later.
        tied = among.qualified(everyone, best) if self.ties is not None else []
        return tied or among.pareto_front(everyone, best), best

    def state_dict(self) -> dict[str, Any]:
        """Return the ranking as plain values; of states without a file, only what tells whether they qualify."""
        return {
            "candidates": [vars(candidate) for candidate in self.candidates],
            "best_score": self.best_score,
            "first_score": self.first_score,
            "ranked": [
                {"global_step": c.global_step, "score": c.score, "mainly_positive": c.mainly_positive}
                for c in self._ranked
            ],
            "offered_step": self.offered_step,
            "preferred_step": self._preferred_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a ranking whose fields are valid."""
        self.candidates = [Candidate(**{name: values[name] for name in _CANDIDATE}) for values in state["candidates"]]
        self.best_score = state["best_score"]
        self.first_score = state["first_score"]
        self.offered_step = state["offered_step"]
        self._preferred_step = state["preferred_step"]
        self._ranked = [
            Candidate(-1, c["global_step"], c["score"], math.nan, c["mainly_positive"], path="")
            for c in state["ranked"]
        ]


# The criterion --------------------------------------------------------------------------------------------------------


def criterion_of(record: SpectrumRecord, rule: str | Callable[[SpectrumRecord], float], errors: ErrorPolicy) -> float:
    """Return the criterion of a record; NaN if the record lacks what it needs, or the user's function fails."""
    if isinstance(rule, str):
        complaint = RULES[rule].complaint(record)
        if complaint is not None:
            errors.complain(complaint, key="needs")
        return RULES[rule].score(record)
    try:
        return float(rule(record))
    except Exception as error:  # noqa: BLE001 - a user's function, whose failure does not end training
        message = f"the rule of HessianCheckpoint failed at epoch {record.epoch}: {error!r}"
        errors.complain(message, cause=error)
        return math.nan


# The training metric --------------------------------------------------------------------------------------------------


class TrainMetric:
    """A logged metric of the analyzed weights, or the mean loss of the analysis.

    Args:
        key: Key of the metric; None: the mean loss of the analysis.
        mode: "max" or "min"; None: "max", but "min" without a key.

    Raises:
        MisconfigurationException: If `mode` is invalid, or is None for a metric that sounds like a loss.
    """

    def __init__(self, key: str | None, mode: Mode | None) -> None:
        self.key = key
        self.mode = _mode(key, mode)
        self._step = -1
        self._fresh = FreshMetrics()

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin a run: the present value is old."""
        self._step = trainer.global_step
        if self.key is not None:
            self._fresh.begin_batch(trainer)

    def begin_batch(self, trainer: pl.Trainer) -> None:
        """Keep the value before the first batch of an optimizer step."""
        if trainer.global_step != self._step:
            self.restart(trainer)

    def score(self, trainer: pl.Trainer, spectrum: Spectrum) -> float | None:
        """Return the score of the present weights: the metric, or minus the metric with "min"; None if not logged."""
        sign = 1.0 if self.mode == "max" else -1.0
        if self.key is None:
            return sign * spectrum.loss
        value = self._fresh.value(trainer, self.key)
        return None if value is None else sign * value

    def complaint(self, trainer: pl.Trainer, ours: str) -> str:
        """Return why the metric of the present weights is not known, and what to do.

        The message names the metrics that are logged, without the callback's own, which begin with `ours`.
        """
        why = "the metric was last logged for older weights"
        logged = sorted(key for key in current_metrics(trainer) if not key.startswith(ours))
        if self.key not in logged:
            why = f"the metric is not among those logged so far, {logged}"
        return (
            f"HessianCheckpoint(train_metric={self.key!r}) does not rank the analysis of epoch {trainer.current_epoch} "
            f"after step {trainer.global_step}, nor later ones like it: {why}. Within an epoch it must be logged in "
            "`training_step` with `on_step=True`; at the end of an epoch by the end of the module's "
            "`on_train_epoch_end`; in validation only where validation comes right after the analyzed step. Log it so, "
            "analyze after such epochs or steps only, or leave `train_metric` out to rank by the loss of the analysis."
        )


def _mode(metric: str | None, mode: Mode | None) -> Mode:
    if mode not in {None, "min", "max"}:
        msg = f"`train_metric_mode` must be 'min' or 'max', got {mode!r}."
        raise MisconfigurationException(msg)
    if mode is not None:
        return mode
    if metric is None:
        return "min"
    if any(word in metric.lower() for word in ("loss", "err")):
        msg = f"`train_metric={metric!r}` sounds as if lower were better: say so with `train_metric_mode='min'`."
        raise MisconfigurationException(msg)
    return "max"
