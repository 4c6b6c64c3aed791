"""The analyses of a HessianSpectrumCallback in a run of its Trainer: when they are due, and what becomes of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lightning_hesd.spectra.analysis_lines import analysis_lines
from lightning_hesd.spectra.record import START_EPOCH, SpectrumRecord, when
from lightning_hesd.spectra.scalars import RUN_SCALARS, metric_prefixes
from lightning_hesd.spectra.selection import first_loss
from lightning_hesd.spectra.validation import check_fields, of, one_line
from lightning_hesd.training import closing, terminal
from lightning_hesd.training.checkpoints.placement import (
    insert_checkpoint,
    keep_weights,
    order_checkpoints,
    warn_about_stale_monitors,
)
from lightning_hesd.training.compat import messages, runs, signals, strategies
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.cost_notice import CostNotice
from lightning_hesd.training.fresh_metrics import FreshMetrics
from lightning_hesd.training.loss import check_loss_source
from lightning_hesd.training.outputs import RunOutputs
from lightning_hesd.training.source import metric_names, sources_of, without_training_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl

    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.checkpoints.checkpoint import HessianCheckpoint
    from lightning_hesd.training.error_policy import OnError
    from lightning_hesd.training.gradient_monitor import GradientMonitor
    from lightning_hesd.training.recorder import Recorder
    from lightning_hesd.training.source import SpectrumSource

_STATE = {"history": of(dict), "samples": of(dict), "budget": of(dict)}


class AnalysisRun:
    """Analyzes the weights in a run, and publishes the records.

    The Trainer decides which run it is: another Trainer begins another run, unless it resumes from a checkpoint.

    Attributes:
        stage: Stage of the Trainer: "fit", "validate", "test" or "predict".
        shares_name: Whether an earlier callback of the Trainer has the same name, so that there can be no spectra.
    """

    def __init__(self, source: SpectrumSource, recorder: Recorder, monitor: GradientMonitor, *, progress: bool) -> None:
        """Fill the history of the callback `source`; with `progress`, show C_t in the progress bar."""
        self.stage = "fit"
        self.shares_name = False
        self._source = source
        self._recorder = recorder
        self._monitor = monitor
        self._outputs = RunOutputs(source.name, source.given, in_progress_bar=progress)
        self._cost = CostNotice(source, is_shown=progress or source.verbose)
        self._set_up_by: str | None = None
        self._trained_by: str | None = None
        self._is_resumed = False
        self._is_to_sum_up = False
        self._metrics = FreshMetrics()
        self._lacks_metrics = False  # whether metrics may still be logged for the weights of the last record

    # Begin ----------------------------------------------------------------------------------------------------------

    def is_set_up(self, trainer: pl.Trainer) -> bool:
        """Return whether this Trainer has set up the callback; False if it was added later."""
        return self._set_up_by == runs.name_of(trainer)

    def set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer and the module, and put the checkpoint callback in place.

        Raises:
            MisconfigurationException: With `on_error="raise"`, if there can be no spectra, or no pick.
        """
        source = self._source
        self.stage = stage
        if stage == "fit":
            self._set_up_by = runs.name_of(trainer)
            source.errors.restart()
            earlier = itertools.takewhile(lambda other: other is not source, sources_of(trainer))
            self.shares_name = any(other.name == source.name for other in earlier)
            picks = source.checkpoints and not self.shares_name
            outcome = ", and the final weights take the place of the pick" if picks else ""
            with source.errors.guard(f"there will be no spectra{outcome}") as attempt:
                if self.shares_name:
                    msg = (
                        f"the Trainer has another HessianSpectrumCallback(name={source.name!r}), whose metrics, files "
                        "and state this one would overwrite: pass another `name`."
                    )
                    raise MisconfigurationException(msg)
                check_loss_source(pl_module, source.loss_fn)
                strategies.check_strategy(trainer)
            source.refusal = attempt.failure
        for checkpoint in cast("Sequence[HessianCheckpoint]", () if self.shares_name else source.checkpoints):
            with source.errors.guard("there will be no pick"):
                insert_checkpoint(trainer, pl_module, stage, checkpoint, source.on_error)
        order_checkpoints(trainer)

    def begin(self, trainer: pl.Trainer) -> None:
        """Forget the records of another run, open the outputs, and draw the samples."""
        source, errors = self._source, self._source.errors
        with errors.guard("cannot tell which metrics other callbacks monitor"):
            warn_about_stale_monitors(trainer, source.name, sparse=source.schedule.is_sparse)
        self._metrics, self._lacks_metrics = FreshMetrics(), False
        continues = self._is_resumed or self._trained_by == runs.name_of(trainer)
        self._is_resumed, self._trained_by = False, runs.name_of(trainer)
        source.history.rewind(trainer.global_step if continues else 0)
        if trainer.global_step == 0:
            source.budget.reset()
        self._cost.begin(trainer)
        source.show_in_original()
        self._is_to_sum_up = not trainer.fast_dev_run  # type: ignore[attr-defined]
        if source.refusal is not None:
            return
        with errors.guard("cannot write to the loggers"):
            self._outputs.open(trainer, source.history, [other.name for other in sources_of(trainer)])
        self._recorder.start(trainer, errors)
        with errors.guard("the gradients will not be monitored"):
            self._monitor.attach(trainer, errors)
        # Now rather than at the first analysis, because now the dataset is as it will be when the run is resumed.
        with errors.guard("cannot draw the analysis samples, will try again"):
            self._recorder.draw(trainer)
            if source.verbose:
                loss = "`training_step`" if source.loss_fn is None else "`loss_fn`"
                words = f"the mean loss of {loss} over {self._recorder.samples} is analyzed"
                terminal.say(trainer, f"{source.name}: {words}")

    def resume(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint of the callback.

        Testing a checkpoint loads the state, too, without resuming the run: the later records then stay.

        Raises:
            ValueError: If a field is missing or damaged.
        """
        if self.stage != "fit" or self.shares_name:
            return
        try:
            check_fields(state, _STATE, "the state")
            self._source.take_results(state)
            self._recorder.load_state_dict(state["samples"])
            self._is_resumed = True
        except ValueError as error:
            msg = (
                f"the state of HessianSpectrumCallback(name={self._source.name!r}) in the checkpoint is damaged, or of "
                f"another version ({one_line(error)}): resume with another `name`, which starts a new history."
            )
            raise ValueError(msg) from error

    def analyze_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Analyze the initialization if asked for, and if there are samples before training."""
        if not self._source.at_start or trainer.global_step > 0:
            return
        if self._recorder.waits():
            messages.warn(
                "the analysis before the first step (`at_start`) is left out: no samples can be drawn from this "
                "training dataloader without taking them away from training, so that its first batches are kept "
                "as samples. Pass `dataloader=` to HessianSpectrumCallback, a loader or a list of batches."
            )
            return
        self.analyze(trainer, pl_module, START_EPOCH)

    # Metrics --------------------------------------------------------------------------------------------------------

    def begin_batch(self, trainer: pl.Trainer) -> None:
        """Complete the last record, whose weights are about to change, and note which metrics are old then."""
        self.complete_record(trainer)
        # Asking Lightning for its metrics takes 50 microseconds, so only before an analysis.
        source, step = self._source, trainer.global_step + 1
        is_last = trainer.is_last_batch or step == trainer.max_steps
        may_follow = source.schedule.may_follow(trainer.current_epoch, step, is_last=is_last)
        if not source.schedule.by_epoch and not trainer.lightning_module.automatic_optimization:
            may_follow = True  # each batch takes as many steps as the module likes
        if may_follow and source.refusal is None:
            with source.errors.guard("the records will not have the metrics of the network"):
                self._metrics.begin_batch(trainer)

    def begin_validation(self, trainer: pl.Trainer) -> None:
        """Note which metrics are old, in case training stops after this validation, in the middle of an epoch."""
        source = self._source
        if source.schedule.by_epoch and source.refusal is None and not trainer.sanity_checking:
            with source.errors.guard("the records will not have the metrics of the network"):
                self._metrics.begin_validation(trainer)

    def complete_record(self, trainer: pl.Trainer) -> None:
        """Enter metrics into the last record that were logged for its weights after it was made."""
        lacks, self._lacks_metrics = self._lacks_metrics, False
        history = self._source.history
        if not lacks or not history or history[-1].global_step != trainer.global_step:
            return
        failure = "the record will not have the metrics that were logged after it"
        with without_training_time(trainer), self._source.errors.guard(failure):
            metrics = self._fresh_metrics(trainer)
            if metrics != history[-1].metrics:
                history[-1] = replace(history[-1], metrics=metrics)
                self._source.show_in_original()
                self._outputs.rewrite(trainer, history, at_epoch_end=self._source.schedule.by_epoch)

    def _fresh_metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the metrics of the present weights, without those of this package's callbacks."""
        ours = [prefix for name in metric_names(trainer) for prefix in metric_prefixes(name)]
        return self._metrics.values(trainer, tuple(ours))

    # Analyses -------------------------------------------------------------------------------------------------------

    def is_due(self, trainer: pl.Trainer, *, at_epoch_end: bool) -> bool:
        """Return whether the schedule and `max_overhead` ask for an analysis now.

        Rank zero decides on the overhead for all: clocks differ, and ranks that analyze would wait for the others.
        """
        source, step, schedule = self._source, trainer.global_step, self._source.schedule
        if at_epoch_end:
            scheduled = schedule.includes_epoch(trainer.current_epoch)
        else:
            is_analyzed = bool(source.history) and source.history[-1].global_step == step  # by a batch of this step
            scheduled = not is_analyzed and schedule.includes_step(step)
        if not scheduled or schedule.max_overhead is None:
            return scheduled
        affordable: bool = trainer.strategy.broadcast(source.budget.allows(step))
        source.budget.decide(step, analyze=affordable)
        return affordable

    def analyze(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Add the record of the present weights to the history, and publish it."""
        source = self._source
        if source.refusal is not None:  # a warning before training has said why
            source.history.append(SpectrumRecord(epoch, trainer.global_step, None, source.refusal))
            return
        strategies.wait_for_device(trainer)
        with signals.sigterm_waits(trainer), without_training_time(trainer, analyzing=source):
            record = self._recorder.record(trainer, pl_module, epoch, source.errors)
            if source.schedule.by_epoch and epoch != START_EPOCH:
                self._metrics.end_epoch(trainer)
            self._lacks_metrics = self._metrics.is_of_last_batch(trainer)
            if self._lacks_metrics:
                with source.errors.guard("the record will not have the metrics of the network"):
                    record = replace(record, metrics=self._fresh_metrics(trainer))
            record = replace(record, first_loss=first_loss(source.history), gradients=self._monitor.values())
            source.history.append(record)
            source.show_in_original()
            failure = "cannot copy the analyzed weights: checkpoints have the weights as later callbacks leave them"
            with source.errors.guard(failure):
                keep_weights(trainer, source, pl_module)
            at_epoch_end = epoch != START_EPOCH and source.schedule.by_epoch
            self._outputs.write(trainer, source.history, source.errors, at_epoch_end=at_epoch_end)
        self._publish(trainer, pl_module, at_epoch_end=at_epoch_end)

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, at_epoch_end: bool) -> None:
        """Log and print the last record."""
        source, record = self._source, self._source.history[-1]
        with source.errors.guard("cannot remark on the spectra"):
            self._outputs.remark(trainer, source.history, self._monitor.summary(), monitored=self._monitor.enabled)
            self._cost.after_analysis(trainer)
        of_run = trainer.strategy.broadcast({key: scalar.of(source.budget) for key, scalar in RUN_SCALARS.items()})
        with source.errors.guard(f"cannot log the scalars {when(record.epoch)}"):
            self._outputs.log(trainer, pl_module, record, of_run, at_epoch_end=at_epoch_end)
        if source.verbose:
            with source.errors.guard("cannot print the results"):
                mode = [f"{source.name}: {words}" for words in self._recorder.mode.news()]
                lines = analysis_lines(record, source.name, by_step=not source.schedule.by_epoch)
                terminal.say(trainer, *mode, *lines)

    def log_gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the gradient statistics of the epoch that ends."""
        with self._source.errors.guard("cannot log the gradient statistics"):
            self._outputs.log_gradients(trainer, pl_module, self._monitor.summary())

    def write_selection(self, trainer: pl.Trainer, event: SelectionEvent) -> None:
        """Log the decision of a HessianCheckpoint after the latest record."""
        with self._source.errors.guard("cannot write the decision of the checkpoint rule"):
            self._outputs.write_selection(trainer, event, at_epoch_end=self._source.schedule.by_epoch)

    # End ------------------------------------------------------------------------------------------------------------

    def finish(self, on_error: OnError | None = None) -> None:
        """Stop the clock of training, and write the outputs of its end."""
        self._source.budget.stop()
        self._outputs.finish(self._source.history, self._source.errors, on_error)

    def sum_up(self, trainer: pl.Trainer) -> None:
        """Say where the results are, with `verbose` below a table of all records; once in a fit."""
        if not self._is_to_sum_up:
            return
        self._is_to_sum_up = False
        with self._source.errors.guard("cannot say where the results are", "warn"):
            closing.sum_up(trainer, self._source, self._outputs.folder)

    def release(self) -> None:
        """Release samples and loggers."""
        self._monitor.detach()
        self._recorder.release()
        self._outputs.close()
