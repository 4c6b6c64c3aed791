"""The figures of the report, without pyplot; colors are those of Okabe & Ito (2008), sizes are shades of cividis."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.sample_study.settings import DEPTH, INITIAL, INPUTS, PIXELS, STATES, SWEEPS, TRAINED, WIDTH
from examples.sample_study.statements import QUANTITIES
from examples.sample_study.trends import logarithm, student
from lightning_hesd.plotting import NEGATIVE, POSITIVE, settling_axes
from lightning_hesd.sample_size.loss_differences import PAPER_FACTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from examples.sample_study.outcomes import Outcomes, State
    from lightning_hesd.sample_size.subspace import SubspaceStabilization

DPI = 110
COLORS = dict(zip(INPUTS, (POSITIVE, NEGATIVE), strict=True))
STYLES = {TRAINED: {"marker": "o"}, INITIAL: {"marker": "s", "linestyle": "--"}}
LABELS = {WIDTH: "hidden size", DEPTH: "number of hidden layers"}


def panels(rows: int, columns: int, height: float = 3.3) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.8 * columns, height * rows), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def differences(data: Outcomes, state: str) -> Figure:
    """Draw |L_{k+1} - L_k| as in the paper's Figure 2: widths left, depths right; pixels above, features below."""
    figure, axes = panels(len(INPUTS), len(SWEEPS))
    for row, inputs in zip(axes, INPUTS, strict=True):
        for ax, sweep in zip(row, SWEEPS, strict=True):
            settling_axes(ax, r"$|L_{k+1} - L_k|$")
            pairs, sizes = data.study.configurations(sweep), data.study.sizes(sweep)
            for pair, size, shade in zip(pairs, sizes, np.linspace(0, 0.92, len(sizes)), strict=True):
                found = [s.settling for s in data.find(inputs, state, *pair)]
                k, color = found[0].sample_sizes, colormaps["cividis"](shade)
                ax.plot(k, np.mean([s.mean for s in found], axis=0), color=color, linewidth=0.4, alpha=0.35)
                ax.plot(k, np.mean([s.smoothed() for s in found], axis=0), color=color, linewidth=1.4, label=str(size))
            ax.set_title(f"{inputs}, by {LABELS[sweep]}", fontsize=10)
            ax.legend(fontsize=7, ncols=2, loc="upper right")
    figure.suptitle(f"{state}: moving averages ({PAPER_FACTOR}), and faint the values themselves", fontsize=10)
    return figure


def tendencies(data: Outcomes) -> Figure:
    """Draw the constant c and the norms over both sweeps."""
    shown = {"c": "constant c of c/k", "c/mean loss": "c / mean loss", "‖H‖": "‖H‖", "‖G‖": "‖G‖"}
    figure, axes = panels(len(shown), len(SWEEPS), 2.5)
    for row, (quantity, label) in zip(axes, shown.items(), strict=True):
        for ax, sweep in zip(row, SWEEPS, strict=True):
            for inputs, state in itertools.product(INPUTS, STATES):
                look = {"color": COLORS[inputs], **STYLES[state], "label": f"{inputs}, {state}"}
                band(ax, data, (inputs, state, sweep), QUANTITIES[quantity], **look)
            swept(ax, data, sweep)
            ax.set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def band(
    ax: Axes, data: Outcomes, which: tuple[str, str, str], quantity: Callable[[State], float], **line: str
) -> None:
    """Draw geometric means over seeds with their 95 % intervals; `which` is inputs, state and sweep."""
    logs = logarithm(data.values(*which, quantity))
    mean, low, high = np.exp([student(column) for column in logs.T]).T
    sizes = data.study.sizes(which[-1])
    ax.plot(sizes, mean, markersize=3.5, linewidth=1.2, **line)  # type: ignore[arg-type]  # no other keyword is given
    ax.fill_between(sizes, low, high, color=line["color"], alpha=0.2, linewidth=0)


def swept(ax: Axes, data: Outcomes, sweep: str) -> None:
    """Set up the axes of a sweep: both logarithmic for widths, so that powers are straight lines, one for depths."""
    ax.set_yscale("log")
    if sweep == WIDTH:
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(data.study.sizes(sweep))))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())  # laying them out takes as long as the rest of the figure
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel(LABELS[sweep])
    ax.grid(visible=True, alpha=0.3)


def bounds(data: Outcomes) -> Figure:
    """Draw norms with their bounds over both sweeps, and Lemma 2's bounds beside the difference of one network."""
    figure, [axes] = panels(1, 3, 3.6)
    for ax, sweep in zip(axes, SWEEPS, strict=False):
        lines: Sequence[tuple[Callable[[State], float], str, str, str, str]] = (
            (lambda s: s.numbers.tight_hessian, "bound on ‖H‖ that holds", POSITIVE, "^", ":"),
            (lambda s: s.numbers.published, "Theorem 1 (on ‖G‖)", NEGATIVE, "v", "-"),
            (lambda s: s.numbers.tight_ggn, "bound on ‖G‖ that holds", "0.4", "s", ":"),
            (lambda s: s.numbers.hessian, "‖H‖ measured", POSITIVE, "o", "-"),
            (lambda s: s.numbers.ggn, "‖G‖ measured", "0.4", "x", "--"),
        )
        for quantity, label, color, marker, style in lines:
            look = {"label": label, "color": color, "marker": marker, "linestyle": style}
            band(ax, data, (PIXELS, TRAINED, sweep), quantity, **look)
        swept(ax, data, sweep)
        ax.set_title("pixels, trained", fontsize=10)
    axes[1].legend(fontsize=7, loc="upper left")
    study, ax = data.study, axes[-1]
    state = data.find(PIXELS, TRAINED, study.width, study.depth)[0]
    settling_axes(ax, r"$|L_{k+1} - L_k|$")
    k = state.settling.sample_sizes
    ax.plot(k, state.settling.mean, color=POSITIVE, linewidth=0.8, label="measured at the weights")
    for radius, style in zip(study.setup.radii, ("-", "-.", "--", ":"), strict=False):
        moved = next(d for d in state.displaced if d.relative == radius)
        height = float(state.losses.max()) + state.numbers.published * moved.radius**2
        label = f"Lemma 2, R = {radius:.0%} of ‖w‖"
        ax.plot(k, 2 * height / (k + 1), style, color=NEGATIVE, linewidth=1.2, label=label)
    ax.plot(k, moved.constant / k, color="black", linewidth=1, label=f"measured at R = {radius:.0%}, fit")
    ax.set_ylim(top=ax.get_ylim()[1] * 1e3)  # for the legend
    ax.set_title(f"pixels, width {study.width}, {study.depth} hidden layers, seed 0", fontsize=10)
    ax.legend(fontsize=7)
    return figure


def subspace(found: Sequence[SubspaceStabilization]) -> Figure:
    """Draw the follow-up's criterion at several distances."""
    figure, [axes] = panels(1, len(found))
    for ax, one in zip(axes, found, strict=True):
        one.plot(ax)
    return figure
