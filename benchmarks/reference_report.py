"""The page of the reference range: its networks, its ranges, and how often it calls networks unusual."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from examples.shared import Table, markdown
from lightning_hesd.spectra.indicators import effective_rank
from lightning_hesd.spectra.reference_range import LEAST_NETWORKS, between, range_of, similar
from lightning_hesd.spectra.reference_table import ARCHITECTURES, PHASES, QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benchmarks.reference_networks import Configuration, Size
    from lightning_hesd.spectra.quadrature import Array
    from lightning_hesd.spectra.reference_range import Answer, ReferenceComparison
    from lightning_hesd.spectra.reference_table import ReferenceState
    from lightning_hesd.spectra.spectrum import Spectrum

BEYOND: tuple[Answer, ...] = ("unusual", "outside what we have seen")
TITLES = [quantity.title for quantity in QUANTITIES.values()]

EXPLANATION = """\
What `compare_with_reference` compares a spectrum with:
{networks} networks of {configurations} configurations, with {low:,} to {high:,} parameters. MLPs learn scikit-learn's
digits, iris, wine, breast cancer (cross-entropy) and diabetes (mean squared error of standardized values), ResNets
with batch normalization and ViTs digits, GPTs the next character of generated sentences. Constant learning rates,
none of them tuned; {steps} training steps at most. {samples} samples (of text, {sequences} sequences) and {lanczos}
Lanczos steps in each analysis, in float32. Analyses were made before the first step, and after {epochs} epochs of at
most 8 batches. Of each network the table has the last state of each phase: *start*, before the first step; *early*,
*middle*, *late*: with more than half, with a tenth to half, with less than a tenth of the loss at the start left.
{left_out}

*Usual* is what lies between the quantiles of 10 % and 90 % of the networks of the same kind and phase with a tenth to
ten times as many parameters, *unusual* what lies beyond, *outside* what none of them reached. With fewer than
{least} networks there is no comparison. Where an interval contains a quantity (C_t, numbers of eigenvalues), the
whole interval must lie beyond; one that is wider than the usual range is not compared.
"""
RANGES = """\
## The ranges

Usual range, and all values in brackets, over the networks of a kind and phase of all sizes. Comparisons are with
those of similar size only.
"""
CHECK = """\
## Healthy networks

Each state is compared with the table without its configuration. A cell says in how many of the comparisons a quantity
was *unusual* / *outside*. About 20 % beyond the usual range are what its definition leads one to expect; a
configuration that differs from all others is beyond more often. {summary}
"""
FAULTS = """\
## Planted faults

The trainings of [findings](findings.md) with a fault that changes the spectrum, and healthy ones, all of other
networks than those of the table, at their last analysis. A cell has the answers for two seeds: a dot is *usual*, u
*unusual*, **o** *outside*, and - no comparison. {summary}
"""
NORMALIZATION = """\
## Why these quantities

A quantity can be compared between networks of different sizes if it hardly depends on the number of parameters n.
Columns: the rank correlation with n, and the factor between the quantiles of 10 % and 90 %, over the networks of a
kind and phase, as medians over kinds and phases; late in training alone in brackets. Those in bold are compared.

- **C_t** has no unit, and the scale of the loss does not change it.
- **λ_max·‖w‖²/loss at the start.** Where a factor on all weights leaves the function the same, as before batch
  normalization, λ_max changes by its inverse square and ‖w‖² by its square, so that the product stays. In ReLU
  networks without normalization it is the curvature in steps relative to the weights. Dividing by the loss before the
  first step removes the unit of the loss. Dividing by the present loss instead makes it depend more on n; late in
  training it spreads less then. λ_max itself spreads less over all phases and does not depend on n here, but it has
  the units of the loss and of the weights.
- **Eigenvalues below −λ_max/100** as a share of n, by proven bounds. The number below zero itself has bounds that are
  too wide to compare: thousands of eigenvalues lie next to zero.
- **Stable rank**, Σλ²/λ_max². The effective rank by entropy, exp of the entropy of |λ|/Σ|λ|, grows with n, since the
  many small eigenvalues dominate it. Neither is divided by the number of classes, which a spectrum does not tell.
- **Largest share of a layer in the trace**, with two standard errors, where the trace is positive by two standard
  errors; before the first step it usually is not.
