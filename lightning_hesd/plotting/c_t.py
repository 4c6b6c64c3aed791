"""C_t over a run, the ratio of the extreme negative and positive curvatures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_hesd.plotting.style import (
    NEGATIVE,
    OTHER,
    POSITIVE,
    RunAxis,
    free_corner,
    linear_threshold,
    mark_at_bottom,
    new_axes,
    set_signed_log,
    typeset,
)
from lightning_hesd.spectra.criteria import MP_THRESHOLD
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.selection import candidates_of, picks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum

LINEAR_FROM = 0.05
"""A linear axis shows values of this size and larger well enough."""

SMALLEST = 1e-4
"""Smaller values are drawn near zero."""

PICK_COLORS = (POSITIVE, NEGATIVE, OTHER, "#CC79A7", "#E69F00")
"""Colors of the picks, one for each rule."""

MAX_DEPTH = 100.0
"""Lower end of the axis: spectra far below -1 hardly differ."""


def plot_c_t(
    history: Sequence[SpectrumRecord], ax: Axes | None = None, *, tolerance: float | Literal["auto"] | None = "auto"
) -> Axes:
    """Draw C_t over a run, with its interval, the threshold between MP and MN, and the picks of the rules.

    Points are hollow where the interval contains both types. Candidates have a ring. Failed analyses, and those that
    found no curvature, are marked at the bottom. C_t on generalization data is drawn if these were analyzed. The axis
    is logarithmic if there are values near zero.

    Args:
        history: The records; over steps rather than epochs if an epoch has several.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
        tolerance: Candidates are MP spectra with a loss within this of the lowest one; "auto": within 5 % of the drop
            from the first analyzed loss to the lowest; None: no picks.

    Raises:
        ValueError: If the history is empty.
    """
    axis = RunAxis.of(history)
    ax = ax or new_axes()
    at = np.array(axis.positions)
    curves = {"training": [record.spectrum for record in history]}
    if any(record.generalization for record in history):
        curves["generalization"] = [record.generalization for record in history]
    found = [spectrum for curve in curves.values() for spectrum in curve if spectrum is not None]
    _set_scale(ax, found)
    _shade(ax)
    styles: tuple[dict[str, Any], ...] = ({"color": "0.15", "marker": "o"}, {"color": OTHER, "marker": "s"})
    for (label, curve), style in zip(curves.items(), styles, strict=False):
        _draw(ax, at, curve, style, label if len(curves) > 1 else "$C_t$ and its interval")
    if tolerance is not None:
        _mark_picks(ax, axis, history, None if tolerance == "auto" else tolerance)
    mark_at_bottom(ax, at[[record.spectrum is None for record in history]])
    undefined = [record.spectrum is not None and math.isnan(record.spectrum.c_t) for record in history]
    mark_at_bottom(ax, at[undefined], "d", "undefined")
    axis.label_on(ax)
    ax.set_ylabel("$C_t$")
    ax.grid(visible=True, alpha=0.3)
    heights = np.array([_value(spectrum) for curve in curves.values() for spectrum in curve])
    place = free_corner(ax, np.tile(at, len(curves)), np.nan_to_num(heights, nan=ax.get_ylim()[0]))
    ax.legend(fontsize=8, framealpha=0.9, handlelength=1.4, loc=place)
    return ax


def _set_scale(ax: Axes, spectra: Sequence[Spectrum]) -> None:
    """Choose the scale of the vertical axis."""
    values = [spectrum.c_t for spectrum in spectra if math.isfinite(spectrum.c_t)]
    bottom = max(1.2 * min([-1.0, *values]), -MAX_DEPTH)
    sizes = [abs(value) for value in values if abs(value) >= SMALLEST]
    if min(sizes, default=1.0) >= LINEAR_FROM:
        ax.set_ylim(bottom, -0.03 * bottom)
    else:
        threshold = linear_threshold(sizes)
        set_signed_log(ax, threshold, bottom, 0.5 * threshold, linear_part=0.4)


def _shade(ax: Axes) -> None:
    """Draw the threshold, and colors and names of the two types."""
    bottom, top = ax.get_ylim()
    ax.axhline(MP_THRESHOLD, color="black", linestyle=":", linewidth=1)
    for low, high, color, name, offset, side in (
        (MP_THRESHOLD, top, POSITIVE, "MP", 2, "bottom"),
        (bottom, MP_THRESHOLD, NEGATIVE, "MN", -3, "top"),
    ):
        ax.axhspan(low, high, color=color, alpha=0.07, linewidth=0)
        ax.annotate(
            name, (1, MP_THRESHOLD), (3, offset), ("axes fraction", "data"), "offset points",
            color=color, fontsize=8, horizontalalignment="left", verticalalignment=side,
        )  # fmt: skip


def _value(spectrum: Spectrum | None) -> float:
    return math.nan if spectrum is None else spectrum.c_t


def _draw(ax: Axes, at: Any, curve: Sequence[Spectrum | None], style: dict[str, Any], label: str) -> None:
    """Draw one curve with its band; the curve has a gap where C_t is undefined."""
    bottom = ax.get_ylim()[0]
    nothing = (math.nan, math.nan)
    values = np.array([_value(spectrum) for spectrum in curve])
    low, high = np.array([nothing if spectrum is None else spectrum.c_t_interval for spectrum in curve]).T
    low, high = low.clip(bottom), high.clip(bottom)
    color, size = style["color"], 4.0 if len(at) <= 40 else 2.5
    ax.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
    ax.vlines(at, low, high, color=color, alpha=0.5, linewidth=1)  # a band of a single analysis has no area
    beyond = values < bottom
    shown = np.where(beyond, bottom, values)
    ax.plot(at, shown, color=color, linewidth=1, marker=style["marker"], markersize=size, label=label)
    open_ones = np.array([spectrum is not None and not spectrum.type_certain for spectrum in curve])
    open_ones &= np.isfinite(shown)
    if open_ones.any():
        ax.plot(
            at[open_ones], shown[open_ones], style["marker"], color=color, markersize=size + 1,
            markerfacecolor="white", label="type uncertain", zorder=3,
        )  # fmt: skip
    if beyond.any():
        ax.plot(
            at[beyond], shown[beyond], "v", color=color, markersize=7, label="further down", clip_on=False, zorder=3
        )


def _mark_picks(ax: Axes, axis: RunAxis, history: Sequence[SpectrumRecord], tolerance: float | None) -> None:
    candidates = candidates_of(history, tolerance, fallback=False)
    places = [axis.positions[history.index(record)] for record in candidates]
    values = [_value(record.spectrum) for record in candidates]
    if candidates:
        ax.plot(
            places, values, "o", color="0.15", markersize=8, markerfacecolor="none", markeredgewidth=0.8,
            label="candidates", zorder=3.5,
        )  # fmt: skip
    picked = picks(history, tolerance, fallback=False)
    for place, rule in enumerate(RULES.values()):
        if rule.name not in picked:
            continue
        record = picked[rule.name]
        position = axis.positions[history.index(record)]
        # The first is filled, the others are outlines around it, each larger, so that all show at one record.
        style: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.6} if place else {}
        ax.plot(
            [position], [_value(record.spectrum)], marker=rule.marker, zorder=4, linestyle="none",
            markersize=8 + 2 * place, color=PICK_COLORS[place % len(PICK_COLORS)],
            label=f"{typeset(rule.title)}: {axis.label} {axis.name(position)}", **style,
        )  # fmt: skip
