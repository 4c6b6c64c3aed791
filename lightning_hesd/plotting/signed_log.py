"""Logarithmic axes for both signs: linear up to a threshold around zero."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

MAX_DECADES = 5
"""Number of decades of the axis: much smaller values are drawn near zero."""

LABELS_PER_SIGN = 4


def linear_threshold(sizes: Iterable[float]) -> float:
    """Return a power of ten just below the smallest of these sizes that is not zero; 1 where all are zero."""
    present = [size for size in map(abs, sizes) if 0 < size < math.inf]
    if not present:
        return 1.0
    smallest = max(min(present), max(present) * 10.0**-MAX_DECADES)
    return 10.0 ** math.floor(math.log10(smallest) + 1e-9)


def set_signed_log(ax: Axes, threshold: float, low: float, high: float, *, linear_part: float = 1.0) -> None:
    """Make the vertical axis linear within `threshold` of zero, logarithmic beyond, and label its decades.

    Args:
        ax: The axes.
        threshold: A power of ten.
        low: Lower end of the axis.
        high: Upper end of the axis.
        linear_part: Length of the axis from zero to the threshold, in decades.
    """
    ax.set_yscale("symlog", linthresh=threshold, linscale=linear_part)
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(FixedLocator(_ticks(threshold, low, high)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _ticks(threshold: float, low: float, high: float) -> list[float]:
    ticks = [0.0] if low <= 0 <= high else []
    lowest = round(math.log10(threshold))
    highest = math.floor(math.log10(max(abs(low), abs(high), threshold)) + 1e-9)
    every = 1 + (highest - lowest) // LABELS_PER_SIGN
    # Counted from the outermost: the decades next to zero are the closest to each other.
    sizes = [10.0**exponent for exponent in range(highest, lowest - 1, -every)]
    return [*(-size for size in sizes if -size >= low), *ticks, *(size for size in sizes if size <= high)]


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    return rf"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$"
