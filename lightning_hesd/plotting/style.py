"""Colors, axes, legends and titles that figures share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    Corner: TypeAlias = Literal["upper right", "lower right", "upper left", "lower left"]

POSITIVE = "#0072B2"
NEGATIVE = "#D55E00"
OTHER = "#009E73"
SMOOTHING = "0.6"


SYMBOLS = {"λ": r"\lambda", "max": r"\max", "min": r"\min"}


def typeset(title: str) -> str:
    r"""Return a title with its symbols in Matplotlib's mathematical notation.

    Examples:
        >>> typeset("lowest λ_max"), typeset("highest C_t")
        ('lowest $\\lambda_{\\max}$', 'highest $C_t$')
    """

    def symbol(match: re.Match[str]) -> str:
        name, index = (SYMBOLS.get(part, part) for part in match.groups())
        return f"${name}_{index}$" if len(index) == 1 else f"${name}_{{{index}}}$"

    return re.sub(r"(\w+)_(\w+)", symbol, title)


def new_axes() -> Axes:
    """Return the axes of a new figure, small in inches so that its text stays legible on the cards of TensorBoard."""
    return Figure(figsize=(4.6, 3.5), dpi=160, layout="constrained").add_subplot()


def settling_axes(ax: Axes | None, ylabel: str) -> Axes:
    """Return axes, by default of a new figure, for a quantity over the sample size k, on a logarithmic axis."""
    ax = ax or new_axes()
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("sample size $k$")
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, alpha=0.3)
    return ax


def place_legend(ax: Axes) -> None:
    """Draw the legend at the upper right, where falling curves leave room."""
    ax.legend(fontsize=9, loc="upper right", framealpha=0.9, handlelength=1.2)


def free_corner(ax: Axes, at: ArrayLike, values: ArrayLike) -> Corner:
    """Return the corner with the fewest of these points, for a legend; Matplotlib's own search is slow."""
    points = np.column_stack([np.asarray(at, dtype=np.float64), np.asarray(values, dtype=np.float64)])
    points = points[np.isfinite(points).all(axis=1)]
    right, up = ax.transAxes.inverted().transform(ax.transData.transform(points)).T
    left, down = 1 - right, 1 - up
    corners: dict[Corner, Any] = {
        "upper right": (right, up),
        "lower right": (right, down),
        "upper left": (left, up),
        "lower left": (left, down),
    }
    return min(corners, key=lambda corner: int(((corners[corner][0] > 0.4) & (corners[corner][1] > 0.6)).sum()))
