"""Where records go: the module's log, the loggers' sinks, and the folder of the run."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.payload import (
    CHOICE_FIELDS,
    CHOICES_NAME,
    PayloadError,
    choice_payload,
    read_payload,
    to_json,
)
from lightning_hesd.spectra.scalars import scalars
from lightning_hesd.training.compat import internals
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.folders import append, joined, read_text, remove, write_text
from lightning_hesd.training.loggers import make_sinks
from lightning_hesd.training.loggers.sink import SelectionSink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import lightning.pytorch as pl

    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.gradient_monitor import GradientStatistics
    from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
    from lightning_hesd.training.loggers.sink import Sink


class RunOutputs:
    """The outputs of one callback in one run."""

    def __init__(self, name: str, *, in_progress_bar: bool) -> None:
        self._name = name
        self._in_bar = {f"{name}/c_t"} if in_progress_bar else set()
        self._sinks: list[Sink] = []
        self._folder: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the options without what belongs to a run: loggers hold locks and connections."""
        return {**vars(self), "_sinks": [], "_folder": None}

    def open(self, trainer: pl.Trainer, history: SpectrumHistory, names: Sequence[str]) -> None:
        """Find out where to write; only process zero does, and nothing is written in a development run.

        Args:
            trainer: The trainer.
            history: The records there are, if the run goes on from somewhere.
            names: Names of all callbacks of this kind in the Trainer; the first one lays out the charts for all.
        """
        run_folder = internals.run_folder(trainer)  # every process must ask for it
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not trainer.is_global_zero or fast_dev_run:
            self.close()
            return
        self._folder = joined(run_folder, self._name)
        self._sinks = make_sinks(trainer.loggers, self._name)
        self._rewind_choices(self._folder, trainer.global_step if history.is_in(self._folder) else 0)
        if names[0] == self._name and any(
            isinstance(logger, lightning_types("loggers.TensorBoardLogger")) for logger in trainer.loggers
        ):
            from lightning_hesd.training.loggers.tensorboard import write_layout  # noqa: PLC0415 - TensorBoard is slow

            write_layout(trainer.loggers, names)

    @staticmethod
    def _rewind_choices(folder: str, global_step: int) -> None:
        """Delete the choices of another run in the folder, and of another continuation of this one."""
        lines = read_text(folder, CHOICES_NAME).splitlines(keepends=True)
        kept = [line for line in lines if 0 < _step_of(line) <= global_step]
        if lines and not kept:
            remove(folder, [CHOICES_NAME])
        elif kept != lines:
            write_text(folder, CHOICES_NAME, "".join(kept))

    @property
    def folder(self) -> str | None:
        """The folder of the run's spectra, a path or a URL; None if nothing is written."""
        return self._folder

    def close(self) -> None:
        """Let go of the loggers."""
        self._sinks = []
        self._folder = None

    def log(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        record: SpectrumRecord,
        overhead: float | None,
        *,
        at_epoch_end: bool,
    ) -> None:
        """Log the scalars of a record, and the share of analyses in the training time if there was any training."""
        if record.spectra:
            values = scalars(record, self._name)
            if overhead is not None:
                values[f"{self._name}/overhead"] = overhead
            internals.log_scalars(trainer, pl_module, values, at_epoch_end=at_epoch_end, in_bar=self._in_bar)

    def log_gradients(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, gradients: GradientStatistics | None
    ) -> None:
        """Log at the end of an epoch what happened to its gradients, if that was looked at."""
        if gradients is not None:
            values = {f"{self._name}/{key}": value for key, value in asdict(gradients).items() if key != "steps"}
            internals.log_scalars(trainer, pl_module, values, at_epoch_end=True, in_bar=())

    def write_selection(self, trainer: pl.Trainer, choice: SelectionEvent, *, at_epoch_end: bool) -> None:
        """Write what a checkpoint rule made of the latest record to the loggers that can show it, and to the folder."""
        step = internals.logging_step(trainer, at_epoch_end=at_epoch_end)
        for sink in self._sinks:
            if isinstance(sink, SelectionSink):
                sink.write_selection(choice, step)
        if self._folder is not None:
            append(self._folder, CHOICES_NAME, to_json(choice_payload(choice)) + "\n")

    def writers(self, trainer: pl.Trainer, history: SpectrumHistory, *, at_epoch_end: bool) -> list[Callable[[], None]]:
        """Return what writes the last record, each apart: trouble with one output must not keep out the others."""
        step = internals.logging_step(trainer, at_epoch_end=at_epoch_end)
        outputs: list[Callable[[], None]] = [
            partial(sink.write, history, step) for sink in self._sinks if history[-1].spectra
        ]
        return outputs if self._folder is None else [*outputs, partial(history.save, self._folder)]

    def finishers(self, history: SpectrumHistory) -> list[Callable[[], None]]:
        """Return what is left to write at the end of training, each apart; nothing is written after it."""
        sinks, self._sinks = self._sinks, []
        return [partial(sink.finish, history) for sink in sinks if any(record.spectra for record in history)]


def _step_of(line: str) -> int:
    """Return the optimizer steps at a choice; 0 if it cannot be read."""
    try:
        step: int = read_payload(line, CHOICE_FIELDS)["global_step"]
    except PayloadError:
        return 0
    return step
