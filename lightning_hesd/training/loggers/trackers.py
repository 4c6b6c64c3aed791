"""WandbLogger and MLFlowLogger: figures and tables of each analysis, and all spectra as an artifact."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.spectra.analysis_lines import time_title
from lightning_hesd.spectra.assessment import SHORT_CAVEAT
from lightning_hesd.training.loggers.output import (
    LAYER_COLUMNS,
    LoggerOutput,
    csv_text,
    figures,
    layer_rows,
    saved,
    verdict_text,
)

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
    from wandb.plot import CustomChart

    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.history import SpectrumHistory

THINNING = 5
"""Every fifth point of the density is in a chart: three or more per standard deviation of the smoothing."""


class WandbOutput(LoggerOutput):
    """Writes densities as histograms, charts and figures; layers and assessments as tables; spectra as an artifact."""

    def __init__(self, logger: WandbLogger, name: str) -> None:
        import wandb  # noqa: PLC0415 - may not be installed

        self._wandb = wandb
        self._logger = logger
        self._name = name

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        record = history[-1]
        shown: dict[str, Any] = {}
        for suffix, spectrum in record.spectra.items():
            shown[f"{suffix}/density"] = self._wandb.Histogram(np_histogram=spectrum.histogram())
            shown[f"{suffix}/density_chart"] = self._chart(spectrum, f"{self._name}{suffix}, {time_title(record)}")
        for tag, image in figures(history):
            shown[tag] = self._wandb.Image(image, caption=time_title(record))
        when = [record.epoch, record.global_step]
        if record.layers:
            rows = [[*when, *row] for row in layer_rows(record)]
            shown["/layers"] = self._wandb.Table(columns=["epoch", "step", *LAYER_COLUMNS], data=rows)
        if record.assessment is not None:
            row = [*when, record.assessment.words, "\n".join(record.assessment.reasons)]
            columns = ["epoch", "step", f"criteria ({SHORT_CAVEAT})", "reasons"]
            shown["/assessment"] = self._wandb.Table(columns=columns, data=[row])
        # Through the logger, which has the prefix and the axis: W&B itself counts calls.
        self._logger.log_metrics({f"{self._name}{tag}": value for tag, value in shown.items()}, step=step)

    def finish(self, history: SpectrumHistory) -> None:
        """Write all spectra with their index as one artifact of type "hesd"."""
        run = self._logger.experiment
        artifact = self._wandb.Artifact(f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self._name)}-{run.id}", type="hesd")
        with saved(history) as folder:
            artifact.add_dir(str(folder))
        run.log_artifact(artifact)

    def _chart(self, spectrum: Spectrum, headline: str) -> CustomChart:
        """Return a chart of the density to zoom into, of logarithms because W&B's charts have no logarithmic axis."""
        from lightning_hesd.plotting.density import MIN_SHARE  # noqa: PLC0415 - Matplotlib is slow to import

        grid, density = (values[::THINNING] for values in spectrum.density())
        logarithms = np.log10(density.clip(density.max() * MIN_SHARE))
        columns = ["eigenvalue", "log10 density"]
        table = self._wandb.Table(columns=columns, data=np.stack([grid, logarithms], axis=1).tolist())
        return self._wandb.plot.line(table, *columns, title=headline)


class MLflowOutput(LoggerOutput):
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
            table = csv_text([LAYER_COLUMNS, *layer_rows(record)])
            self._client.log_text(self._run, table, f"{self._name}/layers/{when}.csv")
        if record.assessment is not None:
            text = verdict_text(record.assessment, time_title(record))
            self._client.log_text(self._run, text, f"{self._name}/assessment/{when}.md")
            self._client.set_tag(self._run, f"{self._name}.criteria", f"{record.assessment.words} ({SHORT_CAVEAT})")

    def finish(self, history: SpectrumHistory) -> None:
        """Write all spectra with their index as artifacts."""
        with saved(history) as folder:
            self._client.log_artifacts(self._run, str(folder), self._name)
