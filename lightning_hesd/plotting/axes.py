"""Axes of figures: along a run, of epochs or steps; and logarithmic for both signs, linear around zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.spectra.record import SpectrumRecord

FEW = 8
"""Largest number of analyses that have a tick each."""

ROOM = 0.09
"""Least distance of a tick from that of the start, as a share of the axis, so that labels do not overlap."""


@dataclass(frozen=True)
class RunAxis:
    """The horizontal axis of a run.

    Attributes:
        positions: Epoch or step of each record, ascending.
        label: "epoch" or "step".
    """

    positions: tuple[int, ...]
    label: str

    @classmethod
    def of(cls, records: Sequence[SpectrumRecord]) -> RunAxis:
        """Return epochs, or optimizer steps where an epoch has several records.

        Raises:
            ValueError: If there are no records.
        """
        if not records:
            msg = "the history has no record: was anything analyzed?"
            raise ValueError(msg)
        epochs = tuple(record.epoch for record in records)
        if len(set(epochs)) == len(epochs):
            return cls(epochs, "epoch")
        return cls(tuple(record.global_step for record in records), "step")

    def name(self, position: int) -> str:
        """Return the label of a tick."""
        return "start" if (self.label, position) == ("epoch", START_EPOCH) else f"{position}"

    def ticks(self) -> list[int]:
        """Return positions of ticks: those of all analyses if they are few, else round numbers and the start."""
        first, last = self.positions[0], self.positions[-1]
        if len(self.positions) <= FEW and min(np.diff(self.positions), default=last - first) > ROOM * (last - first):
            return list(self.positions)
        clear = first + ROOM * (last - first) if self.name(first) == "start" else first
        regular = MaxNLocator(7, integer=True).tick_values(max(first, 0), last)
        starts = [first] if self.name(first) == "start" else []
        return [*starts, *(int(tick) for tick in regular if clear <= tick <= last)]

    def edges(self) -> NDArray[np.float64]:
        """Return the borders of a cell around each position: halfway to its neighbors."""
        at = np.array(self.positions, dtype=np.float64)
        if len(at) == 1:
            return np.array([at[0] - 0.5, at[0] + 0.5])
        between = (at[1:] + at[:-1]) / 2
        return np.array([2 * at[0] - between[0], *between, 2 * at[-1] - between[-1]])

    def label_on(self, ax: Axes) -> None:
        """Give the horizontal axis its ticks and its name."""
        ticks = self.ticks()
        ax.set_xticks(ticks, [self.name(tick) for tick in ticks])
        ax.set_xlabel(self.label)


MAX_DECADES = 5
"""Number of decades of the axis: much smaller values are drawn near zero."""

LABELS_PER_SIGN = 4


def linear_threshold(sizes: Iterable[float]) -> float:
    """Return a power of ten just below the smallest of these sizes that is not zero; 1 where all are zero."""
    present = [size for size in map(abs, sizes) if 0 < size < math.inf]
    if not present:
        return 1.0
    smallest = max(min(present), max(present) * 10.0**-MAX_DECADES)
    return 10.0 ** math.floor(math.log10(smallest) + 1e-9)


def set_signed_log(ax: Axes, threshold: float, low: float, high: float, *, linear_part: float = 1.0) -> None:
    """Make the vertical axis linear within `threshold` of zero, logarithmic beyond, and label its decades.

    Args:
        ax: The axes.
        threshold: A power of ten.
        low: Lower end of the axis.
        high: Upper end of the axis.
        linear_part: Length of the axis from zero to the threshold, in decades.
    """
    ax.set_yscale("symlog", linthresh=threshold, linscale=linear_part)
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(FixedLocator(_ticks(threshold, low, high)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _ticks(threshold: float, low: float, high: float) -> list[float]:
    ticks = [0.0] if low <= 0 <= high else []
    lowest = round(math.log10(threshold))
    highest = math.floor(math.log10(max(abs(low), abs(high), threshold)) + 1e-9)
    every = 1 + (highest - lowest) // LABELS_PER_SIGN
    # Counted from the outermost: the decades next to zero are the closest to each other.
    sizes = [10.0**exponent for exponent in range(highest, lowest - 1, -every)]
    return [*(-size for size in sizes if -size >= low), *ticks, *(size for size in sizes if size <= high)]


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    return rf"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$"
