"""One scalar over a run: each quantity has a chart of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.plotting.style import OTHER, POSITIVE, RunAxis, free_corner, new_axes, typeset
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


def plot_scalar(history: Sequence[SpectrumRecord], key: str, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Draw a scalar of the records over a run, on generalization data, too, if these were analyzed.

    The axis is logarithmic for positive eigenvalues, losses and the like, if they differ by a factor of ten or more.
    The curve has a gap where the scalar is undefined. A dotted line shows the threshold of Δr_e, ΔK_H05 and the
    stability ratio.

    Args:
        history: The records; over steps rather than epochs if an epoch has several.
        key: Key of the scalar in logs without its prefix, such as "lambda_max", "loss" or "delta_r_e"; or the key of a
            metric of the network, such as "val_acc".
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
        title: Text above the figure.

    Raises:
        ValueError: If no record has such a scalar or metric.
    """
    axis = RunAxis.of(history)
    curves = {name: values for name, values in _curves(history, key).items() if np.isfinite(values).any()}
    if not curves:
        msg = f"no record has a value of {key!r}: pass one of {', '.join(_known(history))}."
        raise ValueError(msg)
    ax = ax or new_axes()
    style: dict[str, Any] = {"linewidth": 1.2, "markersize": 4 if len(history) <= FEW else 0}
    for (name, values), color, mark in zip(curves.items(), (POSITIVE, OTHER), "os", strict=False):
        ax.plot(axis.positions, values, marker=mark, color=color, label=name, **style)
    scalar = SPECTRUM_SCALARS.get(key) or RECORD_SCALARS.get(key)
    if key in THRESHOLDS:
        ax.axhline(THRESHOLDS[key], color="black", linestyle=":", linewidth=1, label=f"threshold {THRESHOLDS[key]:g}")
    found = np.concatenate(list(curves.values()))
    low, high = np.nanmin(found), np.nanmax(found)
    if scalar is not None and scalar.is_logarithmic and low > 0 and high >= WIDE * low:
        ax.set_yscale("log")
    axis.label_on(ax)
    ax.set_ylabel(_label(scalar) if scalar else key)
    ax.set_title(title, fontsize=10)
    ax.grid(visible=True, alpha=0.3)
    if len(curves) > 1 or key in THRESHOLDS:
        threshold = np.full(len(history), THRESHOLDS.get(key, math.nan))
        place = free_corner(ax, np.tile(axis.positions, len(curves) + 1), np.concatenate([found, threshold]))
        ax.legend(fontsize=9, framealpha=0.9, handlelength=1.6, loc=place)
    return ax


def _label(scalar: Scalar) -> str:
    unit = f" ({scalar.unit})" if scalar.unit not in ("", scalar.title) else ""
    return f"{typeset(scalar.title)}{unit}"


def _curves(history: Sequence[SpectrumRecord], key: str) -> dict[str, NDArray[np.float64]]:
    """Return the values over the records by the names of the curves; NaN where there is none."""
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
        if any(np.isfinite(values).any() for values in _curves(history, key).values())
    ]
