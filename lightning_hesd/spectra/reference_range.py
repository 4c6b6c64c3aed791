"""`compare_with_reference`: compare a spectrum with those of similar networks from our studies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_hesd.spectra.reference_table import (
    ARCHITECTURES,
    QUANTITIES,
    SOURCE,
    Interval,
    phase_by_loss,
    quantities_of,
    reference_states,
)
from lightning_hesd.spectra.validation import check_choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_hesd.spectra.reference_table import Phase, ReferenceState
    from lightning_hesd.spectra.spectrum import Spectrum

Answer = Literal["usual", "unusual", "outside what we have seen", "no comparison"]

USUAL = (0.1, 0.9)
"""Quantiles of the similar networks between which a value is usual."""

FACTOR = 10.0
"""Networks are similar in size if one has up to this many times as many parameters as the other."""

LEAST_NETWORKS = 10
"""With fewer similar networks there is no comparison."""

NETWORKS = {
    "perceptron": "perceptrons",
    "convolution": "networks with convolutions",
    "attention": "networks with attention",
    "": "networks of any kind",
}
TIMES = {
    "start": "before the first step",
    "early": "that have more than half of their first loss left",
    "middle": "that have a tenth to half of their first loss left",
    "late": "that have less than a tenth of their first loss left",
    None: "at any time after the first step",
}


@dataclass(frozen=True)
class ReferenceRange:
    """The range of one quantity over similar networks.

    Attributes:
        usual: Quantiles of 10 % and 90 %, as `USUAL` has them.
        seen: Smallest and largest value.
        networks: Number of networks.
    """

    usual: Interval
    seen: Interval
    networks: int

    def answer(self, low: float, high: float) -> Answer:
        """Return how the value between two ends compares; ends of the range belong to it.

        A value that is known too coarsely, with ends beyond both ends of the usual range, is not compared.
        """
        if low < self.usual[0] and high > self.usual[1]:
            return "no comparison"
        if high < self.seen[0] or low > self.seen[1]:
            return "outside what we have seen"
        return "unusual" if high < self.usual[0] or low > self.usual[1] else "usual"


@dataclass(frozen=True)
class ComparedQuantity:
    """One quantity of a spectrum, compared with those of similar networks.

    Attributes:
        key: Key in `QUANTITIES`.
        title: Name of the quantity.
        low: Lower end of the interval that contains it; NaN: unknown.
        high: Upper end.
        answer: The result.
        range: The range over similar networks; None where there are too few.
    """

    key: str
    title: str
    low: float
    high: float
    answer: Answer
    range: ReferenceRange | None

    def __str__(self) -> str:
        """Return the quantity, the answer and the range in one line."""
        line = f"{self.title} = {self.value}: {self.answer}"
        if self.range is None:
            return line
        return f"{line} (middle 80 %: {between(*self.range.usual)}; all: {between(*self.range.seen)})"

    @property
    def value(self) -> str:
        """The value, or its interval, in words."""
        return "unknown" if math.isnan(self.low) else between(self.low, self.high)


@dataclass(frozen=True)
class ReferenceComparison:
    """A spectrum, compared with those of similar networks.

    "usual" is a value between the quantiles of 10 % and 90 % of these networks, "unusual" one beyond that they reached,
    too, and "outside what we have seen" one that none of them reached. None of it is a verdict: of healthy networks,
    half were beyond the usual range in some quantity (benchmarks/results/reference_range.md).

    Attributes:
        among: The networks that the spectrum is compared with, in words.
        networks: Number of these networks.
        quantities: The result for each quantity.
        reason: Why there is no comparison at all; None where there is one.
        source: The program that trained the networks.
    """

    among: str
    networks: int
    quantities: tuple[ComparedQuantity, ...]
    reason: str | None = None
    source: str = SOURCE

    def __str__(self) -> str:
        """Return the networks, and a line for each quantity."""
        if self.reason is not None:
            return f"no comparison: {self.reason}"
        return "\n".join([f"compared with {self.among} ({self.source}):", *(f"- {one}" for one in self.quantities)])

    def titles(self, answer: Answer) -> list[str]:
        """Return the quantities with an answer."""
        return [one.title for one in self.quantities if one.answer == answer]

    @property
    def sentence(self) -> str:
        """The answers in one sentence."""
        if self.reason is not None:
            return f"No comparison: {self.reason}."
        answers: tuple[Answer, ...] = ("usual", "unusual", "outside what we have seen", "no comparison")
        parts = [f"{answer}: {', '.join(self.titles(answer))}" for answer in answers if self.titles(answer)]
        said = "; ".join(parts)
        return f"Compared with {self.among}. {said[:1].upper()}{said[1:]}."

    def to_dict(self) -> dict[str, object]:
        """Return the texts that the HESD tab and the report show."""
        quantities = [
            {
                "key": one.key,
                "title": one.title,
                "value": one.value,
                "usual": "" if one.range is None else between(*one.range.usual),
                "seen": "" if one.range is None else between(*one.range.seen),
                "answer": one.answer,
            }
            for one in self.quantities
        ]
        return {"among": self.among, "reason": self.reason, "source": self.source, "quantities": quantities}


def compare_with_reference(
    spectrum: Spectrum,
    *,
    start_loss: float | None = None,
    architecture: str | None = None,
    states: Sequence[ReferenceState] | None = None,
) -> ReferenceComparison:
    """Compare a spectrum with those of similar networks that we trained, small ones on small data.

    Similar networks are of the same kind, have a tenth to ten times as many parameters, and are in the same phase of
    training. With fewer than ten of them there is no comparison.

    Args:
        spectrum: The spectrum of the Hessian over all parameters of a network.
        start_loss: Loss before the first step; that of the spectrum itself if it is of then. It tells the phase of
            training: more than half, a tenth to half, or less than a tenth of it is left. None: unknown; the spectrum
            is compared with all trained states.
        architecture: Kind of the network: "perceptron", "convolution" or "attention"; "": compare by size alone. None:
            that of the spectrum, which an analysis recognizes by the kinds of modules.
        states: Compare with these instead of those in the package.

    Raises:
        ValueError: If `architecture` is unknown.

    Examples:
        >>> from lightning_hesd import Spectrum
        >>> spectrum = Spectrum([[-0.1, 1.0]], [[0.5, 0.5]], [[0.0, 0.0]], (2,), 2, 8, 0.5, 1e-9, 2, 0.1)
        >>> compare_with_reference(spectrum).reason.partition(", ")[2]  # two parameters are too few
        'and the table has none'
    """
    phase = phase_by_loss(spectrum.loss, start_loss)
    if architecture is None:
        architecture = spectrum.architecture
    else:
        check_choice("architecture", architecture, ("", *ARCHITECTURES))
    if (reason := _not_comparable(spectrum, architecture)) is not None:
        return ReferenceComparison("", 0, (), reason)
    found = similar(reference_states() if states is None else states, architecture, spectrum.dimension, phase)
    count = len({state.network for state in found})
    if count < LEAST_NETWORKS:
        low, high = math.ceil(spectrum.dimension / FACTOR), math.floor(spectrum.dimension * FACTOR)
        wanted = f"{LEAST_NETWORKS} {_described(architecture, low, high, phase)}"
        return ReferenceComparison("", count, (), f"it takes {wanted}, and the table has {count or 'none'}")
    sizes = [state.dimension for state in found]
    among = f"{count} {_described(architecture, min(sizes), max(sizes), phase)}"
    return ReferenceComparison(among, count, tuple(_compared(quantities_of(spectrum, start_loss), found)))


def similar(
    states: Sequence[ReferenceState], architecture: str, dimension: int, phase: Phase | None
) -> list[ReferenceState]:
    """Return the states of similar networks in a phase; None: in all but the start."""
    return [
        state
        for state in states
        if architecture in {"", state.architecture}
        and dimension <= FACTOR * state.dimension
        and state.dimension <= FACTOR * dimension
        and (state.phase != "start" if phase is None else state.phase == phase)
    ]


def range_of(states: Sequence[ReferenceState], key: str) -> ReferenceRange | None:
    """Return the range of a quantity over states; None if fewer networks than `LEAST_NETWORKS` have it."""
    known = [state for state in states if not math.isnan(state.values[key][0])]
    count = len({state.network for state in known})
    if count < LEAST_NETWORKS:
        return None
    lows, highs = np.array([state.values[key] for state in known]).T
    # Values themselves, not means of two: one of them may be infinite.
    usual = float(np.quantile(lows, USUAL[0], method="lower")), float(np.quantile(highs, USUAL[1], method="higher"))
    return ReferenceRange(usual, (float(lows.min()), float(highs.max())), count)


def _compared(values: Mapping[str, Interval], states: Sequence[ReferenceState]) -> list[ComparedQuantity]:
    compared = []
    for key, ends in values.items():
        low, high = (float(f"{end:.3g}") for end in ends)  # as many digits as the table has, and as are shown
        found = range_of(states, key)
        answer: Answer = "no comparison" if found is None or math.isnan(low) else found.answer(low, high)
        compared.append(ComparedQuantity(key, QUANTITIES[key].title, low, high, answer, found))
    return compared


def _not_comparable(spectrum: Spectrum, architecture: str) -> str | None:
    """Return why the table has no networks that a spectrum can be compared with; None if it may have some."""
    if spectrum.verified == "no":
        return "the products are not those of the loss"
    if spectrum.matrix != "hessian":
        return f"the table is of Hessians, and this matrix is the {spectrum.matrix}"
    if architecture == "part":
        return "only some of the parameters are analyzed"
    if architecture not in NETWORKS:
        return f"the table has no networks of this kind, only {', '.join(NETWORKS[kind] for kind in ARCHITECTURES)}"
    return None


def _described(architecture: str, low: int, high: int, phase: Phase | None) -> str:
    size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{NETWORKS[architecture]} of {size} parameters {TIMES[phase]}"


def between(low: float, high: float) -> str:
    """Return an interval in words, with three digits."""
    ends = [f"{float(f'{end:.3g}'):g}" for end in (low, high)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