"""


class Network(NamedTuple):
    """A trained network.

    Attributes:
        configuration: Its settings.
        seed: Its seed.
        states: The last state of each phase, with its spectrum.
        loss_left: Loss at the end, as a share of that at the start.
    """

    configuration: Configuration
    seed: int
    states: list[tuple[ReferenceState, Spectrum]]
    loss_left: float


class Fault(NamedTuple):
    """A training of `benchmarks.planted_faults`.

    Attributes:
        name: Name of the case.
        key: The finding that it should raise; None: healthy.
        compared: How its last record compares with the table.
    """

    name: str
    key: str | None
    compared: ReferenceComparison


def page(
    networks: Sequence[Network],
    left_out: Sequence[Network],
    states: Sequence[ReferenceState],
    faults: Sequence[Fault],
    size: Size,
) -> str:
    """Return the page in Markdown."""
    dimensions = [state.dimension for state in states]
    epochs = [str(epoch + 1) for epoch in size.epochs]
    missing = [f"{one.configuration.words} (seed {one.seed})" for one in left_out]
    words = (
        f"Left out, because more than half of the loss was left at the end: {', '.join(missing)}." if missing else ""
    )
    explanation = EXPLANATION.format(
        networks=len(networks), configurations=len({one.configuration for one in networks}), low=min(dimensions),
        high=max(dimensions), steps=8 * (size.epochs[-1] + 1), samples=size.samples, sequences=size.samples // 8,
        lanczos=size.steps, epochs=f"{', '.join(epochs[:-1])} and {epochs[-1]}", left_out=words, least=LEAST_NETWORKS,
    )  # fmt: skip
    check, summary = checked(states)
    return "\n".join([
        "# Reference range\n", _wrapped(explanation),
        RANGES, markdown(ranges(states)), "",
        _wrapped(CHECK.format(summary=summary)), markdown(check), "",
        _wrapped(FAULTS.format(summary=of_faults(faults))), markdown(answers_to_faults(faults)), "",
        NORMALIZATION, markdown(normalization(networks)), "",
        "## The networks\n", markdown(listed(networks)), "",
    ])  # fmt: skip


def _wrapped(text: str) -> str:
    """Return paragraphs with lines of 120 characters at most."""
    filled = (textwrap.fill(" ".join(part.split()), 120, break_on_hyphens=False) for part in text.split("\n\n"))
    return "\n\n".join(filled) + "\n"


def groups(states: Sequence[ReferenceState]) -> list[tuple[str, str, list[ReferenceState]]]:
    """Return the states of each kind of network and phase."""
    found = [
        (kind, phase, [state for state in states if (state.architecture, state.phase) == (kind, phase)])
        for kind in ARCHITECTURES
        for phase in PHASES
    ]
    return [group for group in found if group[2]]


def ranges(states: Sequence[ReferenceState]) -> Table:
    """Return the ranges by kind and phase."""
    rows = []
    for kind, phase, members in groups(states):
        cells = []
        for key in QUANTITIES:
            found = range_of(members, key)
            cells.append("-" if found is None else f"{between(*found.usual)} [{between(*found.seen)}]")
        rows.append([kind, phase, str(len(members)), *cells])
    return Table(["kind", "phase", "networks", *TITLES], rows)


def answers(state: ReferenceState, others: Sequence[ReferenceState]) -> dict[str, Answer]:
    """Return the answers for a state among others; none where too few of them are similar."""
    near = similar(others, state.architecture, state.dimension, state.phase)  # type: ignore[arg-type]
    found = {key: range_of(near, key) for key in QUANTITIES}
    known = {key: one for key, one in found.items() if one is not None and not math.isnan(state.values[key][0])}
    return {key: one.answer(*state.values[key]) for key, one in known.items()}


def checked(states: Sequence[ReferenceState]) -> tuple[Table, str]:
    """Return the table of all states against those of other configurations, and its summary."""
    rows, every = [], []
    for kind, phase, members in groups(states):
        found = [answers(s, [other for other in states if other.configuration != s.configuration]) for s in members]
        every += found
        cells = [_rates(one[key] for one in found if key in one) for key in QUANTITIES]
        rows.append([kind, phase, f"{sum(map(bool, found))} of {len(found)}", *cells])
    rows.append(["all", "", f"{sum(map(bool, every))} of {len(every)}", *_totals(every)])
    compared = [one for one in every if one]
    beyond = sum(any(answer in BEYOND for answer in one.values()) for one in compared)
    outside = sum(BEYOND[1] in one.values() for one in compared)
    summary = (
        f"Of {len(compared)} compared states, {_percent(beyond, len(compared))} were beyond the usual range in some "
        f"quantity, {_percent(outside, len(compared))} outside in some."
    )
    return Table(["kind", "phase", "compared", *TITLES], rows), summary


def _totals(every: Sequence[dict[str, Answer]]) -> list[str]:
    return [_rates(one[key] for one in every if key in one) for key in QUANTITIES]


def _rates(found: Iterable[Answer]) -> str:
    counts = Counter(found)
    total = sum(counts[answer] for answer in ("usual", *BEYOND))
    return " / ".join(_percent(counts[answer], total) for answer in BEYOND) if total else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def answers_to_faults(faults: Sequence[Fault]) -> Table:
    """Return the answers for each case, seed by seed."""
    marks = {"usual": "·", "unusual": "u", "outside what we have seen": "**o**", "no comparison": "-"}
    rows = []
    for name in dict.fromkeys(fault.name for fault in faults):
        of_case = [fault for fault in faults if fault.name == name]
        found = [{one.key: marks[one.answer] for one in fault.compared.quantities} for fault in of_case]
        cells = [" ".join(one.get(key, "-") for one in found) for key in QUANTITIES]
        rows.append([name if of_case[0].key else f"healthy: {name}", *cells])
    return Table(["training", *TITLES], rows)


def of_faults(faults: Sequence[Fault]) -> str:
    """Return how many trainings with and without faults are outside in some quantity, in words."""
    words = []
    for title, chosen in (
        ("with a fault", [fault for fault in faults if fault.key]),
        ("without", [fault for fault in faults if not fault.key]),
    ):
        beyond = sum(any(fault.compared.titles(answer) for answer in BEYOND) for fault in chosen)
        outside = sum(bool(fault.compared.titles(BEYOND[1])) for fault in chosen)
        words.append(
            f"of {len(chosen)} trainings {title}, {beyond} are beyond the usual range in some quantity, "
            f"and {outside} outside"
        )
    return f"{'; '.join(words)}.".capitalize()


def normalization(networks: Sequence[Network]) -> Table:
    """Return how candidates of quantities depend on the number of parameters, and how widely they spread."""
    candidates: dict[str, Callable[[Spectrum, ReferenceState], float]] = {
        "**−C_t**": lambda s, _: -s.c_t,
        "λ_max": lambda s, _: s.lambda_max,
        "λ_max·‖w‖²": lambda s, _: s.lambda_max * (s.squared_weight_norm or math.nan),
        "λ_max·‖w‖²/loss": lambda s, _: s.lambda_max * (s.squared_weight_norm or math.nan) / s.loss,
        "**λ_max·‖w‖²/loss at the start**": lambda _, state: state.values["relative_curvature"][0],
        "number of eigenvalues below −λ_max/100, at least": lambda s, v: (
            v.values["far_negative_share"][0] * s.dimension
        ),
        "**the same as a share of n**": lambda _, state: state.values["far_negative_share"][0],
        "negative eigenvalues as a share of n, at least": lambda s, _: s.negative_count[0] / s.dimension,
        "negative eigenvalues as a share of n, at most": lambda s, _: s.negative_count[1] / s.dimension,
        "effective rank by entropy": lambda s, _: effective_rank(s),
        "**stable rank**": lambda _, state: state.values["stable_rank"][0],
        "**largest share of a layer, at least**": lambda _, state: state.values["largest_share"][0],
    }
    pairs = {id(state): spectrum for network in networks for state, spectrum in network.states}
    every = [state for network in networks for state, _ in network.states]
    rows = []
    for name, of in candidates.items():
        found = []
        for _, phase, members in groups(every):
            values = np.array([of(pairs[id(state)], state) for state in members])
            sizes = np.array([state.dimension for state in members])[values > 0]
            if len(sizes) >= LEAST_NETWORKS:
                spread = np.quantile(values[values > 0], 0.9) / np.quantile(values[values > 0], 0.1)
                found.append((phase, _rank_correlation(sizes, values[values > 0]), float(spread)))
        rows.append([name, _medians(found, 1, "+.2f"), _medians(found, 2, ".1f")])
    return Table(["quantity", "correlation with n", "factor of spread"], rows)


def _medians(found: Sequence[tuple[str, float, float]], column: int, digits: str) -> str:
    """Return the median over all groups, and in brackets that over those late in training."""
    every, late = found, [row for row in found if row[0] == "late"]
    texts = [f"{np.median([row[column] for row in rows]):{digits}}" if rows else "-" for rows in (every, late)]
    return f"{texts[0]} ({texts[1]})"


def _rank_correlation(first: Array, second: Array) -> float:
    ranks = np.array([np.argsort(np.argsort(values)) for values in (first, second)])
    return float(np.corrcoef(ranks)[0, 1])


def listed(networks: Sequence[Network]) -> Table:
    """Return the configurations with their parameters, and the loss left at the end."""
    rows = []
    for configuration in dict.fromkeys(network.configuration for network in networks):
        own = [network for network in networks if network.configuration == configuration]
        left = ", ".join(f"{network.loss_left:.1%}" for network in own)
        rows.append([configuration.words, f"{own[0].states[0][0].dimension:,}", left])
    return Table(["configuration", "parameters", "loss left at the end, by seed"], rows)
