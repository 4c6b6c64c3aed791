"""Colors, titles, legends and axes that figures share: along a run, and logarithmic for both signs."""

from __future__ import annotations

import contextlib
import math
import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from lightning_hesd.spectra.record import SpectrumRecord

    Corner: TypeAlias = Literal["upper right", "lower right", "upper left", "lower left"]

POSITIVE = "#0072B2"
NEGATIVE = "#D55E00"
OTHER = "#009E73"
SMOOTHING = "0.6"

COLORS = (POSITIVE, OTHER, NEGATIVE, "#CC79A7", "#E69F00", "#56B4E9", "0.15")
"""Colors of runs and spectra of one figure; more of them have the same colors with other marks or dashes."""

LONGEST = 28
"""Largest number of characters of a layer's name; of a longer one the end is shown."""

BOTTOM = 0.035
"""Height, as a share of that of the axes, of marks of analyses without a value."""

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


def shortened(name: str) -> str:
    """Return the name of a layer, or its end."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


_is_offscreen: ContextVar[bool] = ContextVar("is_offscreen", default=False)


@contextlib.contextmanager
def offscreen() -> Iterator[None]:
    """Return a context whose new figures are for files and logs: neither a notebook nor `plt.show()` shows them."""
    token = _is_offscreen.set(True)
    try:
        yield
    finally:
        _is_offscreen.reset(token)


def offscreen_figure(draw: Callable[..., Axes], *arguments: object, **options: object) -> Figure:
    """Return the figure that a function draws on axes of its own, for a file or a log."""
    with offscreen():
        figure: Figure = draw(*arguments, **options).get_figure(root=True)  # type: ignore[assignment]
    return figure


def new_axes(width: float = 4.6, height: float = 3.5, dpi: int = 160) -> Axes:
    """Return the axes of a new figure, which notebooks and `plt.show()` show unless the context is `offscreen`.

    It is small, in inches, so that its text stays legible on the cards of TensorBoard.
    """
    size = width, height
    if _is_offscreen.get():
        return Figure(size, dpi=dpi, layout="constrained").add_subplot()
    from matplotlib import pyplot as plt  # noqa: PLC0415 - it chooses a backend, which figures for files do not need

    return plt.figure(figsize=size, dpi=dpi, layout="constrained").add_subplot()


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


# The axis along a run -------------------------------------------------------------------------------------------------

FEW = 8
"""Largest number of analyses that have a tick each."""

ROOM = 0.09
"""Least distance of a tick from that of the start, as a share of the axis, so that labels do not overlap."""


@dataclass(frozen=True)
class RunAxis:
    """The horizontal axis of one run or of several.

    Attributes:
        positions: Epochs or steps of the records, ascending.
        label: "epoch" or "step".
    """

    positions: tuple[int, ...]
    label: str

    @classmethod
    def of(cls, *runs: Sequence[SpectrumRecord]) -> RunAxis:
        """Return epochs, or optimizer steps where an epoch of a run has several records; those of all runs, once each.

        Raises:
            ValueError: If a run has no records.
        """
        if not runs or not all(runs):
            msg = "the history has no record: was anything analyzed?"
            raise ValueError(msg)
        by_epoch = all(len({record.epoch for record in run}) == len(run) for run in runs)
        label = "epoch" if by_epoch else "step"
        positions = [record.epoch if by_epoch else record.global_step for run in runs for record in run]
        return cls(tuple(positions if len(runs) == 1 else sorted(set(positions))), label)

    def positions_of(self, records: Sequence[SpectrumRecord]) -> tuple[int, ...]:
        """Return the positions of the records of one run on this axis."""
        return tuple(record.epoch if self.label == "epoch" else record.global_step for record in records)

    def name(self, position: int) -> str:
        """Return the label of a tick."""
        return "start" if (self.label, position) == ("epoch", START_EPOCH) else f"{position}"

    def ticks(self) -> list[int]:
        """Return positions of ticks: those of all analyses if they are few, else round numbers and the start."""
        first, last = self.positions[0], self.positions[-1]
        if len(self.positions) <= FEW and min(np.diff(self.positions), default=last - first) > ROOM * (last - first):
            return list(self.positions)
        clear = first + ROOM * (last - first) if self.name(first) == "start" else first
        regular = MaxNLocator(7, integer=True).tick_values(max(first, 0), last)
        starts = [first] if self.name(first) == "start" else []
        return [*starts, *(int(tick) for tick in regular if clear <= tick <= last)]

    def edges(self) -> NDArray[np.float64]:
        """Return the borders of a cell around each position: halfway to its neighbors."""
        at = np.array(self.positions, dtype=np.float64)
        if len(at) == 1:
            return np.array([at[0] - 0.5, at[0] + 0.5])
        between = (at[1:] + at[:-1]) / 2
        return np.array([2 * at[0] - between[0], *between, 2 * at[-1] - between[-1]])

    def label_on(self, ax: Axes) -> None:
        """Give the horizontal axis its ticks and its name."""
        ticks = self.ticks()
        ax.set_xticks(ticks, [self.name(tick) for tick in ticks])
        ax.set_xlabel(self.label)


def mark_at_bottom(ax: Axes, at: NDArray[Any], marker: str = "x", label: str = "failed") -> None:
    """Mark analyses without a value at their positions, shape (analyses,)."""
    if len(at):
        ax.plot(
            at, np.full(len(at), BOTTOM), marker, color=NEGATIVE, markersize=6, markeredgewidth=1.6,
            markerfacecolor="none", transform=ax.get_xaxis_transform(), label=label,
        )  # fmt: skip


# Logarithmic axes for both signs --------------------------------------------------------------------------------------

MAX_DECADES = 5
"""Number of decades of the axis: much smaller values are drawn near zero."""

LABELS_PER_SIGN = {"x": 3, "y": 4}
"""Largest number of labels on either side of zero; side by side they need more room."""


def linear_threshold(sizes: Iterable[float]) -> float:
    """Return a power of ten just below the smallest of these sizes that is not zero; 1 where all are zero."""
    present = [size for size in map(abs, sizes) if 0 < size < math.inf]
    if not present:
        return 1.0
    smallest = max(min(present), max(present) * 10.0**-MAX_DECADES)
    return 10.0 ** math.floor(math.log10(smallest) + 1e-9)


def set_signed_log(
    ax: Axes, threshold: float, low: float, high: float, *, linear_part: float = 1.0, which: Literal["x", "y"] = "y"
) -> None:
    """Make an axis linear within `threshold` of zero, logarithmic beyond, and label its decades.

    Args:
        ax: The axes.
        threshold: A power of ten.
        low: Lower end of the axis.
        high: Upper end of the axis.
        linear_part: Length of the axis from zero to the threshold, in decades.
        which: The horizontal or the vertical axis.
    """
    set_scale, set_limits = (ax.set_xscale, ax.set_xlim) if which == "x" else (ax.set_yscale, ax.set_ylim)
    set_scale("symlog", linthresh=threshold, linscale=linear_part)
    set_limits(low, high)
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(FixedLocator(_ticks(threshold, low, high, LABELS_PER_SIGN[which])))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _ticks(threshold: float, low: float, high: float, labels_per_sign: int) -> list[float]:
    ticks = [0.0] if low <= 0 <= high else []
    lowest = round(math.log10(threshold))
    highest = math.floor(math.log10(max(abs(low), abs(high), threshold)) + 1e-9)
    every = 1 + (highest - lowest) // labels_per_sign
    # Counted from the outermost: the decades next to zero are the closest to each other.
    sizes = [10.0**exponent for exponent in range(highest, lowest - 1, -every)]
    return [*(-size for size in sizes if -size >= low), *ticks, *(size for size in sizes if size <= high)]


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    return rf"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$"
