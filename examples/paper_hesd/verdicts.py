"""Rules that judge a claim of the paper by numbers, each with its statement for the report."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import fisher_exact

from examples.paper_hesd.outcomes import TRAINED
from examples.shared import AGREES, DIFFERS, NOT_RUN, UNSEEN, Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.figure import Figure

    from examples.paper_hesd.outcomes import Outcome
    from examples.paper_hesd.rules import Difference
    from examples.shared import Table, Verdict
    from lightning_hesd import Spectrum


@dataclass(frozen=True)
class Section:
    """The report's section on a table or figure of the paper."""

    title: str
    paper: str | Table
    ours: Sequence[Table] = ()
    findings: Sequence[Finding] = ()
    figure: Figure | None = None
    caption: str = ""
    notes: Sequence[str] = field(default=())

    @property
    def slug(self) -> str:
        """The title as a file name."""
        return re.sub(r"\W+", "-", self.title.lower())


OF_TRAINED = f"Epochs with a training accuracy of {TRAINED} or more"


def kind(spectrum: Spectrum | None) -> str:
    """Return the type, "uncertain" where the interval of C_t contains the threshold, or "undefined"."""
    if spectrum is None or spectrum.hesd_type is None:
        return "undefined"
    return spectrum.hesd_type if spectrum.type_certain else "uncertain"


def counted(spectra: Iterable[Spectrum | None]) -> str:
    """Return the number of spectra of each type, in words."""
    kinds = [kind(spectrum) for spectrum in spectra]
    return ", ".join(f"{kinds.count(name)} {name}" for name in dict.fromkeys(["MP", "MN", *kinds]))


ALWAYS_MP = "agrees if all are MP with all of their C_t interval, differs if one is MN with all of it"


def always_mp(spectra: Sequence[Spectrum | None]) -> Verdict:
    """Judge the claim that all spectra are MP."""
    return combined({"MP": AGREES, "MN": DIFFERS}.get(kind(spectrum), UNSEEN) for spectrum in spectra)


SOMETIMES_MN = "agrees if one is MN with all of its C_t interval, differs if all are MP with all of it"


def sometimes_mn(spectra: Sequence[Spectrum | None]) -> Verdict:
    """Judge the claim that some spectra are MN."""
    opposite: dict[Verdict, Verdict] = {AGREES: DIFFERS, DIFFERS: AGREES}
    verdict = always_mp(spectra)
    return opposite.get(verdict, verdict)


def mn_when_trained(claim: str, runs: Sequence[Outcome]) -> Finding:
    """Judge the claim that some spectra of trained networks are MN."""
    points = [(outcome.experiment.name, point) for outcome in runs for point in outcome.trained]
    spectra = [point.spectrum for _, point in points]
    places = [
        f"{name}, epoch {p.epoch}: C_t = {p.spectrum.c_t:.2f} at training accuracy {p.train_acc:.2f}"
        for name, p in points
        if kind(p.spectrum) == "MN"
    ]
    evidence = counted(spectra) + (f" ({'; '.join(places)})" if places else "")
    verdict = sometimes_mn(spectra) if spectra else UNSEEN if runs else NOT_RUN
    return Finding(claim, f"{OF_TRAINED}: {SOMETIMES_MN}", evidence, verdict)


MORE_OFTEN = "agrees (differs) if MN is more (less) frequent with it, one-sided p < 0.05 by Fisher's exact test"


def more_often(with_it: Sequence[Spectrum], without: Sequence[Spectrum]) -> Verdict:
    """Judge the claim that spectra are MN more often in the first group than in the second."""
    if not with_it or not without:
        return UNSEEN
    counts = [[sum((kind(s) == "MN") == mn for s in spectra) for mn in (True, False)] for spectra in (with_it, without)]
    less, greater = (float(fisher_exact(np.array(counts), alternative).pvalue) for alternative in ("less", "greater"))
    return AGREES if greater < 0.05 else DIFFERS if less < 0.05 else UNSEEN


HIGHER = "agrees (differs) if the first accuracy is higher (lower) by more than two standard errors of a difference"


def standard_error(first: Outcome, second: Outcome) -> float:
    """Return the standard error of the difference of two generalization accuracies.

    Both are shares of the same images. The positive correlation of their errors is ignored, so the result is rather too
    large. Variations of an image count as one.
    """
    return math.sqrt(sum(o.last.gen_acc * (1 - o.last.gen_acc) / o.distinct for o in (first, second)))


def higher(first: Outcome, second: Outcome) -> Verdict:
    """Judge the claim that the first generalizes better than the second."""
    return by_sign(first.last.gen_acc - second.last.gen_acc, 2 * standard_error(first, second))


def by_sign(difference: float, noise: float) -> Verdict:
    """Judge the claim that a difference is positive."""
    return AGREES if difference > noise else DIFFERS if difference < -noise else UNSEEN


INTERVAL = "agrees (differs) if the 95 % interval of the mean over seeds lies above (below) 0"


def by_interval(difference: Difference, sign: int = 1) -> Verdict:
    """Judge the claim that a mean difference has this sign."""
    return {1: AGREES, -1: DIFFERS}.get(sign * difference.sign, UNSEEN)


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """Judge a claim that consists of several claims."""
    given = list(verdicts)
    if not given:
        return NOT_RUN
    return DIFFERS if DIFFERS in given else AGREES if set(given) == {AGREES} else UNSEEN
