"""Densities per decade, on an axis of eigenvalues that is logarithmic on both sides of zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lightning_hesd.plotting.style import linear_threshold, set_signed_log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform
    from numpy.typing import NDArray

    from lightning_hesd.spectra.spectrum import Spectrum

    Array: TypeAlias = NDArray[np.float64]

SMOOTHING = 0.06
"""Standard deviation in decades."""

EDGE = 10.0**0.15
"""Factor by which an axis of eigenvalues exceeds the extremes, or the bounds on them."""

MIN_SHARE_OF_ONE = 0.05
"""Least density that is drawn, relative to that of a single eigenvalue."""


@dataclass(frozen=True)
class Decades:
    """Map between eigenvalues and places on the axis, in decades.

    Attributes:
        transform: Transform of the axis.
        threshold: Largest eigenvalue of the linear part of the axis.
    """

    transform: Transform
    threshold: float

    def places(self, values: Array) -> Array:
        """Return the places of these eigenvalues."""
        places: Array = self.transform.transform(values)
        return places / self.threshold

    def back(self, places: Array) -> Array:
        """Return the eigenvalues at these places."""
        values: Array = self.transform.inverted().transform(places * self.threshold)
        return values


def set_decades(
    ax: Axes, spectra: Sequence[Spectrum], *, which: Literal["x", "y"], headroom: float = 0.0
) -> tuple[Decades, tuple[float, float]]:
    """Make an axis logarithmic on both sides of zero, so that the extremes of the spectra differ from zero.

    Args:
        ax: The axes.
        spectra: The spectra.
        which: The horizontal or the vertical axis.
        headroom: Share of the axis that is left free at its upper end.

    Returns:
        The map of the axis, and its two ends, as places.
    """
    extremes = [value for s in spectra for value in (s.lambda_min, s.lambda_max)]
    threshold = linear_threshold(v for s in spectra for v in (s.lambda_min, s.lambda_max) if abs(v) > s.rounding)
    low, high = min(-threshold, EDGE * min(extremes)), max(threshold, EDGE * max(extremes))
    set_signed_log(ax, threshold, low, high, which=which)
    decades = Decades((ax.xaxis if which == "x" else ax.yaxis).get_transform(), threshold)
    start, end = decades.places(np.array([low, high]))
    end += headroom * (end - start)
    if headroom:
        set_signed_log(ax, threshold, low, float(decades.back(end)), which=which)
    return decades, (float(start), float(end))


def density_per_decade(spectrum: Spectrum, decades: Decades, edges: Array) -> Array:
    """Return the share of eigenvalues per decade between places, shape (edges - 1,), smoothed over `SMOOTHING`."""
    mass = np.diff(spectrum.distribution.cumulative(decades.back(edges)))
    middles = (edges[1:] + edges[:-1]) / 2
    gaussians = np.exp(-0.5 * ((middles[:, None] - middles) / SMOOTHING) ** 2)
    # Beyond the extremes there is smoothing only.
    low, high = decades.places(np.array([spectrum.lambda_min, spectrum.lambda_max]))
    within = (middles > low - 2 * SMOOTHING) & (middles < high + 2 * SMOOTHING)
    density: Array = gaussians @ mass / (SMOOTHING * math.sqrt(2 * math.pi))
    return np.where(within, density, 0.0)


def faintest(spectra: Sequence[Spectrum]) -> float:
    """Return the least density that is drawn: a share of that of a single eigenvalue of the largest matrix."""
    return MIN_SHARE_OF_ONE / max(s.dimension for s in spectra) / (SMOOTHING * math.sqrt(2 * math.pi))
