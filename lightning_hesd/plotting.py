"""Figures of spectra. Every function draws on the Axes it is given, or on a new figure's, and returns it.

Figures are made without pyplot, so no global state and no display are involved. Colours are those of Okabe & Ito
(2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_hesd.spectrum import Spectrum

POSITIVE = "#0072B2"
NEGATIVE = "#D55E00"
LOWEST_PART = 1e-10
"""The logarithmic axis ends this far below the highest density, where rounding begins to matter."""


def plot_density(spectrum: Spectrum, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw the spectral density on a logarithmic axis, with its nodes and extremes.

    Args:
        spectrum: What to draw.
        ax: Where to draw it; default: a new figure of a size that TensorBoard shows legibly.
        title: Text before C_t and the type in the title.
    """
    if ax is None:
        ax = Figure(figsize=(7.0, 4.2), dpi=110, layout="constrained").add_subplot()
    grid, density = spectrum.density()
    peaks = density[np.searchsorted(grid, spectrum.nodes[~np.isnan(spectrum.nodes)]).clip(0, len(grid) - 1)]
    top = float(density.max())
    bottom = max(float(peaks.min()) / 10, top * LOWEST_PART)

    # The sign of the curvature is what the criteria are about, so it has a colour of its own.
    for side, colour, label in ((grid <= 0, NEGATIVE, "negative"), (grid >= 0, POSITIVE, "positive")):
        if (density[side] > bottom).any():
            ax.fill_between(grid[side], bottom, density[side].clip(bottom), color=colour, alpha=0.25, linewidth=0)
            ax.plot(grid[side], density[side], color=colour, linewidth=1.2, label=f"{label} curvature")
    for value, symbol, colour in (
        (spectrum.lambda_min, r"$\lambda_{\min}$", NEGATIVE if spectrum.lambda_min < 0 else POSITIVE),
        (spectrum.lambda_max, r"$\lambda_{\max}$", POSITIVE if spectrum.lambda_max > 0 else NEGATIVE),
    ):
        ax.axvline(value, color=colour, linestyle="--", linewidth=1, label=f"{symbol} = {value:.4g}")
    nodes = spectrum.nodes[~np.isnan(spectrum.nodes)]
    ax.plot(nodes, np.full_like(nodes, bottom * 1.3), "|", color="black", markersize=7, label="quadrature nodes")

    ax.set_yscale("log")
    ax.set_ylim(bottom, top * 3)
    ax.set_xlabel("Hessian eigenvalue")
    ax.set_ylabel("spectral density")
    ax.set_title("   ".join(part for part in (title, describe(spectrum)) if part), fontsize=11)
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=8, loc="upper right", framealpha=0.9)
    return ax


def describe(spectrum: Spectrum) -> str:
    """Return C_t with its interval and the type, as mathematical text for a title."""
    if math.isnan(spectrum.c_t):
        return "$C_t$ undefined"
    low, high = spectrum.c_t_interval
    certainty = "" if spectrum.type_certain else " (uncertain)"
    return f"$C_t$ = {spectrum.c_t:.4g} [{low:.4g}, {high:.4g}]   {spectrum.hesd_type}{certainty}"
