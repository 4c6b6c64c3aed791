"""Which checkpoint to take, and which can no longer be taken: the rule of Gabdullin (2025), section 4.2.

Among the weights whose training metric is within a tolerance of the best one, take the highest criterion. Plain
Python: no files, no trainer.
"""

from __future__ import annotations

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

LOSS_TOLERANCE = 0.05
"""Losses over the analysis samples count as nearly the same up to this, absolute, unless somebody says otherwise."""

RULE_NAMES = {"highest_c_t": "highest C_t", "lowest_max_eigenvalue": "lowest λ_max"}
"""What people call them."""


@dataclass(frozen=True)
class Candidate:
    """One analysed state of the weights.

    Attributes:
        epoch: Epoch of the analysis.
        global_step: Optimizer steps taken by then.
        goodness: The training metric, its sign such that higher is better.
        criterion: What the rule ranks by, higher is better.
        mainly_positive: Whether the HESD type is MP.
        path: Its checkpoint file.
        mark: Text that this file alone has in it; empty: none.
    """

    epoch: int
    global_step: int
    goodness: float
    criterion: float
    mainly_positive: bool
    path: str
    mark: str = ""


@dataclass(frozen=True)
class SelectionRule:
    """The rule's parameters.

    Attributes:
        tolerance: How far the training metric may lie from the best one, absolute.
        require_mp: Whether only MP spectra qualify; if none does, the best training metric wins.
    """

    tolerance: float
    require_mp: bool

    def qualified(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return those the criterion decides among; empty if `require_mp` leaves none.

        Args:
            candidates: In the order of training.
            best: Best goodness over all analysed states, also those no longer among `candidates`.
        """
        return [
            c for c in candidates if best - c.goodness <= self.tolerance and (c.mainly_positive or not self.require_mp)
        ]

    def pick(self, candidates: Sequence[Candidate], best: float) -> Candidate | None:
        """Return the candidate to take, the earliest of equals; None without candidates."""
        if qualified := self.qualified(candidates, best):
            return max(qualified, key=lambda c: c.criterion)  # max returns the first of equals
        return max(candidates, key=lambda c: c.goodness, default=None)

    def still_pickable(self, candidates: Sequence[Candidate], best: float) -> list[Candidate]:
        """Return the candidates that some continuation of training could still make the pick.

        The best metric only ever improves, so a candidate outside the tolerance stays outside, and one that another
        beats on both metric and criterion stays beaten, because the other is within the tolerance whenever it is.
        While some candidate qualifies, an unqualified one can never be picked: only a better metric can end that, and
        then the pick is the newcomer that brought it.
        """
        qualified = self.qualified(candidates, best)
        if not qualified:
            return [c for c in candidates if c.goodness == best][:1]
        return [
            c
            for position, c in enumerate(qualified)
            if not any(
                other.goodness >= c.goodness
                and (other.criterion > c.criterion or (other.criterion == c.criterion and rival < position))
                for rival, other in enumerate(qualified)
            )
        ]


def picks(
    records: Sequence[SpectrumRecord], tolerance: float = LOSS_TOLERANCE, *, fallback: bool = True
) -> dict[str, SpectrumRecord]:
    """Return the record that each rule of `CRITERIA` picks, by the loss over the analysis samples.

    Only MP spectra count. The start is no candidate.

    Args:
        records: The records of a run, or of several checkpoints.
        tolerance: How far the loss may lie above the lowest one, absolute.
        fallback: Whether the lowest loss wins if none of the candidates is MP, rather than nobody.
    """
    analysed = [(r, r.spectrum) for r in records if r.epoch != START_EPOCH and r.spectrum and not r.spectrum.reason]
    best = max((-spectrum.loss for _, spectrum in analysed), default=0.0)
    rule = SelectionRule(tolerance, require_mp=True)
    found = {}
    for name, criterion in CRITERIA.items():
        candidates = [
            Candidate(r.epoch, r.global_step, -s.loss, criterion(s), s.hesd_type == "MP", str(place))
            for place, (r, s) in enumerate(analysed)
        ]
        if not fallback and not rule.qualified(candidates, best):
            continue
        if (pick := rule.pick(candidates, best)) is not None:
            found[name] = analysed[int(pick.path)][0]
    return found


@dataclass(frozen=True)
class Choice:
    """What a rule made of the latest analysed state of the weights.

    Attributes:
        rule: Its name.
        train_metric: Key of the training metric; None: the mean loss of the analysis.
        train_metric_mode: Whether more of it is better.
        selection: The parameters of the rule.
        newcomer: The latest state.
        pick: Which state the rule takes by now.
    """

    rule: str
    train_metric: str | None
    train_metric_mode: Literal["min", "max"]
    selection: SelectionRule
    newcomer: Candidate
    pick: Candidate | None

    @property
    def key(self) -> str:
        """What tells the rule from others that one run may have."""
        metric, whom = self.train_metric or "loss", "mp" if self.selection.require_mp else "all"
        return f"{self.rule}/{metric}/{self.selection.tolerance:g}/{whom}"
