"""Figures of spectra. Every function draws on given Axes, or on those of a new figure.

Figures are made without pyplot, hence without global state and without a display. Colors are those of Okabe & Ito
(2008), which color-blind readers can tell apart.
"""

from lightning_hesd.plotting.c_t import plot_c_t
from lightning_hesd.plotting.cumulative import plot_cumulative
from lightning_hesd.plotting.density import describe, plot_decomposition, plot_density
from lightning_hesd.plotting.gains import plot_gains
from lightning_hesd.plotting.heat_maps import plot_density_evolution, plot_layers
from lightning_hesd.plotting.losses_along import plot_losses_along
from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, SMOOTHING, new_axes, place_legend, settling_axes

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "SMOOTHING",
    "describe",
    "new_axes",
    "place_legend",
    "plot_c_t",
    "plot_cumulative",
    "plot_decomposition",
    "plot_density",
    "plot_density_evolution",
    "plot_gains",
    "plot_layers",
    "plot_losses_along",
    "settling_axes",
]
