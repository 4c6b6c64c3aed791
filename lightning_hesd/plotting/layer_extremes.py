"""The extreme eigenvalues of the layers of a network, a row for each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, linear_threshold, new_axes, set_signed_log, shortened
from lightning_hesd.spectra.analysis_lines import type_text
from lightning_hesd.spectra.digits import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from lightning_hesd.spectra.spectrum import Spectrum

EDGE = 10.0**0.2
"""Factor by which the axis exceeds the extremes."""

LINEAR_SHARE = 0.3
"""Least length of the linear part on either side of zero, as a share of the logarithmic one: room for labels."""


def plot_layer_extremes(layers: Mapping[str, Spectrum], ax: Axes | None = None) -> Axes:
    """Draw λ_min and λ_max of each layer as points on a line, the first layer at the top, and C_t at the right.

    Thin lines reach from the points to the bounds on the extreme eigenvalues, which hold with the confidence of the
    analysis. The axis is logarithmic on both sides of zero.

    Args:
        layers: The spectra by name of layer.
        ax: Axes to draw on; default: those of a new figure whose height fits the number of layers.

    Raises:
        ValueError: If no layer has eigenvalues.
    """
    known = {name: spectrum for name, spectrum in layers.items() if spectrum.reason is None}
    if not known:
        msg = "no layer has eigenvalues: the analyses of all layers failed."
        raise ValueError(msg)
    if ax is None:
        ax = new_axes(5.6, 1.3 + 0.26 * len(layers))
    places = {name: place for place, name in enumerate(layers)}
    for name, spectrum in known.items():
        place, (low, high) = places[name], spectrum.extreme_bounds
        ax.plot([spectrum.lambda_min, spectrum.lambda_max], [place, place], color="0.75", linewidth=2, zorder=1)
        for color, value, bound in ((NEGATIVE, spectrum.lambda_min, low), (POSITIVE, spectrum.lambda_max, high)):
            ax.plot([value, bound], [place, place], color=color, linewidth=1, zorder=2)
            ax.plot([value], [place], "o", color=color, markersize=5, zorder=3)
    threshold = linear_threshold(v for s in known.values() for v in (s.lambda_min, s.lambda_max) if abs(v) > s.rounding)
    bounds = [bound for s in known.values() for bound in s.extreme_bounds]
    low, high = min(-threshold, EDGE * min(bounds)), max(threshold, EDGE * max(bounds))
    decades = math.log10(max(-low, high) / threshold)
    set_signed_log(ax, threshold, low, high, linear_part=max(1.0, LINEAR_SHARE * decades), which="x")
    ax.axvline(0, color="0.5", linewidth=0.6, zorder=0)
    ax.set_yticks(range(len(layers)), map(shortened, layers), fontsize=8)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(layers)), [_c_t(spectrum) for spectrum in layers.values()], fontsize=8)
    for axis in (ax, right):
        axis.tick_params(axis="y", length=0)
    right.set_ylabel("$C_t$ and type", fontsize=9)
    ax.set_xlabel(r"$\lambda_{\min}$ and $\lambda_{\max}$ of the layer's Hessian (thin lines: bounds)")
    ax.grid(visible=True, axis="x", alpha=0.3)
    return ax


def _c_t(spectrum: Spectrum) -> str:
    """Return C_t and the type; a question mark stands for a type that is uncertain."""
    return "undefined" if spectrum.hesd_type is None else f"{number(spectrum.c_t, 2)}, {type_text(spectrum)}"
