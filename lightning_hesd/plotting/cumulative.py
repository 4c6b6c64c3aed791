"""The numbers of eigenvalues beyond every threshold, with the bands that they are proven to be within."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from lightning_hesd.plotting.decades import EDGE
from lightning_hesd.plotting.style import NEGATIVE, POSITIVE, linear_threshold, new_axes, set_signed_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.spectra.spectrum import Spectrum

    Array: TypeAlias = NDArray[np.float64]

BOTTOM = 0.6
"""Lower end of the axis of numbers, on which zero has no place; a single eigenvalue stands clear of it."""

PARTS = 8
"""Parts of a uniform piece of the distribution, in each of which the line is level."""


def plot_cumulative(spectrum: Spectrum, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw how many eigenvalues are farther from zero than a threshold: below a negative one, above a positive one.

    Lines show the numbers by the density. The true numbers are within the bands, all of them with probability
    `spectrum.confidence`; a band is as narrow as its line where eigenvalues have converged. Both axes are logarithmic,
    that of thresholds on both sides of zero.

    Args:
        spectrum: The spectrum.
        ax: Axes to draw on; default: those of a new figure, small in inches as that of `plot_density`.
        title: Text above the number of negative eigenvalues.

    Raises:
        ValueError: If nothing was computed, because HVPs were not those of the loss.
    """
    points, _, _ = spectrum.cumulative_band
    ax = ax or new_axes()
    linear = linear_threshold(spectrum.nodes[np.abs(spectrum.nodes) > spectrum.rounding])
    set_signed_log(ax, linear, min(-linear, EDGE * points[0]), max(linear, EDGE * points[-1]), which="x")
    for is_above, color, side, place in ((False, NEGATIVE, "left", "below"), (True, POSITIVE, "right", "above")):
        thresholds, numbers = numbers_beyond(spectrum, is_above=is_above)
        if len(thresholds) < 2:
            continue
        least, found, most = numbers.clip(BOTTOM)
        ax.fill_between(thresholds, least, most, step="post", color=color, alpha=0.25, linewidth=0)
        ax.step(thresholds, found, where="post", color=color, linewidth=1.2)
        ax.annotate(
            place, (float(is_above), 1), (-6 if is_above else 6, -6), "axes fraction", "offset points", color=color,
            horizontalalignment=side, verticalalignment="top",
        )  # fmt: skip
    ax.axvline(0, color="0.5", linewidth=0.6)
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(BOTTOM, 2 * spectrum.dimension)
    ax.set_xlabel("threshold" if spectrum.matrix == "hessian" else f"threshold, {spectrum.matrix}")
    ax.set_ylabel("eigenvalues beyond the threshold")
    low, high = spectrum.negative_count
    count = f"{low}" if low == high else f"{low} to {high}"
    ax.set_title(f"{title}\n{count} of {spectrum.dimension} eigenvalues are negative".lstrip(), fontsize=10)
    ax.grid(visible=True, alpha=0.3)
    # Below the numbers around zero, which are the largest, there is room.
    entries = Line2D([], [], color="0.35", linewidth=1.2), Patch(color="0.35", alpha=0.25, linewidth=0)
    names = "by the density", f"{spectrum.confidence:.0%} confidence"
    ax.legend(entries, names, fontsize=8, loc="lower center", framealpha=0.9, handlelength=1.4)
    return ax


def numbers_beyond(spectrum: Spectrum, *, is_above: bool) -> tuple[Array, Array]:
    """Return thresholds on one side of zero, and how many eigenvalues are beyond each.

    Returns:
        thresholds: Ascending, up to zero or from zero on, shape (thresholds,).
        numbers: The least number, that by the density, and the largest; they hold until the next threshold. Shape
            (3, thresholds).
    """
    points, low, high = spectrum.cumulative_band
    starts, ends, _ = spectrum.distribution.pieces
    wide = starts < ends
    thresholds = np.unique(np.concatenate([[0.0], points, np.linspace(starts[wide], ends[wide], PARTS + 1).ravel()]))
    thresholds = thresholds[thresholds >= 0] if is_above else thresholds[thresholds <= 0]
    found = spectrum.distribution.cumulative(thresholds)
    band = np.searchsorted(points, thresholds, side="right")
    if not is_above:  # eigenvalues of zero are not below it
        found[-1] = spectrum.distribution.cumulative(thresholds[-1:], strictly=True)[0]
        band[-1] = np.searchsorted(points, 0.0)
    # Below all points there is no eigenvalue. The band also knows that numbers are whole.
    low, high = np.append(0.0, low)[band], np.append(0.0, high)[band]
    shares = np.array([low, found.clip(low, high), high])
    return thresholds, spectrum.dimension * (1 - shares[::-1] if is_above else shares)
