"""Figures of spectra, and axes for others. Every function draws on the Axes it is given, or a new figure's.

Figures are made without pyplot, so no global state and no display are involved. Colours are those of Okabe & Ito
(2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_hesd.indicators import layer_indicators
from lightning_hesd.quadrature import legible_sigma

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from lightning_hesd.spectrum import Spectrum

POSITIVE = "#0072B2"
NEGATIVE = "#D55E00"
SMOOTHING = "0.6"
LOWEST_PART = 1e-10
"""The logarithmic axis ends this far below the highest density, where rounding begins to matter."""


def plot_density(spectrum: Spectrum, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw the spectral density on a logarithmic axis, with its nodes (ticks at the bottom) and extremes.

    Args:
        spectrum: What to draw.
        ax: Where to draw it; default: a new figure, small in inches so that its text stays legible on the cards of
            TensorBoard, which are 350 pixels wide.
        title: Text before the type in the title.
    """
    ax = ax or _new_axes()
    low, high = spectrum.lambda_min, spectrum.lambda_max
    sigma = legible_sigma(low, high)
    grid, density = spectrum.density(sigma=sigma)
    grid, density = spectrum.density(np.union1d(grid, (low, 0.0, high)), sigma)
    nodes = spectrum.nodes[~np.isnan(spectrum.nodes)]
    peaks = density[np.searchsorted(grid, nodes).clip(0, len(grid) - 1)]
    top = float(density.max())
    bottom = max(float(peaks.min()) / 10, top * LOWEST_PART)

    # The sign of the curvature is what the criteria are about, so it has a colour of its own. Beyond the extremes there
    # is nothing but the smoothing.
    ax.plot(grid, density, color=SMOOTHING, linewidth=1)
    within = (grid >= low) & (grid <= high)
    for side, colour in ((within & (grid <= 0), NEGATIVE), (within & (grid >= 0), POSITIVE)):
        ax.fill_between(grid[side], bottom, density[side].clip(bottom), color=colour, alpha=0.25, linewidth=0)
        ax.plot(grid[side], density[side], color=colour, linewidth=1.2)
    for value, symbol in ((spectrum.lambda_min, r"\min"), (spectrum.lambda_max, r"\max")):
        label = rf"$\lambda_{{{symbol}}}$ = {value:.3g}"
        ax.axvline(value, color=NEGATIVE if value < 0 else POSITIVE, linestyle="--", linewidth=1, label=label)
    ax.plot(nodes, np.full_like(nodes, bottom * 1.3), "|", color="black", markersize=6)

    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())  # laying them out takes as long as all the rest
    ax.set_ylim(bottom, top * 3)
    ax.set_xlabel("Hessian eigenvalue" if spectrum.matrix == "hessian" else f"eigenvalue, {spectrum.matrix}")
    ax.set_ylabel("spectral density")
    ax.set_title(describe(spectrum, title), fontsize=10)
    ax.grid(visible=True, alpha=0.3)
    place_legend(ax)
    return ax


def _new_axes() -> Axes:
    return Figure(figsize=(4.6, 3.5), dpi=160, layout="constrained").add_subplot()


def settling_axes(ax: Axes | None, ylabel: str) -> Axes:
    """Return axes, by default of a new figure, for what falls with the sample size k: logarithmic in what falls."""
    ax = ax or _new_axes()
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("sample size $k$")
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, alpha=0.3)
    return ax


def place_legend(ax: Axes) -> None:
    """Draw the legend where curves that fall leave room for it."""
    ax.legend(fontsize=9, loc="upper right", framealpha=0.9, handlelength=1.2)


