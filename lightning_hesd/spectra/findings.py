"""`findings`: observations in the records of a run that deserve attention, with evidence and a next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hesd.spectra.analyzed_run import AnalyzedRun
from lightning_hesd.spectra.finding_kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.spectra.analyzed_run import Confidence
    from lightning_hesd.spectra.record import SpectrumRecord


@dataclass(frozen=True)
class Finding:
    """An observation on a run that deserves a look.

    The confidence is about the title, given the records:

    - "certain": it follows from the records directly, such as from the message of a failed analysis or an interval.
    - "likely": it follows from a test that may err, such as a comparison by standard errors.
    - "hint": the numbers may also have other causes. Try the next step before you conclude anything.

    Attributes:
        key: Name of the kind, a key of `KINDS`.
        title: The observation in a few words.
        evidence: The numbers behind it, in one sentence.
        confidence: "certain", "likely" or "hint".
        action: The next step, in one sentence that names an option or a page.
    """

    key: str
    title: str
    evidence: str
    confidence: Confidence
    action: str


def findings(history: Sequence[SpectrumRecord], *, overhead: float | None = None) -> list[Finding]:
    """Return the observations in the records of a run that deserve attention, the most important first.

    First comes what makes numbers absent or wrong, then what makes them uncertain, then what they say of training,
    and last the cost: the order of `KINDS`.

    Args:
        history: The records of one run, in the order of training.
        overhead: Time of the analyses over the time of training without them; None: unknown.
    """
    run = AnalyzedRun(history, overhead)
    found = {key: find(run) for key, find in KINDS.items()}
    return [Finding(key, *each) for key, each in found.items() if each is not None]
