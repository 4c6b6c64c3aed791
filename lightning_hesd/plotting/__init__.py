"""Figures of spectra. Every function draws on given Axes, or on those of a new figure.

Notebooks and `plt.show()` show new figures. Those made in the context `offscreen` are for files and logs: they need no
display and leave no global state. Colors are those of Okabe & Ito (2008), which color-blind readers can tell apart.
"""

from lightning_hesd.plotting.c_t import plot_c_t
from lightning_hesd.plotting.cumulative import plot_cumulative
from lightning_hesd.plotting.density import describe, plot_decomposition, plot_densities, plot_density
from lightning_hesd.plotting.gains import plot_gains
from lightning_hesd.plotting.heat_maps import plot_density_evolution, plot_layers
from lightning_hesd.plotting.layer_extremes import plot_layer_extremes
from lightning_hesd.plotting.losses_along import plot_losses_along
from lightning_hesd.plotting.notebook import layers_html, record_html, spectrum_html, summary_html, table_html
from lightning_hesd.plotting.scalar import plot_scalar
from lightning_hesd.plotting.style import (
    NEGATIVE,
    POSITIVE,
    SMOOTHING,
    new_axes,
    offscreen,
    offscreen_figure,
    place_legend,
    settling_axes,
)

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "SMOOTHING",
    "describe",
    "layers_html",
    "new_axes",
    "offscreen",
    "offscreen_figure",
    "place_legend",
    "plot_c_t",
    "plot_cumulative",
    "plot_decomposition",
    "plot_densities",
    "plot_density",
    "plot_density_evolution",
    "plot_gains",
    "plot_layer_extremes",
    "plot_layers",
    "plot_losses_along",
    "plot_scalar",
    "record_html",
    "settling_axes",
    "spectrum_html",
    "summary_html",
    "table_html",
]
