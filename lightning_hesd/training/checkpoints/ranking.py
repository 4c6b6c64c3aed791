"""The ranking of a HessianCheckpoint: its candidates, its pick, and its state in checkpoints, read without trust."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.selection import Candidate, CandidateFilter, progress_tolerance
from lightning_hesd.spectra.validation import each, having, integer, number, of, optional, text
from lightning_hesd.training.compat.namespaces import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    "best_model_path": text,
    "last_model_path": text,
    "dirpath": text,
}
"""Checks of the state of a HessianCheckpoint."""


class Ranking:
    """The analyzed states of the weights, ranked by training metric and criterion.

    Attributes:
        tolerance: Distance from the best metric within which a state qualifies; None: a share of the progress.
        require_mp: Whether only MP spectra qualify.
        candidates: The Pareto front, in the order of training.
        best_score: Best score over all ranked states; -inf before the first.
        first_score: Score of the first analyzed state; None: not known.
        offered_step: Optimizer steps of the latest record that was ranked or passed over; -1: none was.
    """

    def __init__(self, tolerance: float | None, *, require_mp: bool) -> None:
        if tolerance is not None and not tolerance >= 0:
            msg = f"`tolerance` must not be negative, got {tolerance!r}."
            raise MisconfigurationException(msg)
        self.tolerance = tolerance
        self.require_mp = require_mp
        self.clear()

    def clear(self) -> None:
        """Forget all states."""
        self.candidates: list[Candidate] = []
        self.best_score = -math.inf
        self.first_score: float | None = None
        self.offered_step = -1
        self._ranked: list[Candidate] = []

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
        return self.filter.pick(self.candidates, self.best_score)

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
        return self._filter(best).pareto_front([*self.candidates, latest], best), best

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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a ranking whose fields are valid."""
        self.candidates = [Candidate(**{name: values[name] for name in _CANDIDATE}) for values in state["candidates"]]
        self.best_score = state["best_score"]
        self.first_score = state["first_score"]
        self.offered_step = state["offered_step"]
        self._ranked = [
            Candidate(-1, c["global_step"], c["score"], math.nan, c["mainly_positive"], path="")
            for c in state["ranked"]
        ]
