"""Which checkpoint to take, and which can no longer be taken: the rule of Gabdullin (2025), section 4.2.

Among the weights whose training metric is within a tolerance of the best one, take the highest criterion. Plain
Python: no files, no trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord


class Ranked(Protocol):
    """What the rules look at: a spectrum, or what is left of one."""

    @property
    def c_t(self) -> float:
        """C_t."""

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""


CRITERIA: dict[str, Callable[[Ranked], float]] = {
    "highest_c_t": lambda spectrum: spectrum.c_t,
    "lowest_max_eigenvalue": lambda spectrum: -spectrum.lambda_max,
}
"""What the rules rank by, higher is better: the paper's, and the one it compares with."""

LOSS_SHARE = 0.05
"""By default, losses count as nearly the same up to this share of the drop from the first analysed loss to the best."""

RULE_NAMES = {"highest_c_t": "highest C_t", "lowest_max_eigenvalue": "lowest λ_max"}
"""What people call them."""


@dataclass(frozen=True)
class Candidate:
    """One analysed state of the weights.

    Attributes:
        epoch: Epoch of the analysis.
        global_step: Optimizer steps taken by then.
        score: The training metric, its sign such that higher is better.
        criterion: What the rule ranks by, higher is better.
        mainly_positive: Whether the HESD type is MP.
        path: Its checkpoint file.
        mark: Text that this file alone has in it; empty: none.
    """

    epoch: int
    global_step: int
    score: float
    criterion: float
    mainly_positive: bool
    path: str
    mark: str = ""


@dataclass(frozen=True)
class SelectionRule:
    """The rule's parameters.

    Attributes:
        tolerance: How far the training metric may lie from the best one, absolute. It may grow with the best one, by
            less than that itself grows, as `progress_tolerance` does.
        require_mp: Whether only MP spectra qualify; if none does, the best training metric wins.
    """

    tolerance: float
    require_mp: bool

    def qualified(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return those the criterion decides among; empty if `require_mp` leaves none.

        Args:
            candidates: In the order of training.
            best: Best score over all analysed states, also those no longer among `candidates`.
        """
        return [
            c for c in candidates if best - c.score <= self.tolerance and (c.mainly_positive or not self.require_mp)
        ]

    def pick(self, candidates: Sequence[Candidate], best: float) -> Candidate | None:
        """Return the candidate to take, the earliest of equals; None without candidates."""
        if qualified := self.qualified(candidates, best):
            return max(qualified, key=lambda c: c.criterion)  # max returns the first of equals
        return max(candidates, key=lambda c: c.score, default=None)

    def pareto_front(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return the candidates that some continuation of training could still make the pick.

        The best metric only ever improves, and more so than a tolerance relative to the progress grows. So a candidate
        outside the tolerance stays outside, and one that another
        beats on both metric and criterion stays beaten, because the other is within the tolerance whenever it is.
        While some candidate qualifies, an unqualified one can never be picked: only a better metric can end that, and
        then the pick is the latest that brought it.
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

    The unit of the loss, and what is added to it, then make no difference. Zero without progress.

    Args:
        first: Goodness of the first analysed state; None: not known.
        best: The best score so far.

    Example:
        >>> progress_tolerance(-2.0, -1.0), progress_tolerance(-1.0, -2.0)
        (0.05, 0.0)
    """
    if first is None or not (math.isfinite(first) and math.isfinite(best)):
        return 0.0
    return LOSS_SHARE * max(best - first, 0.0)


def first_loss(records: Sequence[SpectrumRecord]) -> float | None:
    """Return the finite loss over the analysis samples after the fewest optimizer steps; None if there is none.

    Of several checkpoints after equally many steps, the highest.
    """
    losses = [(r.global_step, -r.spectrum.loss) for r in records if r.spectrum and math.isfinite(r.spectrum.loss)]
    return -min(losses)[1] if losses else None


def loss_tolerance(records: Sequence[SpectrumRecord]) -> float:
    """Return how far losses of these records may lie apart and count as nearly the same."""
    first = first_loss(records)
    losses = [r.spectrum.loss for r in records if r.spectrum and math.isfinite(r.spectrum.loss)]
    return 0.0 if first is None else progress_tolerance(-first, -min(losses))


def candidates_of(
    records: Sequence[SpectrumRecord], tolerance: float | None = None, *, fallback: bool = True
) -> list[SpectrumRecord]:
    """Return the records among which the rules of `CRITERIA` decide, by the loss over the analysis samples.

    Only MP spectra count. The start is no candidate.

    Args:
        records: The records of a run, or of several checkpoints.
        tolerance: How far the loss may lie above the lowest one, absolute; None: `LOSS_SHARE` of its drop.
        fallback: Whether the lowest loss is the candidate if none is MP, rather than none.
    """
    analysed = [(r, r.spectrum) for r in records if r.epoch != START_EPOCH and r.spectrum and not r.spectrum.reason]
    best = min((spectrum.loss for _, spectrum in analysed), default=0.0)
    first = first_loss(records)
    width = progress_tolerance(None if first is None else -first, -best) if tolerance is None else tolerance
    near = [r for r, s in analysed if s.loss - best <= width and s.hesd_type == "MP"]
    return near or [r for r, s in analysed if fallback and s.loss == best][:1]


def picks(
    records: Sequence[SpectrumRecord], tolerance: float | None = None, *, fallback: bool = True
) -> dict[str, SpectrumRecord]:
    """Return the record that each rule of `CRITERIA` picks among `candidates_of` these, the earliest of equals."""
    candidates = [(r, r.spectrum) for r in candidates_of(records, tolerance, fallback=fallback) if r.spectrum]
    return {
        name: max(candidates, key=lambda pair: criterion(pair[1]))[0]
        for name, criterion in CRITERIA.items()
        if candidates
    }


@dataclass(frozen=True)
class SelectionEvent:
    """What a rule made of the latest analysed state of the weights.

    Attributes:
        rule: Its name.
        train_metric: Key of the training metric; None: the mean loss of the analysis.
        train_metric_mode: Whether more of it is better.
        selection: The parameters of the rule.
        latest: The latest state.
        pick: Which state the rule takes by now.
        is_relative: Whether the tolerance is a share of the progress; `selection` has what that is by now.
    """

    rule: str
    train_metric: str | None
    train_metric_mode: Literal["min", "max"]
    selection: SelectionRule
    latest: Candidate
    pick: Candidate | None
    is_relative: bool = False

    @property
    def key(self) -> str:
        """What tells the rule from others that one run may have."""
        metric, whom = self.train_metric or "loss", "mp" if self.selection.require_mp else "all"
        tolerance = "relative" if self.is_relative else f"{self.selection.tolerance:g}"
        return f"{self.rule}/{metric}/{tolerance}/{whom}"
