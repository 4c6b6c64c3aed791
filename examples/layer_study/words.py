"""The paper's three words: the quantity that measures each, the questions about it, and the rule of the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.layer_study import associations as statistics
from examples.layer_study.indicators import NAMES, PLACES
from examples.shared import AGREES, DIFFERS, UNSEEN, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.layer_study.associations import Array, Association
    from examples.layer_study.outcomes import Outcome
    from examples.layer_study.settings import Study
    from examples.shared import Verdict

UNEXPLAINED = 0.1
"""A network is under-parameterized if it fails to explain more than this share of what the best network explains."""

WHOLE = PLACES[0]
RELEVANT, LEVEL = 0.3, 0.05
RULE = (
    f"agrees if at least one indicator of layers has an average correlation of {RELEVANT} or more, in size, with "
    f"corrected p < {LEVEL} and an interval that excludes 0; differs if the 95 % intervals of all of them lie between "
    f"−{RELEVANT} and {RELEVANT}"
)


@dataclass(frozen=True)
class Sample:
    """All runs of a study as arrays, which end with the axes (data sets, seeds, configurations)."""

    study: Study
    indicators: Array
    numbers: dict[str, Array]

    @property
    def gap(self) -> Array:
        """Test loss minus training loss."""
        return self.numbers["test_loss"] - self.numbers["train_loss"]

    @property
    def score_gap(self) -> Array:
        """Training accuracy (R²) minus test accuracy (R²)."""
        return self.numbers["train_score"] - self.numbers["test_score"]

    @property
    def unexplained(self) -> Array:
        """Share that a network does not explain, of what the best network of its stratum explains.

        A network explains the difference between its training loss and that of the best constant prediction.
        """
        loss = self.numbers["train_loss"]
        best = loss.min(axis=-1, keepdims=True)
        share: Array = (loss - best) / (self.numbers["constant_loss"] - best)
        return share

    @property
    def shortfall(self) -> Array:
        """Unexplained share above the allowed share; 0 for networks that are large enough."""
        return np.maximum(self.unexplained - UNEXPLAINED, 0)

    @property
    def memorized(self) -> Array:
        """Share of shuffled targets that a network explains."""
        return 1 - self.numbers["shuffled_loss"] / self.numbers["constant_loss"]


def sample(study: Study, outcomes: Sequence[Outcome]) -> Sample:
    """Return the outcomes of all runs of a study, in their order, as arrays."""
    shape = (len(study.datasets), study.seeds, len(study.configurations))
    values = [[outcome.indicators[name] for outcome in outcomes] for name in NAMES]
    numbers = {
        name: np.array([getattr(outcome.numbers, name) for outcome in outcomes], dtype=float).reshape(shape)
        for name in vars(outcomes[0].numbers)
    }
    return Sample(study, np.array(values).reshape(-1, *shape), numbers)


@dataclass(frozen=True)
class Word:
    """One of the paper's words.

    Attributes:
        name: The word.
        quantity: The quantity that measures it, in words.
        values: This quantity for all runs.
        loss_given: Whether to also hold the training loss constant; not for quantities computed from it.
    """

    name: str
    quantity: str
    values: Callable[[Sample], Array]
    loss_given: bool = True


WORDS = (
    Word("Overfitting", "the generalization gap, test loss minus training loss", lambda s: s.gap),
    Word(
        "Under-parameterization",
        "the shortfall: of what the best network on the same samples explains of the targets (how far its training "
        f"loss is below that of the best constant prediction) the share that a network does not, as far as it exceeds "
        f"{UNEXPLAINED:.0%}; 0 for all networks that are large enough",
        lambda s: s.shortfall,
        loss_given=False,
    ),
    Word(
        "Expressivity",
        "what the same network, trained alike, explains of shuffled targets, which can only be learned by heart: 1 "
        "minus the ratio of its training loss to that of the best constant prediction",
        lambda s: s.memorized,
    ),
)

RAW, SIZE, SIZE_AND_LOSS, SAME = (
    "raw", "given the size", "given size and training loss", "equal architectures",
)  # fmt: skip
CLAIMS = {
    RAW: "Spectral properties of layer-wise Hessians go with {} (the abstract).",
    SIZE: "So they do among networks of the same number of parameters and depth (our question).",
    SIZE_AND_LOSS: "So they do among those of the same training loss, too, which is known without Hessians (our "
    "question).",
}


@dataclass(frozen=True)
class Answer:
    """The result for one word: associations by view, in the order of the indicators, and the findings."""

    word: Word
    views: dict[str, list[Association]]
    size_alone: Association
    findings: list[Finding]


def answer(word: Word, data: Sample) -> Answer:
    """Return the result for a word."""
    y = word.values(data)
    parameters = data.numbers["parameters"]
    depths = np.array([depth for _, depth in data.study.configurations], dtype=float)
    size = [parameters, np.broadcast_to(depths, y.shape)]
    views = {
        RAW: statistics.associations(data.indicators, y, statistics.plain),
        SIZE: statistics.associations(data.indicators, y, statistics.given, size),
    }
    if word.loss_given:
        controls = [*size, data.numbers["train_loss"]]
        views[SIZE_AND_LOSS] = statistics.associations(data.indicators, y, statistics.given, controls)
    findings = []
    for view, found in views.items():
        layers, _ = split(found)
        claim = CLAIMS[view].format(word.name.lower())
        findings.append(Finding(claim, RULE, evidence(layers), verdict(list(layers.values()))))
    views[SAME] = statistics.associations(data.indicators, y, statistics.within, test=False)
    [size_alone] = statistics.associations(parameters[None], y, statistics.plain)
    return Answer(word, views, size_alone, findings)


def is_seen(found: Association) -> bool:
    """Whether a correlation is relevant and significant."""
    return abs(found.mean) >= RELEVANT and found.p < LEVEL and found.low * found.high > 0


def verdict(found: Sequence[Association]) -> Verdict:
    """Judge the claim that indicators correlate with an outcome."""
    defined = [one for one in found if not np.isnan(one.mean)]
    if any(is_seen(one) for one in defined):
        return AGREES
    return DIFFERS if defined and all(max(-one.low, one.high) < RELEVANT for one in defined) else UNSEEN


def split(found: Sequence[Association]) -> tuple[dict[str, Association], dict[str, Association]]:
    """Return the indicators of layers, which the paper is about, and those of the whole network, by name."""
    by_name = dict(zip(NAMES, found, strict=True))
    whole = {name: one for name, one in by_name.items() if name.endswith(f", {WHOLE}")}
    return {name: one for name, one in by_name.items() if name not in whole}, whole


def evidence(found: Mapping[str, Association]) -> str:
    """Return the number of indicators that are seen, and the strongest, with the data sets that have its sign."""
    defined = [name for name, one in found.items() if not np.isnan(one.mean)]
    strongest = sorted(defined, key=lambda name: -abs(found[name].mean))[:3]
    count = sum(is_seen(one) for one in found.values())
    return f"{count} of {len(found)} indicators; the strongest, and how many data sets share their sign: " + "; ".join(
        f"{name} {described(found[name])}" for name in strongest
    )


def described(one: Association) -> str:
    """Return a correlation in words."""
    sharing = int((one.by_dataset * one.mean > 0).sum())
    return f"{one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}], p = {one.p:.2g}, {sharing} of {len(one.by_dataset)}"
