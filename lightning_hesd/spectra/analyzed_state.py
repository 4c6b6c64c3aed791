"""`AnalyzedState`: the values of a record, or of its payload, that rankings and the judge use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning_hesd.spectra.record import SpectrumRecord


@dataclass(frozen=True)
class AnalyzedState:
    """The values of a record, or of the payload of a record, that rankings and the judge use.

    Attributes:
        epoch: Epoch of the analysis.
        global_step: Optimizer steps taken by then.
        loss: Mean loss over the analysis samples; NaN if the analysis failed.
        hesd_type: "MP" or "MN"; None where C_t is undefined.
        scores: Criterion of each rule, by the rule's name; NaN or absent where it is undefined.
        metrics: Logged metrics of the analyzed weights, by key.
        record: The record; None for a payload, which has less.
    """

    epoch: int
    global_step: int
    loss: float
    hesd_type: str | None
    scores: Mapping[str, float]
    metrics: Mapping[str, float]
    record: SpectrumRecord | None = None

    @classmethod
    def of(cls, record: SpectrumRecord) -> AnalyzedState:
        """Return the values of a record."""
        spectrum = record.spectrum
        return cls(
            record.epoch,
            record.global_step,
            math.nan if spectrum is None else spectrum.loss,
            None if spectrum is None else spectrum.hesd_type,
            {name: rule.score(record) for name, rule in RULES.items()},
            record.metrics,
            record,
        )

    @classmethod
    def of_payload(cls, payload: Mapping[str, Any]) -> AnalyzedState:
        """Return the values of the payload of a record, which have seven digits."""
        spectrum = payload["spectra"].get("spectrum") or {"loss": None, "type": None}
        return cls(
            payload["epoch"],
            payload["global_step"],
            math.nan if spectrum["loss"] is None else spectrum["loss"],
            spectrum["type"],
            {rule: -math.inf if score is None else score for rule, score in payload["scores"].items()},
            {key: value for key, value in payload["metrics"].items() if value is not None},
        )


def analyzed_states(records: Iterable[SpectrumRecord]) -> list[AnalyzedState]:
    """Return the states of records, in their order."""
    return list(map(AnalyzedState.of, records))
