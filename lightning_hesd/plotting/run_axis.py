"""The axis along a run: epochs, or steps where epochs have several analyses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Sequence

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
