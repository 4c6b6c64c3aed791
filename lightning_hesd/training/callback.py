"""`HessianSpectrumCallback`: the hooks that run an analysis, and nothing of the analysis itself."""

from __future__ import annotations

import contextlib
import copy
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.portable import Portable, deep_copied
from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.spectra.checks import check_count
from lightning_hesd.spectra.summary import Kept, analysis_lines, summarize
from lightning_hesd.spectra.validation import check_fields, of, one_line
from lightning_hesd.training import terminal
from lightning_hesd.training.analyzer import TrainerAnalyzer
from lightning_hesd.training.budget import Budget
from lightning_hesd.training.checkpoints.checkpoint import HessianCheckpoint
from lightning_hesd.training.checkpoints.placement import (
    insert_checkpoint,
    order_checkpoints,
    warn_about_stale_monitors,
)
from lightning_hesd.training.checkpoints.weights import AnalysedWeights
from lightning_hesd.training.compat import internals, launched
from lightning_hesd.training.compat.namespaces import MisconfigurationException, join_namespaces
from lightning_hesd.training.gradient_monitor import GradientMonitor
from lightning_hesd.training.history import START_EPOCH, SpectrumHistory, SpectrumRecord, SpectrumSource, when
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError
from lightning_hesd.training.loss import check_loss_source
from lightning_hesd.training.outputs import RunOutputs
from lightning_hesd.training.recorder import Recorder
from lightning_hesd.training.remarks import Remarks
from lightning_hesd.training.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.gradient_monitor import GradientStatistics
    from lightning_hesd.training.history import OnError
    from lightning_hesd.training.loss_mode import AnalysisMode
    from lightning_hesd.training.recorder import Preconditioning

DEFAULT_NUM_SAMPLES = 512
"""Samples of an analysis unless the user says otherwise."""

FAULTS_OF_THE_LOSS = (DisturbedTrainingError, WrongDerivativeError)
"""Failures that every later analysis of the same loss will most likely repeat, so that a run warns once of each."""


