"""CSVLogger: densities as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.training.folders import append, is_remote, write_text
from lightning_hesd.training.loggers.output import LoggerOutput, csv_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.loggers import CSVLogger

    from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord


class CSVOutput(LoggerOutput):
    """Writes densities as rows of tables beside the logger's own metrics.csv; the spectra lie beside them already."""

    COLUMNS = ("epoch", "step", "left", "right", "mass")

    def __init__(self, logger: CSVLogger, name: str) -> None:
        self._folder = logger.log_dir
        self._name = name
        self._begun: set[str] = set()

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis.

        Each table begins with the records of the run that is resumed; a table of another run is overwritten.
        """
        last = history[-1]
        for suffix in last.spectra:
            name = f"{self._name}{suffix}_density.csv"
            if suffix in self._begun and not is_remote(self._folder):
                append(self._folder, name, csv_text(_rows(last, suffix, step)))
                continue
            rows = (row for r in history for row in _rows(r, suffix, _step_of(r, last, step)))
            write_text(self._folder, name, csv_text([self.COLUMNS, *rows]))
            self._begun.add(suffix)


def _step_of(record: SpectrumRecord, last: SpectrumRecord, step: int) -> int:
    """Return the step of a record on the logger's axis, which counts batches, given that of the last record."""
    return max(round((step + 1) * record.global_step / max(last.global_step, 1)) - 1, 0)


def _rows(record: SpectrumRecord, suffix: str, step: int) -> Iterator[tuple[float, ...]]:
    spectrum = record.spectra.get(suffix)
    if spectrum is None:
        return
    mass, edges = spectrum.histogram()
    for left, right, share in zip(edges[:-1], edges[1:], mass, strict=True):
        if share > 0:
            yield record.epoch, step, left, right, share
