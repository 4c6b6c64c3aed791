"""Layers over the epochs of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lightning_hesd.plotting.style import RunAxis, typeset
from lightning_hesd.spectra.indicators import layer_indicators
from lightning_hesd.spectra.scalars import LAYER_SCALARS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum


def plot_layers(
    history: Sequence[SpectrumRecord] | Mapping[int, Mapping[str, Spectrum]],
    quantity: str = "lambda_max",
    ax: Axes | None = None,
    *,
    xlabel: str | None = None,
) -> Axes:
    """Draw a heat map of a quantity: layers over the analyses of a run.

    Args:
        history: The records, or epoch -> spectra by layer, as in `SpectrumRecord.layers`; the layers of the last one
            are drawn. Epoch -1 is the start.
        quantity: A key of `LAYER_SCALARS`, such as "c_t" or "trace".
        ax: Axes to draw on; default: those of a new figure whose height fits the number of layers.
        xlabel: Label of the horizontal axis; default: "epoch" or "step".

    Raises:
        ValueError: If no record has layers, or `quantity` is unknown.
    """
    if quantity not in LAYER_SCALARS:
        msg = f"`quantity` must be one of {', '.join(LAYER_SCALARS)}, got {quantity!r}."
        raise ValueError(msg)
    scalar = LAYER_SCALARS[quantity]
    layers, found_label = (history, "epoch") if isinstance(history, Mapping) else _by_position(history)
    if not layers:
        msg = "`history` has no spectra of layers: was the callback given `layers`?"
        raise ValueError(msg)
    epochs = list(layers)
    names = list(layers[epochs[-1]])
    found = [layer_indicators(layers[epoch]) for epoch in epochs]
    values = np.array([[scalar.of(f[n]) if n in f else math.nan for f in found] for n in names])
    logarithmic = scalar.is_logarithmic and bool((values > 0).any())
    if logarithmic:
        values = np.where(values > 0, values, math.nan)
    if ax is None:
        ax = Figure(figsize=(5.6, 1.4 + 0.24 * len(names)), dpi=120, layout="constrained").add_subplot()
    image = ax.imshow(
        values, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm() if logarithmic else None
    )
    ax.set_yticks(range(len(names)), [name if len(name) <= 28 else f"…{name[-27:]}" for name in names], fontsize=8)
    shown = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 8)).round().astype(int))
    ax.set_xticks(shown, ["start" if epochs[i] < 0 else str(epochs[i]) for i in shown], fontsize=8)
    ax.set_xlabel(xlabel or found_label)
    ax.figure.colorbar(image, ax=ax, label=typeset(scalar.title))
    return ax


def _by_position(records: Sequence[SpectrumRecord]) -> tuple[dict[int, Mapping[str, Spectrum]], str]:
    """Return the spectra of layers by their position on the axis of the run, and the label of that axis."""
    analyzed = [record for record in records if record.layers]
    if not analyzed:
        return {}, ""
    axis = RunAxis.of(analyzed)
    return {at: record.layers for at, record in zip(axis.positions, analyzed, strict=True) if record.layers}, axis.label
