"""How a record of a run compares with similar networks, in the phase of training that its loss tells."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lightning_hesd.spectra.record import START_EPOCH
from lightning_hesd.spectra.reference_range import compare_with_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.reference_range import ReferenceComparison


def compare_run_with_reference(records: Sequence[SpectrumRecord], index: int = -1) -> ReferenceComparison | None:
    """Compare a record of a run with the reference, in the phase that its loss tells; None if its analysis failed.

    The phase is known if the run has an analysis of the start (`at_start=True`); otherwise the record is compared with
    all trained states.

    Args:
        records: The records of the run, in the order of training.
        index: Position of the record.
    """
    record = records[index]
    if record.spectrum is None:
        return None
    starts = (other.spectrum.loss for other in records if other.epoch == START_EPOCH and other.spectrum is not None)
    return compare_with_reference(record.spectrum, start_loss=next(starts, None))


def comparison_lines(records: Sequence[SpectrumRecord], width: int) -> list[str]:
    """Return how the last record compares, as lines for the terminal; none where there is no comparison."""
    compared = compare_run_with_reference(records)
    if compared is None or compared.reason is not None:
        return []
    return textwrap.wrap(compared.sentence, width, subsequent_indent="  ")
