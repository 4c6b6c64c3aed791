"""The density of one spectrum, and those of GGN and residual, whose sum is the Hessian."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import NullLocator

from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, SMOOTHING, new_axes
from lightning_hesd.spectra.digits import certain, interval, number
from lightning_hesd.spectra.quadrature import legible_sigma

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_hesd.spectra.spectrum import Spectrum

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


def plot_decomposition(hessian: Spectrum, ggn: Spectrum, residual: Spectrum, ax: Axes | None = None) -> Axes:
    """Draw the densities of the Hessian, the GGN and the residual H − GGN on one logarithmic axis.

    Outliers of the Hessian come from the Gauss-Newton matrix, its bulk from the residual (Kiselev & Grabovoy 2024,
    section 3.4).

    Args:
        hessian: Spectrum of the Hessian.
        ggn: Spectrum of the GGN.
        residual: Spectrum of the residual.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
    """
    ax = ax or new_axes()
    spectra = {"Hessian": hessian, "Gauss-Newton": ggn, "residual": residual}
    width = max(s.lambda_max for s in spectra.values()) - min(s.lambda_min for s in spectra.values())
    sigma = 0.005 * width if width > 0 else None
    top, bottom = 0.0, math.inf
    for (label, spectrum), (color, style) in zip(
        spectra.items(), (("0.35", "-"), (POSITIVE, "--"), (NEGATIVE, "-.")), strict=True
    ):
        grid, density = spectrum.density(sigma=sigma)
        ax.plot(grid, density, style, color=color, linewidth=1.4, label=f"{label}, up to {spectrum.lambda_max:.3g}")
        _, at_extremes = spectrum.density((spectrum.lambda_min, spectrum.lambda_max), sigma)
        top, bottom = max(top, float(density.max())), min(bottom, float(at_extremes.min()))
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(max(bottom / 10, top * MIN_SHARE), top * 3)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("spectral density")
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=9, loc="upper right", framealpha=0.9, handlelength=2.2)
    return ax


def describe(spectrum: Spectrum, title: str = "") -> str:
    """Return two lines for a title: `title` and the type, then C_t with its interval."""
    if math.isnan(spectrum.c_t):
        return f"{title}\n$C_t$ undefined: no curvature".lstrip()
    ends = spectrum.c_t_interval
    doubt = "" if spectrum.type_certain else " (uncertain)" if spectrum.verified == "yes" else " (not verified)"
    kind = f"{spectrum.hesd_type}-HESD{doubt}"
    return f"{title}   {kind}\n$C_t$ = {certain(spectrum.c_t, *ends)}  {interval(*ends)}".lstrip()
