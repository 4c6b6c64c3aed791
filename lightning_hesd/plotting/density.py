"""The density of one spectrum, and those of several, as of GGN and residual, whose sum is the Hessian."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.ticker import NullLocator

from lightning_hesd.plotting.decades import density_per_decade, faintest, set_decades
from lightning_hesd.plotting.style import COLORS, NEGATIVE, POSITIVE, SMOOTHING, new_axes
from lightning_hesd.spectra.digits import certain, interval, number
from lightning_hesd.spectra.quadrature import legible_sigma

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.spectra.spectrum import Spectrum

    Array: TypeAlias = NDArray[np.float64]

STYLES: list[dict[str, Any]] = [
    {"color": color, "linestyle": line} for line, color in zip(("-", "--", "-.", ":") * 7, COLORS * 4, strict=True)
]
"""Colors and dashes of several spectra; no two of 28 are the same."""

POINTS = 600

FEW = 6
"""Largest number of spectra whose legend stands above the curves; that of more stands beside them."""

ROW_OF_LEGEND = 0.07
"""Height of a row of the legend, as a share of the axes."""

WIDE = 10.0
"""Ratio of the widths of spectra from which on the axis of eigenvalues is logarithmic."""

MIN_SHARE = 1e-10
"""Lower end of the logarithmic axis, relative to the highest density: rounding matters below."""


def plot_density(spectrum: Spectrum, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw the spectral density on a logarithmic axis, with its nodes (ticks at the bottom) and extremes.

    Args:
        spectrum: The spectrum.
        ax: Axes to draw on; default: those of a new figure, small in inches so that its text stays legible on the cards
            of TensorBoard, which are 350 pixels wide.
        title: Text before the type in the title.
    """
    ax = ax or new_axes()
    low, high = spectrum.lambda_min, spectrum.lambda_max
    sigma = legible_sigma(low, high)
    grid, density = spectrum.density(sigma=sigma)
    grid, density = spectrum.density(np.union1d(grid, (low, 0.0, high)), sigma)
    nodes = spectrum.nodes[~np.isnan(spectrum.nodes)]
    peaks = density[np.searchsorted(grid, nodes).clip(0, len(grid) - 1)]
    top = float(density.max())
    bottom = max(float(peaks.min()) / 10, top * MIN_SHARE)

    # The criteria depend on the sign of the curvature, so each sign has its color. Beyond the extremes the density is
    # smoothing only.
    ax.plot(grid, density, color=SMOOTHING, linewidth=1)
    within = (grid >= low) & (grid <= high)
    for side, color in ((within & (grid <= 0), NEGATIVE), (within & (grid >= 0), POSITIVE)):
        ax.fill_between(grid[side], bottom, density[side].clip(bottom), color=color, alpha=0.25, linewidth=0)
        ax.plot(grid[side], density[side], color=color, linewidth=1.2)
    for value, symbol in ((spectrum.lambda_min, r"\min"), (spectrum.lambda_max, r"\max")):
        label = rf"$\lambda_{{{symbol}}}$ = {number(value, 3)}"
        ax.axvline(value, color=NEGATIVE if value < 0 else POSITIVE, linestyle="--", linewidth=1, label=label)
    ax.plot(nodes, np.full_like(nodes, bottom * 1.3), "|", color="black", markersize=6)

    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())  # minor ticks take as long as the rest of the figure
    ax.set_ylim(bottom, top * 3)
    ax.ticklabel_format(axis="x", scilimits=(-3, 5))  # longer labels would touch
    ax.set_xlabel("Hessian eigenvalue" if spectrum.matrix == "hessian" else f"eigenvalue, {spectrum.matrix}")
    ax.set_ylabel("spectral density")
    ax.set_title(describe(spectrum, title), fontsize=10)
    ax.grid(visible=True, alpha=0.3)
    _place_legend(ax, high)
    return ax


def _place_legend(ax: Axes, lambda_max: float) -> None:
    """Draw the legend at the upper right, left of the line of λ_max: there are few eigenvalues, and low peaks."""
    left, right = ax.get_xlim()
    place = (lambda_max - left) / (right - left)
    ax.legend(fontsize=9, loc="upper right", bbox_to_anchor=(place, 1), framealpha=0.9, handlelength=1.2)