class HessianSpectrumCallback(SpectrumSource):
    """Analyses the Hessian's spectrum while a LightningModule trains, and logs what it finds.

    After the last optimizer step of the chosen epochs, before checkpoints are written, it estimates the spectral
    density of the Hessian of the training loss on a fixed subset of the training samples. It logs `hesd/c_t` with its
    interval, `hesd/lambda_max` and other scalars through the module, density histograms and figures to loggers that
    can show them, and writes every spectrum to the log directory. Training is bit-identical with and without it.

    Args:
        every_n_epochs: After n, 2n, ... epochs, as ModelCheckpoint counts.
        epochs: After just these epochs instead, 0-based as `trainer.current_epoch`.
        every_n_train_steps: After n, 2n, ... optimizer steps instead.
        at_start: Also before the first step: the random initialisation; its record has epoch -1.
        num_samples: Size of the subset; "auto": 256, and more (up to 16,384) whenever the sampling error of C_t exceeds
            `tolerance`, a number that must be given then.
        batch_size: Samples per batch of the analysis; default: the training dataloader's. Batches of a batch sampler of
            your own are cut to this size at most.
        dataloader: Draw the samples from this dataloader instead of the training dataloader.
        generalization_dataloader: Also analyse samples from this dataloader, of data that training does not see, and
            assess generalization by comparison (`assess_generalization`); its ΔK_H05 needs fixed steps, hence no
            `tolerance`. "val": the validation data. The metrics of this spectrum begin with `hesd_gen/`.
        loss_fn: `loss_fn(module, batch)` -> mean loss; default: the module's `training_step`, its logging muted.
        mode: Mode of the module in which the loss is analysed. "eval": evaluation mode, as the module's own
            `on_validation_model_eval` sets it. "deterministic": training mode without dropout and without statistics of
            the batch. "train": training mode. "keep": the mode each module is in. "auto" compares loss and gradient in
            the first two at the first analysis of a run: where they agree, as for most modules, it takes "eval"; where
            they do not, or there is no loss in evaluation mode, "deterministic", unless that is random still. It says
            once where they differ.
        layers: Also analyse layers by themselves, as `layer_spectra` does: "auto" for every functional block, names,
            patterns or classes of modules, or a function. Their metrics begin with `hesd/layer/`.
        decompose: Also analyse the two parts of the Hessian, the Gauss-Newton matrix, from which the outliers come, and
            the residual, from which the bulk does (Kiselev & Grabovoy 2024, section 3.4); needs `output_fn` and
            `output_loss` of `hessian_spectrum`. Their metrics begin with `hesd_ggn/` and `hesd_residual/`.
        checkpoint: Rule that picks the best checkpoint, "highest_c_t" or "lowest_max_eigenvalue", or a
            HessianCheckpoint; None: no picking.
        monitor_gradients: Compare, on some steps of every epoch, the gradients of the loss with those that reach the
            optimizer and with the steps it takes: `hesd/clipped_share`, `hesd/clip_factor`, `hesd/gradient_cosine`,
            `hesd/update_cosine`. They tell why a spectrum is MN.
        max_overhead: Skip scheduled analyses so that all of them take at most this share of the training time, such as
            0.05; training time is the wall time of the fit without analyses. The first one always runs, because its
            duration is not known before, and so does that of `at_start`; the others only if they fit, each expected
            to take as long as the one before. None: analyse whenever scheduled.
        preconditioner: "optimizer": also analyse the Hessian in the coordinates of the optimizers, D^(-1/2) H D^(-1/2)
            with the diagonal D by which they divide the gradients (SGD, Adam, AdamW, RMSprop, Adagrad, AdaHessian). The
            metrics of this spectrum begin with `hesd_pre/`, and `hesd/stability_ratio` is its largest eigenvalue over
            the one at which steps become unstable. Or diagonals of your own, as for `hessian_spectrum`.
        on_error: What to do when an analysis fails, or the Trainer or the module cannot be analysed: "warn" (record the
            reason, go on training) or "raise".
        progress: Show C_t in the progress bar, and a bar of their own for the steps of long analyses.
        verbose: Print a line after each analysis, and at the end of `fit`, also an interrupted one, a table of them
            with what the rules pick.
        name: Prefix of metrics and state, and name of the folder of spectra; two callbacks in one Trainer need two.
        **analysis: Options of `hessian_spectrum`, which `AnalysisOptions` explains: steps, probes, seed, tolerance, ...

    A library may train with a deep copy of this callback. Each copy begins a history of its own when it trains;
    the callback that it was copied from shows the same records and picks (`history`, `checkpoint.best_model_path`, ...)
    in the same process: those of the copy that analysed last, whole, until it trains itself. A pickled callback has
    the options, the history and the picks, and no samples or loggers. Functions that cannot be pickled, such as a
    lambda, and dataloaders and other arguments of more than 64 KiB are left out of it; training with such a copy
    reports which one is missing.

    Attributes:
        history: The records so far, one for each analysis: `.epoch`, `.global_step`, `.spectrum`, `.error`, ...

    Raises:
        ValueError: If an argument is out of range or not available in this version.
        TypeError: If a keyword is not an option of `hessian_spectrum`, or `checkpoint` is something else.
        MisconfigurationException: If `checkpoint` is not the name of a rule.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(
        ...     callbacks=[HessianSpectrumCallback(every_n_epochs=5, checkpoint="highest_c_t")], logger=False
        ... )
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        *,
        epochs: Collection[int] | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool = False,
        num_samples: int | Literal["auto"] = DEFAULT_NUM_SAMPLES,
        batch_size: int | None = None,
        # Of DataLoader[Any], LightningCLI would find subclasses, but not the arguments they take.
        dataloader: DataLoader | Iterable[Any] | None = None,  # type: ignore[type-arg]
        generalization_dataloader: DataLoader | Iterable[Any] | Literal["val"] | None = None,  # type: ignore[type-arg]
        loss_fn: LossFunction | None = None,
        mode: AnalysisMode = "auto",
        layers: Layers | None = None,
        decompose: bool = False,
        checkpoint: Literal["highest_c_t", "lowest_max_eigenvalue"] | HessianCheckpoint | None = None,
        monitor_gradients: bool = False,
        max_overhead: float | None = None,
        preconditioner: Preconditioning = None,
        on_error: OnError = "warn",
        progress: bool = True,
        verbose: bool = False,
        name: str = "hesd",
        **analysis: Any,
    ) -> None:
        super().__init__()
        check_count("num_samples", num_samples, alternative="auto")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if on_error not in {"warn", "raise"}:
            msg = f"`on_error` must be 'warn' or 'raise', got {on_error!r}."
            raise ValueError(msg)
        for key, loader, offered in (
            ("dataloader", dataloader, ""),
            ("generalization_dataloader", generalization_dataloader, " or 'val'"),
        ):
            if isinstance(loader, str) and not (offered and loader == "val"):
                msg = f"`{key}` must be a dataloader{offered}, got {loader!r}."
                raise ValueError(msg)
        if not name or "/" in name or name in {".", ".."}:
            msg = f"`name` must be a non-empty text without '/', got {name!r}."
            raise ValueError(msg)
        self.schedule = Schedule(every_n_epochs, epochs, every_n_train_steps, max_overhead)
        self.at_start = at_start
        self.loss_fn = loss_fn
        self.checkpoint: HessianCheckpoint | None = _as_checkpoint(checkpoint)
        self.on_error: OnError = on_error
        self.verbose = verbose
        self.name = name
        self.history = SpectrumHistory()
        self._stage = "fit"
        self._set_up_by: str | None = None
        self._trained_by: str | None = None
        self._is_restored = False
        self._shares_name = False
        self._reported_faults: set[type[Exception]] = set()
        self.budget = Budget(max_overhead)
        decomposition = _options_of_the_parts(analysis) if decompose else None
        self.options = analysis_options(**analysis, mode=mode if mode in {"train", "keep"} else "eval")
        if num_samples == "auto" and not isinstance(self.options.tolerance, float):
            msg = (
                "`num_samples='auto'` needs a number for `tolerance`, the relative accuracy of C_t to aim at, got "
                f"{self.options.tolerance!r}."
            )
            raise ValueError(msg)
        if preconditioner != "optimizer":
            analysis_options(**analysis, preconditioner=preconditioner)  # checks it
        analyzer = partial(
            TrainerAnalyzer,
            self.options,
            num_samples=num_samples,
            batch_size=batch_size,
            loss_fn=loss_fn,
            mode=mode,
            keeps=True,
        )
        self._recorder = Recorder(
            analyzer(dataloader=dataloader),
            None if generalization_dataloader is None else analyzer(dataloader=generalization_dataloader),
            preconditioner=preconditioner,
            layers=layers,
            decomposition=decomposition,
            name=name,
            progress=progress,
        )
        self._monitor = GradientMonitor() if monitor_gradients else None
        self._remarks = Remarks(name)
        self._outputs = RunOutputs(name, in_progress_bar=progress)
        self._summary_is_due = False
        self._address = launched.address_of(self)
        self._original: HessianSpectrumCallback | None = None
        if self.checkpoint is not None:
            self.checkpoint.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, the history and the picks, without samples, loggers and weights."""
        return {**vars(self), "loss_fn": Portable("loss_fn", self.loss_fn), "_original": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy."""
        vars(self).update(state)
        self._address = launched.address_of_copy(self, self._address)

    def __deepcopy__(self, memo: dict[int, Any]) -> HessianSpectrumCallback:
        """Return a copy whose records are shown by this callback, too, as described for the class."""
        made: HessianSpectrumCallback = deep_copied(self, memo)
        made._original = self
        return made

    def __copy__(self) -> HessianSpectrumCallback:
        """Return a deep copy: two runs cannot share a history."""
        return copy.deepcopy(self)

    def _show(self) -> None:
        """Let the callback that this one was copied from have the records, too."""
        if self._original is not None:
            self._original.history[:] = self.history
            self._original.budget.load_state_dict(self.budget.state_dict())
            self._original._show()  # noqa: SLF001 - of this class

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked before training, and put the checkpoint callback in place.

        Where there can be no spectra, a warning says why, and records have that reason as their error.

        Raises:
            MisconfigurationException: If the Trainer or the module cannot be used, and that is to be raised.
        """
        join_namespaces()
        self._stage = stage
        if stage == "fit":
            self._set_up_by = internals.name_of(trainer)
            self._reported_faults.clear()
            self._shares_name = any(callback.name == self.name for callback in _before(self, trainer))
            rule = self.checkpoint is not None and not self._shares_name
            with self._survived(
                "there will be no spectra" + (", and the final weights take the place of the pick" if rule else "")
            ) as failures:
                self._check_name()
                check_loss_source(pl_module, self.loss_fn)
                internals.check_strategy(trainer)
            self.refusal = failures[0] if failures else None
        with self._survived("there will be no pick"):
            if self.checkpoint is not None and not self._shares_name:
                insert_checkpoint(trainer, pl_module, stage, self.checkpoint, self.on_error)
        order_checkpoints(trainer)

    def _check_name(self) -> None:
        """Refuse to write to the metrics, files and state of another callback.

        Raises:
            MisconfigurationException: If there is one of the same name.
        """
        if self._shares_name:
            msg = (
                f"the Trainer has another HessianSpectrumCallback(name={self.name!r}), whose metrics, files and state "
                "this one would overwrite: pass another `name`."
            )
            raise MisconfigurationException(msg)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the samples, and analyse the initialisation if asked to."""
        if self._set_up_by != internals.name_of(trainer):  # added after the Trainer had set up its callbacks
            self.setup(trainer, pl_module, "fit")
        with self._survived("cannot tell which metrics other callbacks monitor"):
            warn_about_stale_monitors(trainer, self.name, sparse=self.schedule.is_sparse)
        # In another Trainer than before another run begins; one that is resumed has brought its records.
        goes_on = self._is_restored or self._trained_by == internals.name_of(trainer)
        self._is_restored, self._trained_by = False, internals.name_of(trainer)
        self.history.rewind(trainer.global_step if goes_on else 0)
        if trainer.global_step == 0:
            self.budget.reset()
        self._show()
        self._summary_is_due = self.verbose and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.refusal is not None:
            if self.at_start and trainer.global_step == 0:
                self._refuse(trainer, START_EPOCH)
            return
        with self._survived("cannot write to the loggers"):
            self._outputs.open(trainer, self.history, [callback.name for callback in _hessian_callbacks(trainer)])
        self._recorder.start(trainer, self._survived)
        self._remarks.restart()
        if self._monitor is not None:
            with self._survived("the gradients will not be looked at"):
                internals.check_whole(trainer, "monitor_gradients")
                self._monitor.attach(trainer, self._survived)
        # Now rather than at the first analysis, because now the dataset is as it will be when the run is resumed.
        with self._survived("cannot draw the analysis samples, will try again"):
            self._recorder.draw(trainer)
            if self.verbose:
                loss = "`training_step`" if self.loss_fn is None else "`loss_fn`"
                terminal.say(trainer, f"{self.name}: the mean loss of {loss} over {self._recorder.samples} is analysed")
        if self.at_start and trainer.global_step == 0:
            if self._recorder.waits():
                internals.warn(
                    "the analysis before the first step (`at_start`) is left out: no samples can be drawn from this "
                    "training dataloader without taking them away from training, so that its first batches are kept "
                    "as samples. Pass `dataloader=` to HessianSpectrumCallback, a loader or a list of batches."
                )
            else:
                self._analyze(trainer, pl_module, START_EPOCH)
        self.budget.start()

    def on_train_epoch_start(self, *_args: Any) -> None:
        """Look at the gradients of this epoch."""
        if self._monitor is not None:
            self._monitor.restart()

    def on_after_backward(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Keep the gradients as the backward pass left them."""
        if self._monitor is not None:
            self._monitor.after_backward(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_args: Any) -> None:
        """Analyse after this optimizer step if it is scheduled."""
        self._recorder.mode.report(trainer, outputs)
        self._recorder.after_batch()
        step = trainer.global_step
        is_new = not self.history or self.history[-1].global_step != step  # not every batch ends with a step
        if is_new and self.schedule.includes_step(step) and self._is_affordable(trainer):
            self._analyze(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Analyse after this epoch if it is scheduled."""
        with self._survived("cannot log what happened to the gradients"):
            self._outputs.log_gradients(trainer, pl_module, self._gradients)
        self._recorder.after_epoch()
        if self.schedule.includes_epoch(trainer.current_epoch) and self._is_affordable(trainer):
            self._analyze(trainer, pl_module, trainer.current_epoch)

    @property
    def _gradients(self) -> GradientStatistics | None:
        return None if self._monitor is None else self._monitor.summary()

    def on_train_end(self, *_args: Any) -> None:
        """Stop the clock of training, and write what is left to write."""
        self.budget.stop()
        self._finish(self.on_error)

    def on_fit_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Sum up."""
        self._sum_up(trainer)

    def on_exception(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Stop the clock of training: what comes until the Trainer is used again is none. Write and sum up what is."""
        self.budget.stop()
        self._finish("warn")  # another exception would take the place of the first
        self._sum_up(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Let go of samples and loggers."""
        if stage == "fit":
            with self._survived("cannot bring the history to the process that started the fit"):
                launched.send(trainer, self._address, self.state_dict())
            self._show()
        if self._monitor is not None:
            self._monitor.detach()
        self._recorder.release()
        self._outputs.close()

    def _is_affordable(self, trainer: pl.Trainer) -> bool:
        """Return whether `max_overhead` allows an analysis now.

        Process zero decides for all: their clocks differ, and those that analyse would wait for those that do not.
        """
        if self.schedule.max_overhead is None:
            return True
        step = trainer.global_step
        affordable = trainer.strategy.broadcast(self.budget.allows(step))
        self.budget.decide(step, analyze=affordable)
        return affordable

    def _analyze(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Analyse the present weights, keep and publish the result, and know what it all took."""
        if self.refusal is not None:
            self._refuse(trainer, epoch)
            return
        at_epoch_end = epoch != START_EPOCH and self.schedule.every_n_train_steps is None
        internals.wait_for_device(trainer)
        with contextlib.ExitStack() as watch:
            watch.enter_context(internals.sigterm_waits(trainer))
            for callback in _hessian_callbacks(trainer):  # to none of them is this training
                watch.enter_context(callback.budget.analysis() if callback is self else callback.budget.paused())
            self.history.append(self._recorder.record(trainer, pl_module, epoch, self._survived))
            self._show()
            with self._survived("cannot copy the analysed weights: checkpoints will have what others make of them"):
                self._keep_weights(trainer, pl_module)
            for output in self._outputs.writers(trainer, self.history, at_epoch_end=at_epoch_end):
                with self._survived(f"cannot write the spectrum {when(epoch)}"):
                    output()
        with self._survived("cannot remark on the spectra"):
            self._remarks.remark(trainer, self.history, self._gradients, monitored=self._monitor is not None)
        overhead = trainer.strategy.broadcast(self.budget.overhead)
        with self._survived(f"cannot log the scalars {when(epoch)}"):
            self._outputs.log(trainer, pl_module, self.history[-1], overhead, at_epoch_end=at_epoch_end)
        if self.verbose:
            by_step = self.schedule.every_n_train_steps is not None
            with self._survived("cannot print what was found"):
                first = [f"{self.name}: {words}" for words in self._recorder.mode.news()]
                terminal.say(trainer, *first, *analysis_lines(self.history[-1], self.name, by_step=by_step))

    def _refuse(self, trainer: pl.Trainer, epoch: int) -> None:
        """Record why there is no spectrum; a warning has said so before training, and there is nothing to publish."""
        self.history.append(SpectrumRecord(epoch, trainer.global_step, None, self.refusal))

    def _sum_up(self, trainer: pl.Trainer) -> None:
        """Print the table of all analyses, once in a fit and if asked for."""
        if not self._summary_is_due:
            return
        self._summary_is_due = False
        checkpoints = self._checkpoints(trainer)
        summary = partial(
            summarize,
            self.history,
            self.name,
            seconds=self.budget.analysis_seconds,
            overhead=self.budget.overhead,
            kept={c.rule_name: Kept(c.best, c.qualified_steps) for c in checkpoints if c.best is not None},
            folder=self._outputs.folder,
        )
        terminal.show(trainer, summary)

    def _checkpoints(self, trainer: pl.Trainer) -> list[HessianCheckpoint]:
        """Return the checkpoint callbacks that rank these records."""
        return [c for c in trainer.checkpoint_callbacks if isinstance(c, HessianCheckpoint) and c.source is self]

    def _keep_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the checkpoint callbacks have what was analysed: others may change it before they save."""
        if checkpoints := self._checkpoints(trainer):
            weights = AnalysedWeights(pl_module)
            for checkpoint in checkpoints:
                checkpoint.keep_weights(weights)

    def _finish(self, on_error: OnError) -> None:
        for output in self._outputs.finishers(self.history):
            with self._survived("cannot write the spectra at the end of training", on_error):
                output()

    def record_selection(self, trainer: pl.Trainer, choice: SelectionEvent) -> None:
        """Write down what a HessianCheckpoint makes of the latest record."""
        with self._survived("cannot write what the checkpoint rule chose"):
            self._outputs.write_selection(trainer, choice, at_epoch_end=self.schedule.every_n_train_steps is None)

    def receive(self, state: dict[str, Any]) -> None:
        """Take over the history of the processes that have trained, where they end with the fit."""
        self.history.load_state_dict(state["history"])
        self.budget.load_state_dict(state["budget"])
        self._show()

    @contextlib.contextmanager
    def _survived(self, consequence: str, on_error: OnError | None = None) -> Iterator[list[str]]:
        """Turn an exception into a warning and an entry of a list, unless exceptions are to be raised.

        Args:
            consequence: What it means.
            on_error: What to do; default: what the user says.

        Yields:
            The list.
        """
        failures: list[str] = []
        try:
            yield failures
        except Exception as error:
            if (on_error or self.on_error) == "raise":
                raise
            failures.append(f"{type(error).__name__}: {error}")
            message = f"{consequence}. {failures[-1]}"
            if isinstance(error, FAULTS_OF_THE_LOSS) and type(error) in self._reported_faults:
                internals.inform(message)
            else:
                self._reported_faults.add(type(error))
                internals.warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the samples and the budget, as tensors and plain values."""
        if self._shares_name:
            return {}  # or it would take the place of the other callback's
        return {
            "history": self.history.state_dict(),
            "samples": self._recorder.state_dict(),
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history, the samples and the budget of the run that is resumed.

        Testing a checkpoint loads this too, though nothing is resumed; it must not undo what came after it.

        Raises:
            ValueError: If it is something else, or is damaged.
        """
        if self._stage != "fit" or self._shares_name:
            return
        try:
            check_fields(state_dict, _STATE, "the state")
            self.history.load_state_dict(state_dict["history"])
            self._recorder.load_state_dict(state_dict["samples"])
            self.budget.load_state_dict(state_dict["budget"])
            self._is_restored = True
        except ValueError as error:
            msg = (
                f"the state of HessianSpectrumCallback(name={self.name!r}) in the checkpoint is damaged, or of another "
                f"version ({one_line(error)}): resume with another `name`, which starts a new history."
            )
            raise ValueError(msg) from error


_STATE = {"history": of(dict), "samples": of(dict), "budget": of(dict)}


def _hessian_callbacks(trainer: pl.Trainer) -> list[HessianSpectrumCallback]:
    return [c for c in internals.callbacks_of(trainer) if isinstance(c, HessianSpectrumCallback)]


def _before(callback: HessianSpectrumCallback, trainer: pl.Trainer) -> list[HessianSpectrumCallback]:
    """Return those that come before a callback; all if it is not among them."""
    return list(itertools.takewhile(lambda other: other is not callback, _hessian_callbacks(trainer)))


def _as_checkpoint(checkpoint: object) -> HessianCheckpoint | None:
    if isinstance(checkpoint, str):
        return HessianCheckpoint(checkpoint)  # type: ignore[arg-type]  # which checks the name
    if checkpoint is None or isinstance(checkpoint, HessianCheckpoint):
        return checkpoint
    msg = f"`checkpoint` must be the name of a rule, a HessianCheckpoint or None, got {checkpoint!r}."
    raise TypeError(msg)


def _options_of_the_parts(analysis: dict[str, Any]) -> dict[str, Any]:
    """Take the options for the parts of the Hessian out of those for all of it, checked.

    Raises:
        ValueError: If one is missing.
    """
    if analysis.get("matrix", "hessian") != "hessian":
        msg = f"`decompose=True` is about the parts of the Hessian: leave `matrix` out, got {analysis['matrix']!r}."
        raise ValueError(msg)
    if analysis.get("strategy") == "finite_difference":
        msg = "`decompose=True` needs exact products: use another `strategy` than 'finite_difference'."
        raise ValueError(msg)
    parts = {name: analysis.pop(name, None) for name in ("output_fn", "output_loss")}
    analysis_options(matrix="ggn", **parts)
    return parts
