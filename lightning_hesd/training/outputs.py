"""The outputs of records: remarks, the module's log, the loggers, and the folder of the run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.analyzed_state import analyzed_states
from lightning_hesd.spectra.criteria import quasi_singular
from lightning_hesd.spectra.payload import SELECTIONS_NAME, selection_payload, to_json
from lightning_hesd.spectra.payload_reading import SELECTION_FIELDS, PayloadError, read_payload
from lightning_hesd.spectra.record import START_EPOCH, when
from lightning_hesd.spectra.scalars import scalars
from lightning_hesd.spectra.selection import loss_tolerance
from lightning_hesd.training.compat import logged_metrics, messages, runs
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.folders import absolute, append, joined, read_text, remove, write_text
from lightning_hesd.training.gradient_monitor import likely_causes
from lightning_hesd.training.loggers import make_outputs
from lightning_hesd.training.run_facts import run_facts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import lightning.pytorch as pl

    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.error_policy import ErrorPolicy, OnError
    from lightning_hesd.training.gradient_monitor import GradientStatistics
    from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
    from lightning_hesd.training.loggers.output import LoggerOutput


class RunOutputs:
    """The outputs of one callback in one run, given its name and its options as plain values.

    Attributes:
        folder: Folder of the run's spectra, a path or a URL; None on ranks that write nothing.
    """

    def __init__(self, name: str, options: Mapping[str, Any], *, in_progress_bar: bool) -> None:
        self._name = name
        self._options = options
        self._in_bar = {f"{name}/c_t"} if in_progress_bar else set()
        self._loggers: list[LoggerOutput] = []
        self._charted: Sequence[str] = ()  # names of callbacks whose charts are still to be written
        self._remarked: set[str] = set()
        self.folder: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the options without the loggers, which hold locks and connections."""
        return {**vars(self), "_loggers": [], "folder": None}

    def open(self, trainer: pl.Trainer, history: SpectrumHistory, names: Sequence[str]) -> None:
        """Find the loggers and the folder; on rank zero only, and not with `fast_dev_run`.

        The history has the records of the run that is continued, and gets the facts of this one. Of all callbacks of
        the Trainer, given by their names, the first one writes the layout of charts.
        """
        self._remarked.clear()
        run_folder = runs.run_folder(trainer)  # every rank must ask for it
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not trainer.is_global_zero or fast_dev_run:
            self.close()
            return
        self.folder = absolute(joined(run_folder, self._name))
        self._loggers = make_outputs(trainer.loggers, self._name)
        self._rewind_selections(self.folder, trainer.global_step if history.is_in(self.folder) else 0)
        self._charted = names if names[0] == self._name else ()
        history.about = run_facts(trainer, self._options)

    @staticmethod
    def _rewind_selections(folder: str, global_step: int) -> None:
        """Delete the selection events of another run in the folder, and those after `global_step`."""
        lines = read_text(folder, SELECTIONS_NAME).splitlines(keepends=True)
        kept = [line for line in lines if 0 < _step_of(line) <= global_step]
        if lines and not kept:
            remove(folder, [SELECTIONS_NAME])
        elif kept != lines:
            write_text(folder, SELECTIONS_NAME, "".join(kept))

    def close(self) -> None:
        """Release the loggers."""
        self._loggers = []
        self.folder = None

    def remark(
        self, trainer: pl.Trainer, history: SpectrumHistory, gradients: GradientStatistics | None, *, monitored: bool
    ) -> None:
        """Inform of what the last record gives reason for, once in a run; with the gradient statistics of its epoch."""
        spectra = [s for s in history[-1].spectra.values() if s.reason is None]
        lacking = next((s for s in spectra if s.sampling_reason is not None), None)
        if lacking is not None and "sampling" not in self._remarked:
            self._remarked.add("sampling")
            messages.warn(f"{self._name}: no sampling error: {lacking.sampling_reason}")
        for kind, text in _remarks(trainer, history, gradients, monitored=monitored).items():
            if kind not in self._remarked:
                self._remarked.add(kind)
                messages.inform(f"{self._name}: {text}")

    def log(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        record: SpectrumRecord,
        of_run: Mapping[str, float],
        *,
        at_epoch_end: bool,
    ) -> None:
        """Log the scalars of a record, and those of the run, `RUN_SCALARS`, by key; NaN where one is undefined."""
        if record.spectra:
            values = scalars(record, self._name)
            values |= {f"{self._name}/{key}": value for key, value in of_run.items() if not math.isnan(value)}
            logged_metrics.log_scalars(trainer, pl_module, values, at_epoch_end=at_epoch_end, in_bar=self._in_bar)

    def log_gradients(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, gradients: GradientStatistics | None
    ) -> None:
        """Log the gradient statistics of an epoch at its end; None: there are none."""
        if gradients is not None:
            values = {f"{self._name}/{key}": value for key, value in asdict(gradients).items() if key != "steps"}
            logged_metrics.log_scalars(trainer, pl_module, values, at_epoch_end=True, in_bar=())

    def write_selection(self, trainer: pl.Trainer, event: SelectionEvent, *, at_epoch_end: bool) -> None:
        """Write a selection event to the loggers that can show it, and to the folder."""
        step = logged_metrics.logging_step(trainer, at_epoch_end=at_epoch_end)
        for logger in self._loggers:
            logger.write_selection(event, step)
        if self.folder is not None:
            append(self.folder, SELECTIONS_NAME, to_json(selection_payload(event)) + "\n")

    def write(self, trainer: pl.Trainer, history: SpectrumHistory, errors: ErrorPolicy, *, at_epoch_end: bool) -> None:
        """Write the last record to the loggers and the folder; the failure of one does not affect the others."""
        consequence = f"cannot write the spectrum {when(history[-1].epoch)}"
        step = logged_metrics.logging_step(trainer, at_epoch_end=at_epoch_end)
        for logger in self._loggers:
            with errors.guard(consequence):
                (logger.write if history[-1].spectra else logger.write_failure)(history, step)
        if history[-1].epoch != START_EPOCH:  # by then the user's own hooks have written their layout
            with errors.guard("cannot write the charts for TensorBoard's Custom Scalars"):
                self._write_charts(trainer)
        if self.folder is not None:
            with errors.guard(consequence):
                history.save(self.folder)

    def _write_charts(self, trainer: pl.Trainer) -> None:
        """Write the charts of all callbacks, once in a run."""
        names, self._charted = self._charted, ()
        if names and any(isinstance(x, lightning_types("loggers.TensorBoardLogger")) for x in trainer.loggers):
            from lightning_hesd.training.loggers.custom_scalars import write_layout  # noqa: PLC0415 - slow

            write_layout(trainer.loggers, names)

    def rewrite(self, trainer: pl.Trainer, history: SpectrumHistory, *, at_epoch_end: bool) -> None:
        """Write the last record again, with metrics that were logged after it."""
        step = logged_metrics.logging_step(trainer, at_epoch_end=at_epoch_end)
        for logger in self._loggers:
            (logger.rewrite if history[-1].spectra else logger.write_failure)(history, step)
        if self.folder is not None:
            history.save(self.folder)

    def finish(self, history: SpectrumHistory, errors: ErrorPolicy, on_error: OnError | None = None) -> None:
        """Write the outputs of the end of training; the loggers get nothing after it."""
        loggers, self._loggers = self._loggers, []
        for logger in loggers if any(record.spectra for record in history) else ():
            with errors.guard("cannot write the spectra at the end of training", on_error):
                logger.finish(history)