def plot_decomposition(hessian: Spectrum, ggn: Spectrum, residual: Spectrum, ax: Axes | None = None) -> Axes:
    """Draw the densities of the Hessian and of the two parts it is the sum of, on one logarithmic axis.

    Outliers of the Hessian come from the Gauss-Newton matrix, its bulk from the residual (Kiselev & Grabovoy 2024,
    section 3.4).

    Args:
        hessian: Spectrum of the Hessian.
        ggn: Spectrum of the Gauss-Newton matrix.
        residual: Spectrum of the rest.
        ax: Where to draw it; default: a new figure, small in inches as that of `plot_density`.
    """
    ax = ax or _new_axes()
    spectra = {"Hessian": hessian, "Gauss-Newton": ggn, "residual": residual}
    width = max(s.lambda_max for s in spectra.values()) - min(s.lambda_min for s in spectra.values())
    sigma = 0.005 * width if width > 0 else None
    top, bottom = 0.0, math.inf
    for (label, spectrum), (colour, style) in zip(
        spectra.items(), (("0.35", "-"), (POSITIVE, "--"), (NEGATIVE, "-.")), strict=True
    ):
        grid, density = spectrum.density(sigma=sigma)
        ax.plot(grid, density, style, color=colour, linewidth=1.4, label=f"{label}, up to {spectrum.lambda_max:.3g}")
        _, at_extremes = spectrum.density((spectrum.lambda_min, spectrum.lambda_max), sigma)
        top, bottom = max(top, float(density.max())), min(bottom, float(at_extremes.min()))
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(max(bottom / 10, top * LOWEST_PART), top * 3)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("spectral density")
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=9, loc="upper right", framealpha=0.9, handlelength=2.2)
    return ax


LAYER_QUANTITIES = {
    "lambda_max": r"$\lambda_{\max}$",
    "c_t": "$C_t$",
    "trace": "trace",
    "trace_share": "share of the trace",
    "effective_rank": "effective rank",
    "near_zero_share": "share of directions near zero",
    "negative_share": "share of negative curvature",
}
LOGARITHMIC = {"lambda_max", "trace", "effective_rank"}


def plot_layers(
    layers: Mapping[int, Mapping[str, Spectrum]],
    quantity: str = "lambda_max",
    ax: Axes | None = None,
    *,
    xlabel: str = "epoch",
) -> Axes:
    """Draw a heat map of a quantity: layers over analysed epochs.

    Args:
        layers: Epoch -> spectra by layer, as in `SpectrumRecord.layers`; the layers of the last one are drawn.
            Epoch -1 is the start.
        quantity: A field of `LayerIndicators`.
        ax: Where to draw it; default: a new figure as high as there are layers.
        xlabel: What the keys of `layers` are, if not epochs.

    Raises:
        ValueError: If there is no epoch, or `quantity` is none of the fields.
    """
    if quantity not in LAYER_QUANTITIES:
        msg = f"`quantity` must be one of {', '.join(LAYER_QUANTITIES)}, got {quantity!r}."
        raise ValueError(msg)
    if not layers:
        msg = "`layers` has no epoch: was the callback given `layers`?"
        raise ValueError(msg)
    epochs = list(layers)
    names = list(layers[epochs[-1]])
    found = [layer_indicators(layers[epoch]) for epoch in epochs]
    values = np.array([[getattr(f[n], quantity) if n in f else math.nan for f in found] for n in names])
    logarithmic = quantity in LOGARITHMIC and bool((values > 0).any())
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
    ax.set_xlabel(xlabel)
    ax.get_figure(root=True).colorbar(image, ax=ax, label=LAYER_QUANTITIES[quantity])  # type: ignore[union-attr]
    return ax


def describe(spectrum: Spectrum, title: str = "") -> str:
    """Return two lines for a title: `title` and the type, then C_t with its interval."""
    if math.isnan(spectrum.c_t):
        return f"{title}\n$C_t$ undefined: no curvature".lstrip()
    low, high = spectrum.c_t_interval
    kind = f"{spectrum.hesd_type}-HESD" if spectrum.type_certain else f"{spectrum.hesd_type}-HESD (uncertain)"
    return f"{title}   {kind}\n$C_t$ = {spectrum.c_t:.4g}  [{low:.4g}, {high:.4g}]".lstrip()
