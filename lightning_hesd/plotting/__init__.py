"""Figures of spectra, and axes for others. Every function draws on the Axes it is given, or a new figure's.

Figures are made without pyplot, so no global state and no display are involved. Colours are those of Okabe & Ito
(2008), which colour-blind readers can tell apart.
"""

from lightning_hesd.plotting.c_t import plot_c_t
from lightning_hesd.plotting.density import describe, plot_decomposition, plot_density
from lightning_hesd.plotting.evolution import plot_density_evolution
from lightning_hesd.plotting.layers import plot_layers
from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, SMOOTHING, new_axes, place_legend, settling_axes

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "SMOOTHING",
    "describe",
    "new_axes",
    "place_legend",
    "plot_c_t",
    "plot_decomposition",
    "plot_density",
    "plot_density_evolution",
    "plot_layers",
    "settling_axes",
]