def _remarks(
    trainer: pl.Trainer, history: SpectrumHistory, gradients: GradientStatistics | None, *, monitored: bool
) -> dict[str, str]:
    """Return the remarks that the last record gives reason for, by kind: "MN", "QS".

    `gradients` are the gradient statistics of its epoch, if any.
    """
    found: dict[str, str] = {}
    record = history[-1]
    if record.spectrum is None or record.epoch == START_EPOCH:
        return found
    if record.spectrum.hesd_type == "MN" and record.spectrum.type_certain:
        causes = likely_causes(trainer, gradients)
        if not causes:
            causes = ["none was found" if monitored else "unknown; `monitor_gradients=True` looks for it"]
        found["MN"] = (
            f"the spectrum of epoch {record.epoch} is MN (C_t = {record.spectrum.c_t:.3g}), so the criteria of "
            f"generalization do not apply. Likely cause: {'; '.join(causes)}. An untrained network is MN, too."
        )
    states = [r.spectrum for r in history if r.spectrum is not None]
    if quasi_singular(
        [s.lambda_max for s in states], [s.loss for s in states], tolerance=loss_tolerance(analyzed_states(history))
    ):
        found["QS"] = (
            f"the spectrum of epoch {record.epoch} is quasi-singular: the largest eigenvalue fell to "
            f"{record.spectrum.lambda_max:.3g} while the loss hardly changed. Largest eigenvalue and trace no longer "
            "mean flatness; prefer C_t, also to pick checkpoints."
        )
    return found


def _step_of(line: str) -> int:
    """Return the optimizer steps at a selection event; 0 if the line is damaged."""
    try:
        step: int = read_payload(line, SELECTION_FIELDS)["global_step"]
    except PayloadError:
        return 0
    return step
