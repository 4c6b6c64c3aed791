"""The figures of the report, in the layout of the paper's. No pyplot; colors are those of Okabe & Ito (2008)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightning_hesd.plotting import plot_density
from lightning_hesd.spectra.criteria import DELTA_K_H05_THRESHOLD, DELTA_R_E_THRESHOLD, MP_THRESHOLD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from examples.paper_hesd.outcomes import Outcome, Point
    from examples.paper_hesd.rules import Difference
    from lightning_hesd import Spectrum
    from lightning_hesd.spectra.assessment import Assessment

SEED_0 = {"ResNet": "resnet-adamw-seed0", "ViT": "vit-adamw-seed0"}
BLACK, BLUE, VERMILION, GREEN, ORANGE = "black", "#0072B2", "#D55E00", "#009E73", "#E69F00"
WIDTH, HEIGHT, DPI = 4.1, 3.3, 110
LINE = {"marker": "o", "markersize": 4, "linewidth": 1}


def panels(count: int, *, height: float = HEIGHT, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels."""
    figure = Figure(figsize=(WIDTH * max(count, 2), height * rows), dpi=DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, count, index + 1) for index in range(rows * count)]


def densities(spectra: Mapping[str, Spectrum]) -> Figure:
    """Draw densities side by side."""
    figure, axes = panels(len(spectra))
    for ax, (title, spectrum) in zip(axes, spectra.items(), strict=True):
        plot_density(spectrum, ax, title)
    return figure


def c_t_curves(outcomes: Mapping[str, Outcome]) -> Figure:
    """Draw C_t over epochs, a panel for each outcome."""
    figure, axes = panels(len(outcomes))
    for ax, (title, outcome) in zip(axes, outcomes.items(), strict=True):
        draw_c_t(ax, outcome.points)
        ax.set_title(title, fontsize=10)
    return figure


def density_and_curve(spectra: Mapping[str, Spectrum], *outcomes: Outcome) -> Figure:
    """Draw densities, and beside them C_t over epochs, of their network and of others for comparison."""
    figure, axes = panels(len(spectra) + 1)
    for ax, (title, spectrum) in zip(axes, spectra.items(), strict=False):
        plot_density(spectrum, ax, title)
    for outcome, (color, style) in zip(outcomes, ((BLACK, "-"), (BLUE, "--"), (ORANGE, ":")), strict=False):
        draw_c_t(axes[-1], outcome.points, color, style, outcome.experiment.name)
    axes[-1].legend(fontsize=8.5, loc="lower right")
    return figure


def draw_c_t(ax: Axes, points: Sequence[Point], color: str = BLACK, style: str = "-", label: str = "") -> None:
    """Draw C_t with its interval and the threshold, on an axis that is logarithmic away from zero."""
    low, high = zip(*(point.spectrum.c_t_interval for point in points), strict=True)
    values = [point.spectrum.c_t for point in points]
    errors = [[v - a for v, a in zip(values, low, strict=True)], [b - v for v, b in zip(values, high, strict=True)]]
    epochs = [point.epoch for point in points]
    ax.errorbar(epochs, values, errors, color=color, ecolor="0.6", capsize=2, linestyle=style, label=label, **LINE)  # type: ignore[arg-type]
    threshold(ax)
    epoch_axis(ax)


def threshold(ax: Axes) -> None:
    """Draw the threshold of C_t, on an axis that begins below all values."""
    ax.axhline(MP_THRESHOLD, color=VERMILION, linewidth=1, linestyle="--")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(min(-1.5, 1.3 * ax.dataLim.y0), 0)
    ax.yaxis.set_major_locator(FixedLocator([-10, -1, MP_THRESHOLD, -0.1, -0.01, 0]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylabel("$C_t$")


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))


def mathtext(rule: str) -> str:
    """Return the name of a rule as a figure shows it."""
    symbols = {"C_t": "$C_t$", "λ_max": r"$\lambda_{\max}$", "K_H05": "$K_{H05}$", "r_e": "$r_e$"}
    for symbol, formula in symbols.items():
        rule = rule.replace(symbol, formula)
    return rule


def epoch_axis(ax: Axes) -> None:
    """Label the axis of epochs."""
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=True, alpha=0.3)


def criteria_curves(outcome: Outcome) -> Figure:
    """Draw Fig. 8: accuracies, r_e and K_H05 on training and on generalization data."""
    figure, axes = panels(3)
    epochs = [point.epoch for point in outcome.points]
    series = (
        ("accuracy", [p.train_acc for p in outcome.points], [p.gen_acc for p in outcome.points]),
        ("$r_e$", [p.spectrum.r_e for p in outcome.points], [_generalization(p).r_e for p in outcome.points]),
        (
            "$K_{H05}$",
            [p.spectrum.k_h(0.5) for p in outcome.points],
            [_generalization(p).k_h(0.5) for p in outcome.points],
        ),
    )
    for ax, (label, training, generalization) in zip(axes, series, strict=True):
        ax.plot(epochs, training, color=BLUE, label="training data", **LINE)  # type: ignore[arg-type]
        ax.plot(epochs, generalization, color=VERMILION, label="generalization data", linestyle="--", **LINE)  # type: ignore[arg-type]
        if label != "accuracy":
            ax.set_yscale("log")
            plain_log(ax.yaxis)
        ax.set_title(label, fontsize=10)
        epoch_axis(ax)
    axes[0].legend(fontsize=9)
    return figure


