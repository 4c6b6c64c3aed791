"""Gains of checkpoint rules over a baseline: means with intervals, and single runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, new_axes, typeset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

NEUTRAL = "0.35"


def plot_gains(
    titles: Sequence[str],
    gains: ArrayLike,
    intervals: ArrayLike,
    *,
    evident: ArrayLike,
    first_baseline: int,
    label: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw a forest plot: a row for each rule with its mean gain, its interval, and a point for each run.

    Means that are evidently different from zero are colored. A line separates rules from baselines.

    Args:
        titles: Titles of the rows, from top to bottom.
        gains: Gains in each run, shape (runs, rows); NaN: none.
        intervals: Lower end, mean and upper end, shape (3, rows); NaN: none.
        evident: Which rows are evidently better or worse, shape (rows,).
        first_baseline: Position of the first row that is a baseline rather than a rule.
        label: Name of the horizontal axis.
        ax: Axes to draw on; default: those of a new figure, as high as the rows need.
    """
    points = np.asarray(gains, dtype=np.float64)
    low, mean, high = np.asarray(intervals, dtype=np.float64)
    rows = np.arange(len(titles))
    if ax is None:
        ax = new_axes(5.6, 1.1 + 0.28 * len(titles))
    ax.axvline(0, color="black", linewidth=1)
    for row in rows:
        ax.plot(points[:, row], np.full(len(points), row), "|", color="0.7", markersize=6, zorder=1.5)
        color = NEUTRAL if not np.asarray(evident)[row] else POSITIVE if mean[row] > 0 else NEGATIVE
        filled = color if row < first_baseline else "white"
        ax.plot([low[row], high[row]], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        ax.plot([mean[row]], [row], "o", color=color, markerfacecolor=filled, markersize=6, zorder=3)
    if 0 < first_baseline < len(titles):
        ax.axhline(first_baseline - 0.5, color="0.6", linestyle=":", linewidth=1)
    ax.set_yticks(rows, [typeset(title) for title in titles])
    ax.set_ylim(len(titles) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(visible=True, axis="x", alpha=0.3)
    ax.tick_params(axis="y", length=0)
    return ax
