"""The two figures of the report, without pyplot; colors are those of Okabe & Ito (2008)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from examples.layer_study.indicators import NAMES
from examples.layer_study.words import RAW, RELEVANT, SIZE, is_seen
from lightning_hesd.plotting import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from examples.layer_study.words import Answer

DIVERGING = LinearSegmentedColormap.from_list("vermilion-white-blue", [NEGATIVE, "white", POSITIVE])
UNDEFINED = "0.8"
ROW = 0.21
VIEWS = {RAW: (POSITIVE, "o", -0.16), SIZE: (NEGATIVE, "s", 0.16)}
"""Color, marker and offset of each view; filled where the rule sees a correlation."""


def forest(answers: Sequence[Answer]) -> Figure:
    """Draw the average correlations with their intervals, a panel for each word."""
    figure = Figure(figsize=(4.2 * len(answers) + 1, 1.4 + ROW * len(NAMES)), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(answers), sharey=True, squeeze=False)[0]
    for ax, answer in zip(axes, answers, strict=True):
        ax.axvspan(-RELEVANT, RELEVANT, color="0.94", linewidth=0)
        ax.axvline(0, color="0.5", linewidth=0.8)
        for view, (color, marker, offset) in VIEWS.items():
            found = answer.views[view]
            rows, means = np.arange(len(found)) + offset, np.array([one.mean for one in found])
            ax.hlines(rows, [one.low for one in found], [one.high for one in found], color=color, linewidth=1)
            seen = np.array([is_seen(one) for one in found])
            for chosen, fill in ((seen, color), (~seen, "white")):
                ax.plot(means[chosen], rows[chosen], marker, color=color, markersize=4.5, markerfacecolor=fill)
            ax.plot([], [], f"{marker}-", color=color, markersize=4.5, linewidth=1, label=view)
        ax.set_xlim(-1, 1)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1])
        ax.set_xlabel("average rank correlation")
        ax.set_title(answer.word.name, fontsize=11)
        ax.grid(visible=True, axis="x", alpha=0.3)
        separate(ax)
    axes[0].set_yticks(range(len(NAMES)), NAMES, fontsize=8)
    axes[0].set_ylim(len(NAMES) - 0.4, -0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def heat_map(answers: Sequence[Answer], datasets: Sequence[str]) -> Figure:
    """Draw the correlations in each data set, a panel for each word."""
    figure = Figure(figsize=(2.7 * len(answers) + 3, 1.6 + ROW * len(NAMES)), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(answers), sharey=True, squeeze=False)[0]
    colors = DIVERGING.copy()
    colors.set_bad(UNDEFINED)
    for ax, answer in zip(axes, answers, strict=True):
        values = np.array([found.by_dataset for found in answer.views[RAW]])
        image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap=colors, vmin=-1, vmax=1)
        ax.set_xticks(range(len(datasets)), datasets, rotation=90, fontsize=8)
        ax.set_title(answer.word.name, fontsize=11)
        separate(ax)
    axes[0].set_yticks(range(len(NAMES)), NAMES, fontsize=8)
    figure.colorbar(image, ax=list(axes), label="Spearman's rank correlation", shrink=0.5)
    return figure


def separate(ax: Axes) -> None:
    """Draw a line between quantities."""
    quantities = [name.rsplit(", ", 1)[0] for name in NAMES]
    for row, (before, after) in enumerate(itertools.pairwise(quantities)):
        if before != after:
            ax.axhline(row + 0.5, color="0.6", linewidth=0.6)
