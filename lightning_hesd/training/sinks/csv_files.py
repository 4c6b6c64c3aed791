"""CSVLogger: densities as tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger

    from lightning_hesd.training.history import SpectrumHistory


class CSVSink:
    """The densities as rows of tables beside the logger's own metrics.csv."""

    COLUMNS = ("epoch", "step", "left", "right", "mass")

    def __init__(self, logger: CSVLogger, name: str) -> None:
        self._folder = Path(logger.log_dir)
        self._name = name

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        record = history[-1]
        self._folder.mkdir(parents=True, exist_ok=True)
        for suffix, spectrum in record.spectra.items():
            mass, edges = spectrum.histogram()
            path = self._folder / f"{self._name}{suffix}_density.csv"
            is_new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(self.COLUMNS)
                writer.writerows(
                    (record.epoch, step, left, right, share)
                    for left, right, share in zip(edges[:-1], edges[1:], mass, strict=True)
                    if share > 0
                )

    def finish(self, history: SpectrumHistory) -> None:
        """Leave it at that: the spectra lie beside the tables already."""
