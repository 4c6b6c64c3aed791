"""`HessianSpectrumCallback`: its options, and the hooks that run its analyses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.spectra.findings import findings
from lightning_hesd.spectra.validation import check_count
from lightning_hesd.training.analyzer import TrainerAnalyzer
from lightning_hesd.training.checkpoints.placement import as_checkpoints
from lightning_hesd.training.compat.namespaces import join_namespaces
from lightning_hesd.training.gradient_monitor import GradientMonitor
from lightning_hesd.training.recorder import Recorder, decomposition_options
from lightning_hesd.training.run import AnalysisRun
from lightning_hesd.training.run_facts import changed_settings, plain
from lightning_hesd.training.samples.loaders import check_loader
from lightning_hesd.training.samples.run_samples import RunSamples
from lightning_hesd.training.schedule import Schedule
from lightning_hesd.training.source import SpectrumSource

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.spectra.findings import Finding
    from lightning_hesd.spectra.rules import RuleName
    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.checkpoints.checkpoint import HessianCheckpoint
    from lightning_hesd.training.error_policy import OnError
    from lightning_hesd.training.loss_mode import AnalysisMode
    from lightning_hesd.training.recorder import Preconditioning

DEFAULT_NUM_SAMPLES = 512
"""Samples of an analysis unless the user says otherwise."""


class HessianSpectrumCallback(SpectrumSource):
    """Analyzes the Hessian spectrum while a LightningModule trains, and logs it.

    After the last optimizer step of the chosen epochs, before checkpoints are written, the callback estimates the
    spectral density of the Hessian of the training loss on a fixed subset of the training samples. It logs `hesd/c_t`
    with its interval, `hesd/lambda_max` and other scalars through the module, sends density histograms and figures to
    the loggers that can show them, and saves every spectrum in the log directory. Training is bit-identical with and
    without the callback.

    Args:
        every_n_epochs: Analyze after n, 2n, ... epochs, as ModelCheckpoint counts.
        epochs: Analyze after these epochs instead; 0-based, as `trainer.current_epoch`.
        every_n_train_steps: Analyze after n, 2n, ... optimizer steps instead.
        at_start: Also analyze the random initialization, before the first step. Its record has epoch -1.
        num_samples: Number of training samples to analyze. "auto" begins with 256, and adds samples (up to 16,384) as
            long as the sampling error of C_t exceeds `tolerance`, which must then be a number.
        batch_size: Most samples per batch of the analysis. "auto": batches of the training dataloader, merged to larger
            ones where that leaves the loss the same (see `AnalysisOptions`); None: those batches as they are. The
            batches of a custom batch sampler are cut to a number at most.
        dataloader: Take the samples from this dataloader instead of the training dataloader.
        generalization_dataloader: Also analyze samples of this dataloader, which training does not see, and assess
            generalization by comparing the two spectra (`assess_generalization`). "val" takes the validation data. Its
            metrics begin with `hesd_gen/`. The criterion ΔK_H05 needs fixed steps: leave `tolerance` out.
        loss_fn: Function `loss_fn(module, batch)` that returns the mean loss; default: the module's `training_step`,
            with logging silenced.
        mode: Mode of the module in which the loss is analyzed. "eval": evaluation mode, as set by the module's own
            `on_validation_model_eval`. "deterministic": training mode without dropout and without batch statistics.
            "train": training mode. "keep": each submodule's present mode. "auto" compares loss and gradient in the
            first two before the first analysis of a run. It takes "eval" where they agree, as for most modules.
            Otherwise, and where there is no loss in evaluation mode, it takes "deterministic" unless that is random
            still. It reports a difference once.
        layers: Also analyze layers one by one, as `layer_spectra` does: "auto" for every block; names, patterns or
            classes of modules; or a function. Their metrics begin with `hesd_layer/`.
        decompose: Also analyze the two terms of the Hessian (Kiselev & Grabovoy 2024, section 3.4): the Gauss-Newton
            matrix, which makes the outliers, and the residual, which makes the bulk. Needs `output_fn` and
            `output_loss` of `hessian_spectrum`. Their metrics begin with `hesd_ggn/` and `hesd_residual/`.
        checkpoint: Rule that picks the best checkpoint, such as "highest_c_t" (`RULES` has all), or a
            HessianCheckpoint; several in a list; None: no checkpoint is picked.
        monitor_gradients: On some steps of every epoch, compare the gradients of the loss with the gradients that reach
            the optimizer and with its steps: `hesd/clipped_share`, `hesd/clip_factor`, `hesd/gradient_cosine`,
            `hesd/update_cosine`. They explain why a spectrum is MN.
        max_overhead: Largest time of all analyses over the training time, such as 0.05; scheduled analyses that would
            exceed it are skipped. Training time is the wall time of the fit without analyses. The first analysis always
            runs, and so does that of `at_start`; each later one is expected to take as long as the one before. None: no
            analysis is skipped.
        preconditioner: "optimizer": also analyze the preconditioned Hessian D^(-1/2) H D^(-1/2), with the diagonal D by
            which the optimizer divides gradients (SGD, Adam, AdamW, RMSprop, Adagrad, AdaHessian). Its metrics begin
            with `hesd_pre/`; `hesd/stability_ratio` is its largest eigenvalue divided by the one at which steps become
            unstable. Or your own diagonals, as for `hessian_spectrum`.
        on_error: When an analysis fails, or the Trainer or module cannot be analyzed: "warn" records the reason and
            training goes on; "raise" raises the exception.
        progress: Show C_t in the progress bar, and a second bar for the steps of long analyses.
        verbose: Print a line after each analysis, and a table of all with the picks of the rules at the end of `fit`,
            also of an interrupted one.
        name: Prefix of metrics and state, and name of the folder of spectra. Two callbacks in one Trainer need two.
        **analysis: Options of `hessian_spectrum`, see `AnalysisOptions`: steps, probes, seed, tolerance, ...

    Libraries may train with deep copies of this callback. Each copy has a history of its own; the original shows the
    records and picks of the copy that analyzed last (`history`, `checkpoint.best_model_path`, ...), until it trains
    itself. A pickled callback has the options, the history and the picks, but no samples and no loggers. It lacks
    functions that cannot be pickled, such as a lambda, and dataloaders and other arguments of more than 64 KiB. To
    train with it reports the missing argument.

    Attributes:
        history: The records so far, one per analysis: `.epoch`, `.global_step`, `.spectrum`, `.error`, ...
        checkpoints: The checkpoint callbacks that `checkpoint` asks for.
        findings: Observations in the records, and about the cost, that deserve attention, see `Finding`.

    Raises:
        ValueError: If an argument is out of range or not available in this version.
        TypeError: If a keyword is not an option of `hessian_spectrum`, or `checkpoint` has the wrong type.
        MisconfigurationException: If `checkpoint` is not the name of a rule.

    Examples:
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
        batch_size: int | Literal["auto"] | None = "auto",
        # Of DataLoader[Any], LightningCLI would find subclasses, but not the arguments they take.
        dataloader: DataLoader | Iterable[Any] | None = None,  # type: ignore[type-arg]
        generalization_dataloader: DataLoader | Iterable[Any] | Literal["val"] | None = None,  # type: ignore[type-arg]
        loss_fn: LossFunction | None = None,
        mode: AnalysisMode = "auto",
        layers: Layers | None = None,
        decompose: bool = False,
        checkpoint: RuleName | HessianCheckpoint | Sequence[RuleName | HessianCheckpoint] | None = None,
        monitor_gradients: bool = False,
        max_overhead: float | None = None,
        preconditioner: Preconditioning = None,
        on_error: OnError = "warn",
        progress: bool = True,
        verbose: bool = False,
        name: str = "hesd",
        **analysis: Any,
    ) -> None:
        check_count("num_samples", num_samples, alternative="auto")
        check_loader("dataloader", dataloader)
        check_loader("generalization_dataloader", generalization_dataloader, alternative="val")
        super().__init__(name, on_error, Schedule(every_n_epochs, epochs, every_n_train_steps, max_overhead))
        self.at_start = at_start
        self.loss_fn = loss_fn
        self.checkpoints: list[HessianCheckpoint] = as_checkpoints(checkpoint)
        self.verbose = verbose
        decomposition = decomposition_options(analysis) if decompose else None
        mode_of_modules = mode if mode in {"train", "keep"} else "eval"
        self.options = analysis_options(**analysis, batch_size=batch_size, mode=mode_of_modules)
        if num_samples == "auto" and not isinstance(self.options.tolerance, float):
            msg = (
                "`num_samples='auto'` needs a number for `tolerance`, the relative accuracy of C_t to aim at, got "
                f"{self.options.tolerance!r}."
            )
            raise ValueError(msg)
        if preconditioner != "optimizer":
            analysis_options(**analysis, preconditioner=preconditioner)  # checks it
        others = {"num_samples": num_samples, "loss_fn": loss_fn, "layers": layers, "preconditioner": preconditioner}
        self.given = changed_settings(self.schedule, self.options)
        self.given.update((key, plain(value)) for key, value in others.items() if value is not None)
        samples = partial(RunSamples, num_samples, self.options, in_training=True)
        loaders = [dataloader] if generalization_dataloader is None else [dataloader, generalization_dataloader]
        analyzers = [
            TrainerAnalyzer(self.options, samples(dataloader=loader), loss_fn=loss_fn, mode=mode) for loader in loaders
        ]
        self._recorder = Recorder(
            *analyzers, preconditioner=preconditioner, layers=layers, decomposition=decomposition,
            name=name, progress=progress,
        )  # fmt: skip
        self._monitor = GradientMonitor(enabled=monitor_gradients)
        self._run = AnalysisRun(self, self._recorder, self._monitor, progress=progress)
        for each in self.checkpoints:
            each.source = self  # whose records it ranks

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, the history and the picks, without samples, loggers and weights."""
        return {**super().__getstate__(), "loss_fn": Portable("loss_fn", self.loss_fn)}

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    @property
    def checkpoint(self) -> HessianCheckpoint | None:
        """The first of the checkpoint callbacks; None if there is none."""
        return self.checkpoints[0] if self.checkpoints else None

    @property
    def findings(self) -> list[Finding]:
        """Observations in the records, and about the cost, that deserve attention, the most important first."""
        return findings(self.history, overhead=self.budget.overhead)

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer and the module, and put the checkpoint callback in place."""
        join_namespaces()
        self._run.set_up(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the samples, and analyze the initialization if asked for."""
        if not self._run.is_set_up(trainer):
            self.setup(trainer, pl_module, "fit")
        self._run.begin(trainer)
        self._run.analyze_start(trainer, pl_module)
        if self.refusal is None:
            self.budget.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Complete the last record, and begin the gradient statistics of this epoch."""
        self._run.complete_record(trainer)
        self._monitor.restart()

    def on_train_batch_start(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Complete the last record, whose weights are about to change."""
        self._run.begin_batch(trainer)

    def on_after_backward(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Keep the gradients as the backward pass left them."""
        self._monitor.after_backward(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_args: Any) -> None:
        """Analyze after this optimizer step if it is scheduled."""
        self._recorder.mode.report(trainer, outputs)
        for batches in self._recorder.first_batches:
            batches.after_step()
        if self._run.is_due(trainer, at_epoch_end=False):
            self._run.analyze(trainer, pl_module, trainer.current_epoch)

    def on_validation_start(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Note which metrics are older than this validation."""
        self._run.begin_validation(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Analyze after this epoch if it is scheduled."""
        self._run.log_gradients(trainer, pl_module)
        for batches in self._recorder.first_batches:
            batches.after_epoch()
        if self._run.is_due(trainer, at_epoch_end=True):
            self._run.analyze(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Complete the last record, and write the outputs of the end of training."""
        self._run.complete_record(trainer)
        self._run.finish()

    def on_fit_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Print the table of records."""
        self._run.sum_up(trainer)

    def on_exception(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Write the outputs and print the table of an interrupted run."""
        self._run.finish("warn")  # another exception would replace the first
        self._run.sum_up(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Release samples and loggers."""
        if stage == "fit":
            with self.errors.guard("cannot bring the history to the process that started the fit"):
                self.send_results(trainer)
            self.show_in_original()
        self._run.release()

    def record_selection(self, trainer: pl.Trainer, event: SelectionEvent) -> None:
        """Log the decision of a HessianCheckpoint after the latest record."""
        self._run.write_selection(trainer, event)

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the samples and the budget, as tensors and plain values."""
        if self._run.shares_name:
            return {}  # or it would replace the other callback's state
        return {
            "history": self.history.state_dict(),
            "samples": self._recorder.state_dict(),
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history, the samples and the budget of the run that is resumed.

        Raises:
            ValueError: If a field is missing or damaged.
        """
        self._run.resume(state_dict)
