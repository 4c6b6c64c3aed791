"""One scalar over a run: each quantity has a chart of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.plotting.style import COLORS, RunAxis, free_corner, new_axes, typeset
from lightning_hesd.spectra.criteria import DELTA_K_H05_THRESHOLD, DELTA_R_E_THRESHOLD
from lightning_hesd.spectra.scalars import RECORD_SCALARS, SPECTRUM_SCALARS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.scalars import Scalar
    from lightning_hesd.spectra.spectrum import Spectrum

THRESHOLDS = {"delta_r_e": DELTA_R_E_THRESHOLD, "delta_k_h05": DELTA_K_H05_THRESHOLD, "stability_ratio": 1.0}
"""Thresholds that charts of these scalars show."""

WIDE = 10.0
"""Ratio of the largest to the smallest value from which on the axis is logarithmic."""

FEW = 40
"""Largest number of records that have a mark each."""

MANY = 8
"""Largest number of curves whose legend stands among them; that of more stands beside them."""

MARKS = "os^Dv"


@dataclass(frozen=True)
class Curve:
    """The values of a scalar at the positions of the records; NaN where there is none."""

    label: str
    positions: Sequence[int]
    values: NDArray[np.float64]
    style: Mapping[str, Any]


def plot_scalar(
    history: Sequence[SpectrumRecord] | Mapping[str, Sequence[SpectrumRecord]],
    key: str,
    ax: Axes | None = None,
    *,
    title: str = "",
) -> Axes:
    """Draw a scalar of the records over a run or over several, on generalization data, too, if these were analyzed.

    The axis is logarithmic for positive eigenvalues, losses and the like, if they differ by a factor of ten or more.
    The curve has a gap where the scalar is undefined. A dotted line shows the threshold of Δr_e, ΔK_H05 and the
    stability ratio.

    Args:
        history: The records, or those of several runs by the titles of the runs; over steps rather than epochs if an
            epoch has several.
        key: Key of the scalar in logs without its prefix, such as "lambda_max", "loss" or "delta_r_e"; or the key of a
            metric of the network, such as "val_acc".
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
        title: Text above the figure.

    Raises:
        ValueError: If no record has such a scalar or metric, or there are no records.
    """
    histories = history if isinstance(history, Mapping) else {"": history}
    axis = RunAxis.of(*histories.values())
    curves = _curves(histories, key, axis)
    if not curves:
        known = dict.fromkeys(name for records in histories.values() for name in _known(records))
        msg = f"no record has a value of {key!r}: pass one of {', '.join(known)}."
        raise ValueError(msg)
    ax = ax or new_axes()
    mark_size = 4 if len(axis.positions) <= FEW else 0
    for curve in curves:
        ax.plot(curve.positions, curve.values, label=curve.label, linewidth=1.2, markersize=mark_size, **curve.style)
    scalar = SPECTRUM_SCALARS.get(key) or RECORD_SCALARS.get(key)
    if key in THRESHOLDS:
        ax.axhline(THRESHOLDS[key], color="black", linestyle=":", linewidth=1, label=f"threshold {THRESHOLDS[key]:g}")
    found = np.concatenate([curve.values for curve in curves])
    low, high = np.nanmin(found), np.nanmax(found)
    if scalar is not None and scalar.is_logarithmic and low > 0 and high >= WIDE * low:
        ax.set_yscale("log")
    axis.label_on(ax)
    ax.set_ylabel(_label(scalar) if scalar else key)
    ax.set_title(title, fontsize=10)
    ax.grid(visible=True, alpha=0.3)
    if len(curves) > MANY:
        ax.legend(fontsize=7, handlelength=1.6, loc="center left", bbox_to_anchor=(1.01, 0.5))
    elif len(curves) > 1 or key in THRESHOLDS:
        at = np.concatenate([*(curve.positions for curve in curves), axis.positions])
        threshold = np.full(len(axis.positions), THRESHOLDS.get(key, math.nan))
        place = free_corner(ax, at, np.concatenate([found, threshold]))
        ax.legend(fontsize=9, framealpha=0.9, handlelength=1.6, loc=place)
    return ax


def _curves(histories: Mapping[str, Sequence[SpectrumRecord]], key: str, axis: RunAxis) -> list[Curve]:
    """Return the curves that have a value: each of one run in its own color, else one color for each run."""
    curves = []
    for number, (run, history) in enumerate(histories.items()):
        for place, (name, values) in enumerate(_values(history, key).items()):
            if len(histories) == 1:
                label, style = name, {"color": COLORS[place], "marker": MARKS[place]}
            else:
                label = f"{run}, {name}" if place else run
                style = {"color": COLORS[number % len(COLORS)], "marker": MARKS[number // len(COLORS) % len(MARKS)]}
                style["linestyle"] = "--" if place else "-"
            if np.isfinite(values).any():
                curves.append(Curve(label, axis.positions_of(history), values, style))
    return curves


def _label(scalar: Scalar) -> str:
    unit = f" ({scalar.unit})" if scalar.unit not in ("", scalar.title) else ""
    return f"{typeset(scalar.title)}{unit}"


def _values(history: Sequence[SpectrumRecord], key: str) -> dict[str, NDArray[np.float64]]:
    """Return the values over the records by the data that they are of; NaN where there is none."""
    if key in RECORD_SCALARS:
        return {typeset(RECORD_SCALARS[key].title): np.array([RECORD_SCALARS[key].of(record) for record in history])}
    if key not in SPECTRUM_SCALARS:
        return {key: np.array([record.metrics.get(key, math.nan) for record in history])}

    def of(spectrum: Spectrum | None) -> float:
        return math.nan if spectrum is None else SPECTRUM_SCALARS[key].of(spectrum)

    return {
        "training data": np.array([of(record.spectrum) for record in history]),
        "generalization data": np.array([of(record.generalization) for record in history]),
    }


def _known(history: Sequence[SpectrumRecord]) -> list[str]:
    metrics = dict.fromkeys(name for record in history for name in record.metrics)
    return [
        key
        for key in [*SPECTRUM_SCALARS, *RECORD_SCALARS, *metrics]
        if any(np.isfinite(values).any() for values in _values(history, key).values())
    ]
