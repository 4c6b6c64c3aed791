"""The table of the reference range: the spectra of small networks in training, state by state.

`benchmarks/reference_range.py` trained the networks and wrote the table. benchmarks/results/reference_range.md
describes them, and says how often other healthy networks, and planted faults, are unusual among them.
"""

from __future__ import annotations

import csv
import math
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning_hesd.spectra.spectrum import Spectrum

SOURCE = "benchmarks/reference_range.py"
"""The program that trained the networks of the table."""

TABLE = "reference_range.csv"

Phase = Literal["start", "early", "middle", "late"]
"""Phase of training, by the loss and that before the first step: see `phase_by_loss`."""

PHASES: tuple[Phase, ...] = get_args(Phase)

EARLY, LATE = 0.5, 0.1
"""Shares of the loss at the start: with more than the first left, training is early, with less than the second late."""

ARCHITECTURES = ("perceptron", "convolution", "attention")
"""The kinds of networks in the table; which network is of which: `numerics.inputs.architecture`."""

FAR_BELOW_ZERO = 0.01
"""Eigenvalues below minus this share of λ_max are counted: there are thousands next to zero, whose sign is rounding."""

Interval = tuple[float, float]

UNKNOWN: Interval = (math.nan, math.nan)


class Quantity(NamedTuple):
    """A quantity of a spectrum that is compared.

    Attributes:
        title: Name in sentences and tables.
        of: Function of the spectrum and of the loss before the first step, None: unknown; returns the ends of the
            interval that contains the quantity, NaN: unknown.
    """

    title: str
    of: Callable[[Spectrum, float | None], Interval]


def _relative_curvature(spectrum: Spectrum, start_loss: float | None) -> Interval:
    """Return λ_max·‖w‖²/L_start: the curvature in steps relative to the weights, relative to the loss at the start."""
    norm = spectrum.squared_weight_norm
    if norm is None or start_loss is None or not start_loss > 0 or spectrum.reason:
        return UNKNOWN
    unit = norm / start_loss
    return spectrum.lambda_max * unit, spectrum.extreme_bounds[1] * unit


def _far_negative_share(spectrum: Spectrum, _: float | None) -> Interval:
    """Return bounds on the share of eigenvalues far below zero, which are proven: see `Spectrum.count`."""
    threshold = FAR_BELOW_ZERO * spectrum.lambda_max
    if spectrum.reason or not threshold > spectrum.rounding:
        return UNKNOWN
    low, high = spectrum.count(below=-threshold)
    return low / spectrum.dimension, high / spectrum.dimension


def _stable_rank(spectrum: Spectrum, _: float | None) -> Interval:
    """Return Σλ²/λ_max², an effective rank that the many small eigenvalues hardly change."""
    if spectrum.reason or not spectrum.lambda_max > spectrum.rounding:
        return UNKNOWN
    rank = spectrum.dimension * spectrum.moment(2) / spectrum.lambda_max**2
    return rank, rank


def _largest_share(spectrum: Spectrum, _: float | None) -> Interval:
    """Return the share in the trace of the layer that has most of it, with two standard errors.

    Unknown where the trace is not evidently positive, as before the first step: shares of nearly nothing are noise.
    """
    layers = spectrum.by_layer.values()
    total = sum(layer.trace for layer in layers)
    if not total > 2 * spectrum.trace_error:
        return UNKNOWN
    largest = max(layers, key=lambda layer: layer.trace)
    error = 2 * largest.trace_error
    return (largest.trace - error) / total, (largest.trace + error) / total


QUANTITIES: dict[str, Quantity] = {
    "c_t": Quantity("C_t", lambda spectrum, _: spectrum.c_t_interval),
    "relative_curvature": Quantity("λ_max·‖w‖²/loss at the start", _relative_curvature),
    "far_negative_share": Quantity("share of eigenvalues below −λ_max/100", _far_negative_share),
    "stable_rank": Quantity("stable rank Σλ²/λ_max²", _stable_rank),
    "largest_share": Quantity("largest share of a layer in the trace", _largest_share),
}
"""The quantities that are compared, by key. None depends on the unit of the loss."""


class ReferenceState(NamedTuple):
    """A state of a network in training.

    Attributes:
        configuration: Number of the network's settings: those with one number differ in the seed only.
        seed: Seed of weights and batches.
        architecture: Kind of the network, one of `ARCHITECTURES`.
        dimension: Number of parameters.
        phase: Phase of training.
        values: Ends of the interval of each quantity, by its key; NaN: unknown.
    """

    configuration: int
    seed: int
    architecture: str
    dimension: int
    phase: str
    values: Mapping[str, Interval]

    @property
    def network(self) -> tuple[int, int]:
        """What tells the network from others."""
        return self.configuration, self.seed


def quantities_of(spectrum: Spectrum, start_loss: float | None) -> dict[str, Interval]:
    """Return the ends of the interval of each quantity, by its key; NaN: unknown."""
    return {key: quantity.of(spectrum, start_loss) for key, quantity in QUANTITIES.items()}


def phase_by_loss(loss: float, start_loss: float | None) -> Phase | None:
    """Return the phase by the loss and that before the first step; None: it cannot be told."""
    if start_loss is None or not start_loss > 0 or not math.isfinite(loss):
        return None
    if loss == start_loss:
        return "start"
    left = loss / start_loss
    return "early" if left > EARLY else "middle" if left >= LATE else "late"


@cache
def reference_states() -> tuple[ReferenceState, ...]:
    """Return the states of the table in this package."""
    text = (files("lightning_hesd.spectra") / TABLE).read_text(encoding="utf-8")
    return read_states(text)


def read_states(text: str) -> tuple[ReferenceState, ...]:
    """Return the states of a table that `states_text` wrote."""
    return tuple(
        ReferenceState(
            int(row["configuration"]),
            int(row["seed"]),
            row["architecture"],
            int(row["parameters"]),
            row["phase"],
            {key: _interval(row[key]) for key in QUANTITIES},
        )
        for row in csv.DictReader(text.splitlines())
    )


def states_text(states: Iterable[ReferenceState]) -> str:
    """Return the table of states as CSV, with three digits and no cell for what is unknown."""
    lines = [",".join(("configuration", "seed", "architecture", "parameters", "phase", *QUANTITIES))]
    for state in states:
        cells = [_cell(*state.values[key]) for key in QUANTITIES]
        plain = (state.configuration, state.seed, state.architecture, state.dimension, state.phase)
        lines.append(",".join(map(str, (*plain, *cells))))
    return "\n".join(lines) + "\n"


def _cell(low: float, high: float) -> str:
    """Return an interval as text, such as "0.2:0.3", or "0.2" where the ends are equal."""
    if math.isnan(low) or math.isnan(high):
        return ""
    ends = f"{low:.3g}", f"{high:.3g}"
    return ends[0] if ends[0] == ends[1] else ":".join(ends)


def _interval(cell: str) -> Interval:
    ends = [float(end) for end in cell.split(":")] if cell else [math.nan]
    return ends[0], ends[-1]
