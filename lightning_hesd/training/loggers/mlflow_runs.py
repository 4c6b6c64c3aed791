"""MLFlowLogger: figures over steps, tables, and all spectra as artifacts."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING

from lightning_hesd.training.loggers.output import LAYER_COLUMNS, figures, layer_rows, saved, title, verdict_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch.loggers import MLFlowLogger

    from lightning_hesd.training.history import SpectrumHistory


class MLflowOutput:
    """Writes densities as images over steps; layers, assessments and spectra as artifacts; last verdict as a tag."""

    def __init__(self, logger: MLFlowLogger, name: str) -> None:
        self._client = logger.experiment
        self._run = logger.run_id
        # MLflow refuses other characters, and Lightning drops them from metrics, too.
        self._name = re.sub(r"[^A-Za-z0-9_. -]", "", name).strip() or "hesd"

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        record = history[-1]
        for tag, image in figures(history):
            self._client.log_image(self._run, image, key=f"{self._name}{tag}", step=step)
        when = f"epoch={record.epoch}-step={record.global_step}"
        if record.layers:
            table = _as_csv([LAYER_COLUMNS, *layer_rows(record.layers)])
            self._client.log_text(self._run, table, f"{self._name}/layers/{when}.csv")
        if record.assessment is not None:
            text = verdict_text(record.assessment, title(record))
            self._client.log_text(self._run, text, f"{self._name}/assessment/{when}.md")
            self._client.set_tag(self._run, f"{self._name}.generalization", record.assessment.verdict)

    def finish(self, history: SpectrumHistory) -> None:
        """Write all spectra with their index as artifacts."""
        with saved(history) as folder:
            self._client.log_artifacts(self._run, str(folder), self._name)


def _as_csv(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