def plot_densities(spectra: Mapping[str, Spectrum], ax: Axes | None = None) -> Axes:
    """Draw the densities of several spectra: of epochs, of runs, or of training and generalization data.

    Both axes are logarithmic, that of eigenvalues on both sides of zero, if the widths of spectra differ by a factor of
    ten or more.

    Args:
        spectra: The spectra, by their titles in the legend.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.

    Raises:
        ValueError: If there are none.
    """
    if not spectra:
        msg = "`spectra` is empty: pass at least one spectrum."
        raise ValueError(msg)
    ax = ax or new_axes()
    widths = [s.lambda_max - s.lambda_min for s in spectra.values()]
    is_wide = max(widths) >= WIDE * min(widths)
    curves, bottom = _per_decade(list(spectra.values()), ax) if is_wide else _per_eigenvalue(list(spectra.values()))
    for (grid, density), (title, spectrum), style in zip(curves, spectra.items(), cycle(STYLES), strict=False):
        ax.plot(grid, density, linewidth=1.4, label=f"{title}, up to {number(spectrum.lambda_max, 3)}", **style)
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    top = max(float(density.max()) for _, density in curves)
    legend = {"loc": "upper right"} if len(curves) <= FEW else {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    room = ROW_OF_LEGEND * (1 + len(curves)) if len(curves) <= FEW else ROW_OF_LEGEND
    ax.set_ylim(bottom, top * (top / bottom) ** (room / (1 - room)))
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("share of eigenvalues per decade" if is_wide else "spectral density")
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=8, framealpha=0.9, handlelength=2.2, **legend)
    return ax


def _per_eigenvalue(spectra: Sequence[Spectrum]) -> tuple[list[tuple[Array, Array]], float]:
    """Return curves for a linear axis, and the least density to draw."""
    sigma = 0.005 * max(s.lambda_max - s.lambda_min for s in spectra) or None
    curves = [s.density(sigma=sigma) for s in spectra]
    top = max(float(density.max()) for _, density in curves)
    at_extremes = min(float(s.density((s.lambda_min, s.lambda_max), sigma)[1].min()) for s in spectra)
    return curves, max(at_extremes / 10, top * MIN_SHARE)


def _per_decade(spectra: Sequence[Spectrum], ax: Axes) -> tuple[list[tuple[Array, Array]], float]:
    """Return the same for an axis that is logarithmic on both sides of zero, and set that."""
    decades, (start, end) = set_decades(ax, spectra, which="x")
    edges = np.linspace(start, end, POINTS + 1)
    grid = decades.back((edges[1:] + edges[:-1]) / 2)
    curves = [(grid, density_per_decade(s, decades, edges)) for s in spectra]
    return curves, faintest(spectra)


def plot_decomposition(hessian: Spectrum, ggn: Spectrum, residual: Spectrum, ax: Axes | None = None) -> Axes:
    """Draw the densities of the Hessian, the GGN and the residual H − GGN on the same axes.

    Outliers of the Hessian come from the Gauss-Newton matrix, its bulk from the residual (Kiselev & Grabovoy 2024,
    section 3.4).

    Args:
        hessian: Spectrum of the Hessian.
        ggn: Spectrum of the GGN.
        residual: Spectrum of the residual.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
    """
    return plot_densities({"Hessian": hessian, "Gauss-Newton": ggn, "residual": residual}, ax)


def describe(spectrum: Spectrum, title: str = "") -> str:
    """Return two lines for a title: `title` and the type, then C_t with its interval."""
    if math.isnan(spectrum.c_t):
        return f"{title}\n$C_t$ undefined: no curvature".lstrip()
    ends = spectrum.c_t_interval
    doubt = "" if spectrum.type_certain else " (uncertain)" if spectrum.verified == "yes" else " (not verified)"
    kind = f"{spectrum.hesd_type}-HESD{doubt}"
    return f"{title}   {kind}\n$C_t$ = {certain(spectrum.c_t, *ends)}  {interval(*ends)}".lstrip()
