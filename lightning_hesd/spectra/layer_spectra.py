"""`LayerSpectra`: the spectra of the layers of a network by name, with a figure and a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.spectra.spectrum import Spectrum, plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LayerSpectra(dict[str, Spectrum]):
    """The spectra of layers by name, in the order of the network, as `layer_spectra` returns them: a dictionary."""

    def __repr__(self) -> str:
        """Return the names of the first layers in one line."""
        names = [*self][:3]
        more = f" and {len(self) - len(names)} more" if len(self) > len(names) else ""
        return f"<LayerSpectra of {len(self)} layer{'' if len(self) == 1 else 's'}: {', '.join(names)}{more}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table with a row for each layer."""
        found: str = plotting().layers_html(self)
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the smallest and the largest eigenvalue of each layer, with the bounds on them.

        Args:
            ax: Axes to draw on; default: those of a new figure whose height fits the number of layers.

        Raises:
            ValueError: If no layer has eigenvalues.
        """
        axes: Axes = plotting().plot_layer_extremes(self, ax)
        return axes
