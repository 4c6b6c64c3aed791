"""The figure: results of the candidates for every problem, in gradients or relative to ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.candidates import OURS, TOLERANCE
from benchmarks.report import relative, summarize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.report import Summary

STYLES = {
    OURS.name: ("#0b5fa5", "D"),
    "PyHessian's loop": ("#7f7f7f", "o"),
    "hessian-eigenthings": ("#d1495b", "s"),
    "hessian-eigenthings, differences": ("#edae49", "s"),
    "curvlinops": ("#2e8b57", "^"),
    "torch.func.linearize": ("#8e6bb0", "v"),
}
PANELS = [
    ("one product, in gradients", None),
    (f"seconds to $C_t$ within {TOLERANCE:.0%}, ours = 1", "c_t_seconds"),
    ("seconds to the density, ours = 1", "density_seconds"),
    ("peak memory of the density, ours = 1", "peak_bytes"),
]


def draw(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the medians of all entries into a PNG."""
    summaries = [summarize(entry) for entry in entries]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 1.6 + 0.55 * len(summaries)), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for ax, (heading, key) in zip(axes, PANELS, strict=True):
            _draw_panel(ax, summaries, key)
            ax.set_title(heading, fontsize=10, loc="left")
        axes[0].set_yticks(range(len(summaries)), [next(iter(rows.values())).problem for rows in summaries])
        axes[0].set_ylim(len(summaries) - 0.5, -0.5)
        handles = [axes[0].plot([], [], marker, color=color, label=name)[0] for name, (color, marker) in STYLES.items()]
        missed = f"$C_t$ off by more than {TOLERANCE:.0%}"
        handles += axes[0].plot([], [], "o", color="black", mfc="white", label=missed)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.savefig(path, dpi=110)


def _draw_panel(ax: Axes, summaries: list[dict[str, Summary]], key: str | None) -> None:
    for row, candidates in enumerate(summaries):
        if row % 2:
            ax.axhspan(row - 0.5, row + 0.5, color="0.96", lw=0, zorder=0)
        for number, (name, (color, marker)) in enumerate(STYLES.items()):
            if name not in candidates:
                continue
            value = candidates[name].gradients if key is None else relative(candidates, name, key)
            error = candidates[name].whole.get("error")
            missed = key == "c_t_seconds" and error is not None and error > TOLERANCE
            if value is not None:
                face = "white" if missed else color
                height = row + 0.12 * (number - (len(STYLES) - 1) / 2)
                ax.plot(value, height, marker, color=color, mfc=face, ms=6, clip_on=False)
    if key is not None:
        ax.set_xscale("log", base=2)
        ax.axvline(1, color="0.5", lw=0.8, zorder=0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(left=0)
    ax.tick_params(left=False)
