"""`SharpnessMonitor`: λ_max and the stability ratio, tracked between full analyses, and an alarm before instability."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_hesd.numerics.analysis.tracking import SEARCH_PRODUCTS, TRACKING_PRODUCTS, SharpnessTracker
from lightning_hesd.numerics.devices import release_memory
from lightning_hesd.numerics.inputs.options import AnalysisOptions, analysis_options
from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.spectra.validation import check_count, check_fields, number, of
from lightning_hesd.training.analyzer import Analysis, TrainerAnalyzer
from lightning_hesd.training.callback_copies import CopiedCallback
from lightning_hesd.training.compat import logged_metrics, messages, signals, strategies
from lightning_hesd.training.compat.namespaces import MisconfigurationException, join_namespaces, of_every_namespace
from lightning_hesd.training.error_policy import ErrorPolicy
from lightning_hesd.training.loss import check_loss_source
from lightning_hesd.training.preconditioner import read_stability
from lightning_hesd.training.samples.loaders import check_loader
from lightning_hesd.training.samples.run_samples import RunSamples
from lightning_hesd.training.source import metric_names, sources_of, without_training_time
from lightning_hesd.training.tracked_record import TrackedRecord, gives_alarm, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.error_policy import OnError
    from lightning_hesd.training.loss_mode import AnalysisMode

GRADIENTS_PER_MEASUREMENT = 2 + 2 * (1 + TRACKING_PRODUCTS)
"""Most gradients of its samples that a measurement costs: a graph, a gradient, and two for each exact product."""

GRADIENTS_PER_SEARCH = 2 + 2 * (1 + SEARCH_PRODUCTS)
"""The same for a search: the first measurement of a run, also of a resumed one, and one after each full analysis."""

OPTIONS = ("seed", "batch_weight", "parameters", "strategy", "dtype", "memory_budget")
"""Options of `hessian_spectrum` that a measurement has, too."""


@of_every_namespace("Callback")
class SharpnessMonitor(CopiedCallback, Callback):
    """Tracks the sharpness while a LightningModule trains, and warns before the optimizer becomes unstable.

    After every n optimizer steps the monitor measures the largest eigenvalue of the Hessian of the training loss on a
    few fixed samples, and that of the preconditioned Hessian. It starts from the Ritz vectors of the last measurement,
    so that four Hessian-vector products are enough. One product more gives the batch sharpness gᵀHg/‖g‖² with the
    gradient g, which stabilizes at 2/lr under SGD (Andreyev & Beneventano 2024, arXiv:2412.20553). It logs
    `sharpness/tracked_lambda_max`, `sharpness/tracked_stability_ratio`, `sharpness/batch_sharpness` and
    `sharpness/headroom`. Training is bit-identical with and without the monitor.

    All values are *tracked*, not verified: a Rayleigh quotient is a lower bound of the largest eigenvalue, of these
    samples. After each analysis of a HessianSpectrumCallback in the same Trainer, the monitor searches anew, and logs
    `sharpness/calibration`: the λ_max of the analysis over the tracked one.

    A measurement costs at most 12 gradients of its samples (`GRADIENTS_PER_MEASUREMENT`), a search at most 44; half as
    many more where the graphs do not fit into memory. The first one also verifies the products.

    Args:
        every_n_train_steps: Measure after n, 2n, ... optimizer steps, and earlier after 1, 2, 4, 8, ... steps.
        num_samples: Number of training samples. The fewer, the larger is their λ_max.
        headroom: Warn, once in a run, when the optimizer's stability threshold is less than this multiple of the
            tracked value, twice in succession.
        batch_size: Most samples per batch; None: the batches of the training dataloader, as they are.
        dataloader: As for HessianSpectrumCallback.
        loss_fn: As for HessianSpectrumCallback.
        mode: As for HessianSpectrumCallback.
        on_error: When a measurement fails: "warn" (once in a run of each kind of failure), or "raise" the exception.
        name: Prefix of metrics and state. Two monitors in one Trainer need two.
        **analysis: `seed`, `batch_weight`, `parameters`, `strategy`, `dtype`, `memory_budget`: see `AnalysisOptions`.

    Attributes:
        history: The records so far, one per measurement.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If there is no such argument.

    Examples:
        >>> import lightning.pytorch as pl
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> stop = EarlyStopping(
        ...     "sharpness/headroom", mode="max", divergence_threshold=1.0, patience=10**9, strict=False
        ... )
        >>> trainer = pl.Trainer(callbacks=[SharpnessMonitor(every_n_train_steps=50), stop], logger=False)
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        *,
        num_samples: int = 128,
        headroom: float = 1.2,
        batch_size: int | None = None,
        # Of DataLoader[Any], LightningCLI would find subclasses, but not the arguments they take.
        dataloader: DataLoader | Iterable[Any] | None = None,  # type: ignore[type-arg]
        loss_fn: LossFunction | None = None,
        mode: AnalysisMode = "auto",
        on_error: OnError = "warn",
        name: str = "sharpness",
        **analysis: Any,
    ) -> None:
        check_count("every_n_train_steps", every_n_train_steps)
        check_count("num_samples", num_samples)
        check_count("batch_size", 1 if batch_size is None else batch_size)
        if not (number(headroom) and 0 < headroom < math.inf):
            msg = f"`headroom` must be a finite number above 0, got {headroom!r}."
            raise ValueError(msg)
        check_loader("dataloader", dataloader)
        join_namespaces()
        super().__init__()
        self.every_n_train_steps = every_n_train_steps
        self.headroom = headroom
        self.name = name
        self.loss_fn = loss_fn
        self.errors = ErrorPolicy(on_error)
        self.history: list[TrackedRecord] = []
        mode_of_modules = mode if mode in {"train", "keep"} else "eval"
        options = analysis_options(**analysis, batch_size=batch_size, mode=mode_of_modules)
        # LightningCLI passes all of them.
        if idle := [
            key for key, value in analysis.items() if key not in OPTIONS and value != vars(AnalysisOptions)[key]
        ]:
            msg = f"SharpnessMonitor has no option {idle[0]!r}: of an analysis, it has {', '.join(OPTIONS)}."
            raise TypeError(msg)
        samples = RunSamples(num_samples, options, dataloader=dataloader, in_training=True)
        self._analyzer = TrainerAnalyzer(options, samples, loss_fn=loss_fn, mode=mode)
        self._tracker = SharpnessTracker()
        self._is_refused = False
        self._calibrated_at: int | None = None
        self.begin_copies()

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and the records, without samples and vectors."""
        left_out = {"loss_fn": Portable("loss_fn", self.loss_fn), "_tracker": SharpnessTracker()}
        return {**super().__getstate__(), **left_out}

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer and the module."""
        join_namespaces()
        if stage != "fit":
            return
        self.errors.restart()
        with self.errors.guard("SharpnessMonitor will not track the sharpness") as attempt:
            self._check_name(trainer)
            check_loss_source(pl_module, self.loss_fn)
            strategies.check_strategy(trainer)
            strategies.check_whole(trainer, "SharpnessMonitor")
        self._is_refused = attempt.failure is not None

    def _check_name(self, trainer: pl.Trainer) -> None:
        if metric_names(trainer).count(self.name) > 1:
            msg = f"the Trainer has another callback with `name={self.name!r}`, and metrics would mix: pass another."
            raise MisconfigurationException(msg)

    def on_train_start(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Forget the records of another run, and draw the samples."""
        self.history[:] = [record for record in self.history if record.global_step <= trainer.global_step]
        self._calibrated_at = None
        self._tracker.search_next()
        if not self._is_refused:
            self._analyzer.restart(trainer)
            with self.errors.guard("SharpnessMonitor cannot draw its samples, will try again"):
                self._analyzer.prepare(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_args: Any) -> None:
        """Compare with a full analysis of the present weights, before they change."""
        self._calibrate(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_args: Any) -> None:
        """Measure after this optimizer step if it is scheduled."""
        self._analyzer.mode.report(trainer, outputs)
        if self._analyzer.samples.first_batches is not None:
            self._analyzer.samples.first_batches.after_step()
        if self._is_due(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, *_args: Any) -> None:
        """Keep no batches of later epochs as samples."""
        if self._analyzer.samples.first_batches is not None:
            self._analyzer.samples.first_batches.after_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with a full analysis of the last weights."""
        self._calibrate(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Release the samples."""
        if stage == "fit":
            with self.errors.guard("SharpnessMonitor cannot bring its records to the process that started the fit"):
                self.send_results(trainer)
        self._analyzer.release()

    # Measurements ---------------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        is_measured = bool(self.history) and self.history[-1].global_step == step  # several batches may make up a step
        is_early = step < self.every_n_train_steps and step & (step - 1) == 0
        return step > 0 and not is_measured and (is_early or step % self.every_n_train_steps == 0)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search anew at weights that were analyzed in full, once."""
        step = trainer.global_step
        last = [source.history[-1] for source in sources_of(trainer) if source.history]
        full = [r.spectrum for r in last if r.global_step == step and r.spectrum and r.spectrum.matrix == "hessian"]
        if full and step > 0 and step != self._calibrated_at:
            self._calibrated_at = step
            self._tracker.search_next()
            self._measure(trainer, pl_module, full[0])

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, full: Spectrum | None = None) -> None:
        """Record and log the sharpness of the present weights; `full` is their spectrum, if they were analyzed."""
        if self._is_refused:
            return
        with signals.sigterm_waits(trainer), without_training_time(trainer):
            try:
                record = self._record(trainer, pl_module, full)
            except Exception as error:
                if self.errors.raises:
                    raise
                release_memory()
                words = f"SharpnessMonitor has no value after step {trainer.global_step}. {self.errors.describe(error)}"
                self.errors.complain(words, key=type(error).__name__, harmless=True)
                return
        was_near = gives_alarm(self.history, self.headroom)
        if self.history and self.history[-1].global_step == record.global_step:
            self.history.pop()
        self.history.append(record)
        self.show_in_original()
        with self.errors.guard("SharpnessMonitor cannot log the sharpness"):
            values = record.scalars(self.name)
            logged_metrics.log_scalars(trainer, pl_module, values, at_epoch_end=False, in_bar=())
        if gives_alarm(self.history, self.headroom) and not was_near:
            messages.warn(
                f"the optimizer is near the edge of stability after step {record.global_step}: its threshold is "
                f"{record.headroom:.3g} times the tracked sharpness, less than `headroom={self.headroom:g}`. If the "
                "loss rises, lower the learning rate. This warning appears once."
            )

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, full: Spectrum | None) -> TrackedRecord:
        read, reason = read_stability(trainer.optimizers, trainer.global_step)
        if reason is not None:
            words = f"`{self.name}/headroom` is not known, and there is no alarm: {reason.rstrip('.')}."
            self.errors.complain(words, key="stability", harmless=True)
        diagonals = None if read is None or read.is_identity else read.named(pl_module)
        analysis = Analysis("tracking", partial(self._tracker.measure, preconditioner=diagonals))
        found = self._analyzer.analyze(trainer, pl_module, analysis=analysis)
        calibration = self.history[-1].calibration if self.history else None
        if full is not None and found.lambda_max > 0:
            calibration = full.lambda_max / found.lambda_max
        largest = found.lambda_max if found.preconditioned is None else found.preconditioned
        ratio = None if read is None or read.threshold is None else largest / read.threshold
        return TrackedRecord(
            global_step=trainer.global_step,
            products=found.products,
            tracked_lambda_max=found.lambda_max,
            batch_sharpness=found.batch_sharpness,
            tracked_stability_ratio=ratio,
            calibration=calibration,
            headroom=None if ratio is None or ratio <= 0 else 1 / (ratio * (calibration or 1.0)),
        )

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the records and the samples, as tensors and plain values."""
        return {"records": packed(self.history), "samples": self._analyzer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the records and the samples of the run that is resumed; its next measurement is a search.

        Raises:
            ValueError: If a field is missing or damaged.
        """
        self.take_results(state_dict)
        self._analyzer.load_state_dict(state_dict["samples"])

    def take_results(self, state: dict[str, Any]) -> None:
        """Replace the records by those of a copy's `state_dict`.

        Raises:
            ValueError: If a field is missing or damaged.
        """
        check_fields(state, {"samples": of(dict)}, f"the state of SharpnessMonitor(name={self.name!r})")
        self.history[:] = unpacked(state.get("records"))
