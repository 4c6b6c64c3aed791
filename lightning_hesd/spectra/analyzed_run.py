"""`AnalyzedRun`: the records of a run as the kinds of findings look at them; `Found`: what a kind returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from lightning_hesd.spectra.analyzed_state import analyzed_states
from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.spectra.analyzed_state import AnalyzedState
    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum

Confidence = Literal["certain", "likely", "hint"]


class Found(NamedTuple):
    """What a kind found: the fields of `Finding` without the key."""

    title: str
    evidence: str
    confidence: Confidence
    action: str


@dataclass(frozen=True)
class AnalyzedRun:
    """The records of a run, and the time of its analyses over the time of training without them, if known."""

    records: Sequence[SpectrumRecord]
    overhead: float | None

    @cached_property
    def trained(self) -> list[tuple[SpectrumRecord, Spectrum]]:
        """The analyses of trained weights with a finite C_t."""
        return [pair for pair in self._defined if pair[0].epoch != START_EPOCH]

    @cached_property
    def last(self) -> tuple[SpectrumRecord, Spectrum] | None:
        """The last analysis with a finite C_t, of whatever weights."""
        return next(iter(self._defined[::-1]), None)

    @cached_property
    def states(self) -> list[AnalyzedState]:
        """The values of the records that rankings use."""
        return analyzed_states(self.records)

    @cached_property
    def _defined(self) -> list[tuple[SpectrumRecord, Spectrum]]:
        found = [(record, record.spectrum) for record in self.records if record.spectrum is not None]
        return [(record, spectrum) for record, spectrum in found if math.isfinite(spectrum.c_t)]


def share_of(some: Sequence[object], every: Sequence[object]) -> str:
    """Return how many of all analyses these are, in words."""
    return f"{len(some)} of {len(every)} analyses"


def time_of(record: SpectrumRecord) -> str:
    """Return the time of an analysis, in words."""
    return "at the start" if record.epoch == START_EPOCH else f"at epoch {record.epoch}"
