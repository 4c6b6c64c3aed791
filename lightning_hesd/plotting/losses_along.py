"""The loss along the extreme eigenvectors, with the parabolas that it follows near the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, new_axes
from lightning_hesd.spectra.digits import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.spectra.spectrum import Spectrum

    Array: TypeAlias = NDArray[np.float64]

MARGIN = 0.15
"""Room below the losses, as a share of their range; a parabola may leave the figure."""

HEADROOM = 0.35
"""Room above them, in which the legend is."""


def plot_losses_along(spectrum: Spectrum, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw the loss along the eigenvectors of λ_min and λ_max, and the parabolas L + st + ½λt² (dashed).

    Near t = 0 the loss follows the parabola. The slope s is that between the points next to 0. Distances t are shown
    relative to the farthest, which the legend names: there the curvature changes the loss by a tenth.

    Args:
        spectrum: A spectrum with `losses_along`.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
        title: Text above the figure.

    Raises:
        ValueError: If the losses were not evaluated.
    """
    if not spectrum.losses_along.size:
        msg = (
            "the spectrum has no losses along eigenvectors: analyze with `loss_along_eigenvectors=True`, which takes "
            "the Hessian (`matrix='hessian'`) and a Krylov basis (not `basis='none'`)."
        )
        raise ValueError(msg)
    ax = ax or new_axes()
    eigenvalues = (spectrum.lambda_min, r"\min", NEGATIVE, "o"), (spectrum.lambda_max, r"\max", POSITIVE, "s")
    for (distances, losses), (value, index, color, mark) in zip(spectrum.losses_along, eigenvalues, strict=True):
        shares = distances / distances[-1]
        label = rf"$\lambda_{{{index}}}$ = {number(value, 3)}, $t \leq$ {distances[-1]:.2g}"
        ax.plot(shares, losses, color=color, linewidth=1.2, marker=mark, markersize=3, label=label)
        ax.plot(shares, _parabola(distances, losses, value), "--", color=color, linewidth=1)
    finite = spectrum.losses_along[:, 1][np.isfinite(spectrum.losses_along[:, 1])]
    low, high = finite.min(initial=spectrum.loss), finite.max(initial=spectrum.loss)
    height = high - low or 1.0
    ax.set_ylim(low - MARGIN * height, high + HEADROOM * height)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("distance along the eigenvector / farthest")
    ax.set_ylabel("mean loss")
    ax.set_title(title, fontsize=10)
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=9, loc="upper center", framealpha=0.9, handlelength=1.6)
    return ax


def _parabola(distances: Array, losses: Array, eigenvalue: float) -> Array:
    """Return L + st + ½λt² at some distances around zero, given the losses there."""
    middle = len(distances) // 2
    slope = (losses[middle + 1] - losses[middle - 1]) / (distances[middle + 1] - distances[middle - 1])
    parabola: Array = losses[middle] + slope * distances + eigenvalue * distances**2 / 2
    return parabola