def _generalization(point: Point) -> Spectrum:
    assert point.record.generalization is not None
    return point.record.generalization


def picks_over_epochs(runs: Mapping[str, tuple[Outcome, Mapping[str, Point]]]) -> Figure:
    """Draw Fig. 9: largest eigenvalue, C_t and generalization accuracy, and the picks of two rules."""
    figure = Figure(figsize=(2 * WIDTH, 7.0), dpi=DPI, layout="constrained")
    for column, (title, (outcome, picks)) in enumerate(runs.items()):
        series = (
            (r"$\lambda_{\max}$", {p.epoch: p.spectrum.lambda_max for p in outcome.points}),
            ("$C_t$", {p.epoch: p.spectrum.c_t for p in outcome.points}),
            ("generalization accuracy", {p.epoch: p.gen_acc for p in outcome.points}),
        )
        for row, (label, values) in enumerate(series):
            ax = figure.add_subplot(3, len(runs), row * len(runs) + column + 1)
            ax.plot(list(values), list(values.values()), color="0.4", markerfacecolor="white", **LINE)  # type: ignore[arg-type]
            filled = [p.epoch for p in outcome.candidates]
            ax.plot(filled, [values[e] for e in filled], "o", color="0.4", markersize=4, label="candidate")
            styles = ((BLUE, "^", 9, BLUE), (VERMILION, "v", 11, "none"))
            for (rule, point), (color, marker, size, face) in zip(picks.items(), styles, strict=True):
                picked = f"{mathtext(rule)} ({point.epoch})"
                ax.plot([point.epoch], [values[point.epoch]], marker, color=color, markersize=size,
                        markerfacecolor=face, markeredgewidth=1.6, label=picked)  # fmt: skip
            if row == 0:
                ax.set_yscale("log")
                ax.set_ylim(top=12 * max(values.values()))  # room for the legend
                plain_log(ax.yaxis)
                ax.set_title(title, fontsize=10)
                ax.legend(fontsize=8.5, loc="upper center")
            ax.set_ylabel(label)
            epoch_axis(ax)
    return figure


def algorithm(assessments: Mapping[str, Sequence[Assessment]]) -> Figure:
    """Draw the criteria of Fig. 10 on data with poor and with good generalization."""
    figure, [ax] = panels(1, height=4.2)
    for (label, found), (color, marker) in zip(
        assessments.items(), ((VERMILION, "x"), (BLUE, "o"), (GREEN, "+"), (ORANGE, "s")), strict=False
    ):
        ax.plot([a.delta_r_e for a in found], [a.delta_k_h05 for a in found], marker, color=color, label=label,
                markerfacecolor="none", markersize=7, linestyle="none")  # fmt: skip
    ax.axvline(DELTA_R_E_THRESHOLD, color="0.4", linestyle="--", linewidth=1)
    ax.axhline(DELTA_K_H05_THRESHOLD, color="0.4", linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_log(ax.xaxis)
    plain_log(ax.yaxis)
    ax.set_xlabel("$\\Delta r_e$")
    ax.set_ylabel("$\\Delta K_{H05}$")
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def preconditioned(outcomes: Mapping[str, Outcome]) -> Figure:
    """Draw C_t of the Hessian and of the preconditioned one, a panel for each outcome."""
    columns = min(len(outcomes), 3)
    figure, axes = panels(columns, rows=math.ceil(len(outcomes) / columns), height=2.8)
    for ax, (title, outcome) in zip(axes, outcomes.items(), strict=False):
        plain = {p.epoch: p.spectrum.c_t for p in outcome.points}
        seen = {p.epoch: p.record.preconditioned.c_t for p in outcome.points if p.record.preconditioned}
        ax.plot(list(plain), list(plain.values()), color=BLACK, label="Hessian", **LINE)  # type: ignore[arg-type]
        ax.plot(list(seen), list(seen.values()), color=BLUE, linestyle="--", label="preconditioned", **LINE)  # type: ignore[arg-type]
        threshold(ax)
        ax.set_title(title, fontsize=10)
        epoch_axis(ax)
    for ax in axes[len(outcomes) :]:
        ax.set_visible(False)
    axes[0].legend(fontsize=8.5)
    return figure


def rule_differences(differences: Mapping[str, Mapping[str, Difference]]) -> Figure:
    """Draw how much better each rule's picks generalize than the last epoch's, a panel for each network."""
    figure, axes = panels(len(differences), height=3.8)
    for ax, (title, by_rule) in zip(axes, differences.items(), strict=False):
        names = list(by_rule)[::-1]
        for position, name in enumerate(names):
            mean, low, high = (100 * value for value in by_rule[name])
            color = {1: BLUE, 0: "0.4", -1: VERMILION}[by_rule[name].sign]
            ax.plot([low, high], [position, position], color=color, linewidth=2)
            ax.plot([mean], [position], "o", color=color, markersize=5)
        ax.axvline(0, color=BLACK, linewidth=0.8)
        ax.set_yticks(range(len(names)), map(mathtext, names), fontsize=8.5)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("more than the last epoch, points")
        ax.grid(visible=True, axis="x", alpha=0.3)
    return figure
