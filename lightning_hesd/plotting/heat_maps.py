"""Heat maps over a run: of the spectral density, and of a quantity of each layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from matplotlib.colors import FuncNorm, LogNorm
from matplotlib.patheffects import Normal, Stroke

from lightning_hesd.plotting.decades import density_per_decade, faintest, set_decades
from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, RunAxis, mark_at_bottom, new_axes, shortened, typeset
from lightning_hesd.spectra.indicators import layer_indicators
from lightning_hesd.spectra.scalars import LAYER_SCALARS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from numpy.typing import NDArray

    from lightning_hesd.spectra.indicators import LayerIndicators
    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum

    Array: TypeAlias = NDArray[np.float64]

ROWS = 400

HEADROOM = 0.12
"""Share of the axis that is left to the legend."""


def plot_density_evolution(history: Sequence[SpectrumRecord], ax: Axes | None = None) -> Axes:
    """Draw the spectral density over a run as a heat map, with the extreme eigenvalues as lines.

    The axis of eigenvalues is logarithmic on both sides of zero, and so is the density, which counts eigenvalues per
    decade of that axis (of its linear part: as many as on the same length). Failed analyses are marked at the bottom
    of an empty column.

    Args:
        history: The records; over steps rather than epochs if an epoch has several.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.

    Raises:
        ValueError: If there is no record with a spectrum.
    """
    axis = RunAxis.of(history)
    spectra = [record.spectrum for record in history]
    present = [spectrum for spectrum in spectra if spectrum is not None]
    if not present:
        msg = "the history has no spectrum: all analyses failed."
        raise ValueError(msg)
    ax = ax or new_axes()
    decades, (bottom, top) = set_decades(ax, present, which="y", headroom=HEADROOM)
    edges = np.linspace(bottom, top, ROWS + 1)
    columns = [np.full(ROWS, math.nan) if s is None else density_per_decade(s, decades, edges) for s in spectra]
    least = faintest(present)
    values = np.ma.masked_less(np.ma.masked_invalid(np.array(columns).T), least)
    image = ax.pcolormesh(
        axis.edges(), decades.back(edges), values, cmap="Greys", norm=LogNorm(vmin=least),
        rasterized=True,
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label="share of eigenvalues per decade")

    at = np.array(axis.positions)
    ax.axhline(0, color="0.5", linewidth=0.6)
    outlined = [Stroke(linewidth=3, foreground="white"), Normal()]
    for name, color, label in (("max", POSITIVE, r"$\lambda_{\max}$"), ("min", NEGATIVE, r"$\lambda_{\min}$")):
        line = [math.nan if s is None else getattr(s, f"lambda_{name}") for s in spectra]
        marker = "o" if len(at) <= 20 else ""
        ax.plot(at, line, color=color, linewidth=1.4, marker=marker, markersize=3, path_effects=outlined, label=label)
    mark_at_bottom(ax, at[[s is None for s in spectra]])
    axis.label_on(ax)
    ax.set_ylabel("Hessian eigenvalue" if present[0].matrix == "hessian" else f"eigenvalue, {present[0].matrix}")
    ax.legend(fontsize=8, framealpha=0.9, handlelength=1.4, loc="upper right", ncols=3, columnspacing=1.2)
    return ax


# Layers ---------------------------------------------------------------------------------------------------------------


WIDE_RANGE = 20.0
"""Largest over smallest value from which on colors are logarithmic."""

UNDEFINED = "0.88"
"""Color of what has no value."""


def plot_layers(
    history: Sequence[SpectrumRecord] | Mapping[int, Mapping[str, Spectrum]],
    quantity: str | None = None,
    ax: Axes | None = None,
    *,
    xlabel: str | None = None,
) -> Axes:
    """Draw a heat map of a quantity: layers over the analyses of a run.

    A column reaches halfway to the neighboring analyses. What all names of layers begin with is the label of the axis.
    Colors are logarithmic for positive values of several sizes, else the root of the value, with its sign. Gray: no
    value.

    Args:
        history: The records, or epoch -> spectra by layer, as in `SpectrumRecord.layers`; the layers of the last one
            are drawn. Epoch -1 is the start. Failed analyses are marked in gray columns.
        quantity: A key of `LAYER_SCALARS`, such as "c_t" or "trace"; default: "lambda_max" where layers have spectra
            of their own, and "trace_share" where there is only what the spectrum of the network tells of them.
        ax: Axes to draw on; default: those of a new figure whose height fits the number of layers.
        xlabel: Label of the horizontal axis; default: "epoch" or "step".

    Raises:
        ValueError: If no record has layers, or `quantity` is unknown.
    """
    if quantity not in (None, *LAYER_SCALARS):
        msg = f"`quantity` must be one of {', '.join(LAYER_SCALARS)}, got {quantity!r}."
        raise ValueError(msg)
    if isinstance(history, Mapping):
        by_position = sorted((epoch, layer_indicators(spectra)) for epoch, spectra in history.items())
        axis = RunAxis(tuple(epoch for epoch, _ in by_position), "epoch")
        found = [indicators for _, indicators in by_position]
    else:
        axis, found = _of_records(history)
    if not any(found):
        msg = "`history` has no values of layers: all analyses failed, or kept no Krylov basis (`basis='none'`)."
        raise ValueError(msg)
    last = next(indicators for indicators in reversed(found) if indicators)
    names = list(last)
    has_spectra = any(not math.isnan(indicators.lambda_max) for indicators in last.values())
    scalar = LAYER_SCALARS[quantity or ("lambda_max" if has_spectra else "trace_share")]
    values = np.array([[scalar.of(f[n]) if n in f else math.nan for f in found] for n in names])
    defined = values[np.isfinite(values)]
    if ax is None:
        ax = new_axes(5.6, 1.4 + 0.24 * len(names), dpi=120)
    mesh = ax.pcolormesh(
        axis.edges(), np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(values), norm=_norm(defined, scalar.key),
        cmap="viridis", rasterized=True,
    )  # fmt: skip
    ax.set_facecolor(UNDEFINED)
    ax.invert_yaxis()
    mark_at_bottom(ax, np.array(axis.positions)[[not indicators for indicators in found]])
    prefix = common_prefix(names)
    ax.set_yticks(range(len(names)), [shortened(name.removeprefix(prefix)) for name in names], fontsize=8)
    if prefix:
        ax.set_ylabel(f"layer of {prefix[:-1]}", fontsize=8)
    axis.label_on(ax)
    if xlabel:
        ax.set_xlabel(xlabel)
    ax.figure.colorbar(mesh, ax=ax, label=typeset(scalar.title))
    return ax


def _norm(defined: Array, key: str) -> Normalize:
    """Return the scale of colors: logarithmic for positive values of several sizes, else a root, which keeps signs."""
    low, high = (float(defined.min()), float(defined.max())) if defined.size else (0.0, 1.0)
    if low > 0 and high > WIDE_RANGE * low:
        return LogNorm(low, high)
    if key == "trace_share":
        # Shares far beyond 0 and 1, where the whole trace is close to zero, must not take all colors.
        low, high = max(low, 0.0), min(high, 1.0)
    return FuncNorm((_root, _square), low, high)


def _root(values: Array) -> Array:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(roots: Array) -> Array:
    return np.sign(roots) * np.square(roots)


def common_prefix(names: Sequence[str]) -> str:
    """Return what all names begin with, whole parts between dots only.

    Examples:
        >>> common_prefix(["net.block.0", "net.block.1.fc"]), common_prefix(["a.b"])
        ('net.block.', '')
    """
    shared = os.path.commonprefix([name.split(".")[:-1] for name in names])  # noqa: RUF071 - by parts
    return "".join(f"{part}." for part in shared) if len(names) > 1 else ""


def _of_records(records: Sequence[SpectrumRecord]) -> tuple[RunAxis, list[dict[str, LayerIndicators]]]:
    """Return the axis of the records that know layers or failed, and the indicators of each; {}: it failed."""
    # Layers with spectra of their own, where there are any, may be others than those of the network's spectrum.
    analyzed = [record for record in records if record.layers] or [r for r in records if r.layer_indicators]
    if not analyzed:
        return RunAxis((), "epoch"), []
    shown = [record for record in records if record.spectrum is None or any(record is one for one in analyzed)]
    return RunAxis.of(shown), [record.layer_indicators for record in shown]
