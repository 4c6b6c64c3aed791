"""Comparison of a claimed derivative with estimates by differences at descending steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Outcome = Literal["agrees", "differs", "undecided"]

SETTLED = 0.1
"""Two estimates that differ by less than this share of their distance from the claim refute it."""


class Comparison:
    """A claimed value, and estimates of it at descending steps.

    Args:
        claim: A number or a vector.
        tolerance: Largest relative distance at which claim and estimate agree.
        size: Absolute value of a number, or norm of a vector.
        scale: Unit of relative distances; default: the larger size of claim and estimate.

    Attributes:
        gap: Smallest relative distance of an estimate from the claim so far.
    """

    def __init__(self, claim: Any, tolerance: float, size: Callable[[Any], float], scale: float | None = None) -> None:
        self.gap = math.inf
        self._claim, self._tolerance, self._size, self._scale = claim, tolerance, size, scale
        self._estimates: list[tuple[float, float]] = []  # gap and change, at steps where rounding is small enough
        self._agrees = False
        self._before: Any = None

    def add(self, value: Any, rounding: float) -> None:
        """Add the estimate at the next step, with its absolute rounding error."""
        scale = max(self._size(self._claim), self._size(value)) if self._scale is None else self._scale
        before, self._before = self._before, value
        if not math.isfinite(scale) or rounding > self._tolerance * scale:
            return
        gap = self._size(value - self._claim)
        self._agrees |= gap <= self._tolerance * scale + rounding
        self._estimates.append((gap, math.inf if before is None else self._size(value - before)))
        self.gap = min(self.gap, gap / scale if scale else 0.0)

    @property
    def is_hidden(self) -> bool:
        """Whether the rounding error is too large at every step."""
        return not self._estimates

    @property
    def outcome(self) -> Outcome:
        """Whether the claim agrees with an estimate, or is far from the last two, which lie close together.

        Otherwise kinks or rounding hide the answer.
        """
        if self._agrees:
            return "agrees"
        if len(self._estimates) > 1 and self._estimates[-1][1] <= SETTLED * self._estimates[-1][0]:
            return "differs"
        return "undecided"
