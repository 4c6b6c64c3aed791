"""The analysis of a LightningModule in its Trainer: its samples, its loss, on all ranks together."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_hesd.numerics.analysis.group_statistics import samples_needed
from lightning_hesd.numerics.analysis.retry import retry_on_oom
from lightning_hesd.numerics.collectives import LOCAL
from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.numerics.isolation.modes import mode_name
from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.compat import dataloading, messages, strategies
from lightning_hesd.training.compat.strategies import collectives_of, parameter_sharding_of
from lightning_hesd.training.isolation.isolation import TrainingIsolation
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError
from lightning_hesd.training.loss import AnalyzedLoss
from lightning_hesd.training.loss_mode import LossMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import lightning.pytorch as pl

    from lightning_hesd.numerics.analysis.engine import Report
    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.training.isolation.isolation import Evaluating
    from lightning_hesd.training.loss_mode import AnalysisMode
    from lightning_hesd.training.samples.analysis_samples import AnalysisSamples
    from lightning_hesd.training.samples.run_samples import RunSamples

Result = TypeVar("Result")

MAX_GROWTH = 4.0
"""With `num_samples="auto"`, the number of samples grows by this factor at most from one spectrum to the next."""


@dataclass(frozen=True)
class Analysis(Generic[Result]):
    """A computation on the samples of an analyzer.

    Attributes:
        name: Its name; analyses of one name share a cache for each curvature matrix and mode.
        compute: A function with the signature of `analyze` of the engine.
    """

    name: str
    compute: Callable[..., Result]


class TrainerAnalyzer:
    """Analyzes the module in training on the same samples every time.

    Samples that grow are added until the sampling error of C_t is within `tolerance`; they stay.

    Attributes:
        mode: The mode in which the loss is analyzed; analyzers of one run share it.
        samples: The samples that are analyzed.
    """

    def __init__(
        self,
        options: AnalysisOptions,
        samples: RunSamples,
        *,
        loss_fn: LossFunction | None,
        mode: AnalysisMode = "auto",
    ) -> None:
        """Take the options.

        Args:
            options: Options of the analyses.
            samples: The samples.
            loss_fn: The loss; None: that of `training_step`.
            mode: Mode of the module in which the loss is evaluated.
        """
        self.mode = LossMode(mode)
        self.samples = samples
        self._options = replace(options, sampling_error=True) if samples.grows else options
        self._loss_fn = loss_fn
        self._isolation = TrainingIsolation()
        self._cached_samples: AnalysisSamples | None = None
        self._caches: dict[object, AnalysisCache] = defaultdict(AnalysisCache)

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and which samples were drawn, without the state of a run."""
        return {
            **vars(self),
            "_loss_fn": Portable("loss_fn", self._loss_fn),
            "_isolation": TrainingIsolation(),
            "_cached_samples": None,
            "_caches": defaultdict(AnalysisCache),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run analyzes the same loss of the same samples."""
        return {**self.samples.state_dict(), "mode": self.mode.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples and the mode of the run that is resumed, unless the number of samples differs.

        Raises:
            ValueError: If a field of the state is missing or invalid.
        """
        self.samples.load_state_dict(state)
        self.mode.load_state_dict(state.get("mode"))

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin a run: release the samples and the state of the last one."""
        self.release()
        self.mode.restart(trainer)
        self._isolation = TrainingIsolation()

    def release(self) -> None:
        """Release the samples; they are drawn again when needed."""
        self.samples.release()
        self._cached_samples = None
        self._caches.clear()

    def prepare(self, trainer: pl.Trainer) -> None:
        """Draw the samples, or begin to keep the first training batches, unless that is done."""
        self.samples.prepare(trainer, self._isolation)

    def draw(self, trainer: pl.Trainer) -> AnalysisSamples:
        """Return the samples, drawn unless they are already.

        Raises:
            NoBatchesError: If the first training batches are the samples, and there was none yet.
        """
        samples = self.samples.draw(trainer, self._isolation)
        if samples is not self._cached_samples:
            self._caches.clear()
            self._cached_samples = samples
        return samples

    def analyze(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        report: Report | None = None,
        *,
        analysis: Analysis[Result],
        **changes: Any,
    ) -> Result:
        """Return the result of an analysis at the present weights, the same on every rank.

        Its options are those of the analyzer and `changes`. `report` is called after every Lanczos step. With
        `num_samples="auto"`, a spectrum without `changes` is computed again as long as samples are added.
        """
        options = replace(self._options, **changes)
        failure: str | None = None
        smaller: int | None = None
        while True:
            try:
                with self._prepared(trainer, pl_module, analysis, options, report) as run:
                    result = run()
            except Exception as error:
                if not self._replace_samples(trainer, error):
                    raise
                failure = one_line(error)
                continue
            result = collectives_of(trainer).broadcast(result)
            if failure is not None:
                messages.warn(
                    "training has replaced its dataloader, and the samples of the first one can no longer be analyzed "
                    f"({failure}), so samples of the present one are analyzed from now on: spectra before and after "
                    "are of different samples."
                )
            failure = None
            if not isinstance(result, Spectrum) or changes or not self.samples.grows:
                return result
            if smaller is not None and result.num_samples <= smaller:  # the dataloader has no more samples
                self.samples.grows = False
                return result
            smaller = result.num_samples
            if not self.samples.grow(_growth(result)):
                return result

    def _replace_samples(self, trainer: pl.Trainer, error: Exception) -> bool:
        """Draw samples of the present training dataloader, if those of an earlier one may be why an analysis failed.

        The present `training_step` may need values that the samples of the first dataloader lack, such as those that
        a baseline has added to the data. Return whether the samples were replaced.
        """
        if not self.samples.is_outdated(trainer):
            return False
        is_of_weights = isinstance(error, ArithmeticError | DisturbedTrainingError)  # a loss that is NaN, for example
        if collectives_of(trainer).any(is_of_weights or is_out_of_memory(error)):
            return False
        self.release()
        self.prepare(trainer)
        return self.samples.first_batches is None

    @contextlib.contextmanager
    def _prepared(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        analysis: Analysis[Result],
        options: AnalysisOptions,
        report: Report | None,
    ) -> Iterator[Callable[[], Result]]:
        """Isolate an analysis from training, move its samples to the device, and choose the mode of the module.

        Yields:
            The function that runs the analysis, on all ranks together.
        """
        strategies.check_strategy(trainer)
        ranks = collectives_of(trainer)
        ranks.run_together(self._isolation.check_harmless)
        samples = self.draw(trainer)
        with self._isolation.analysis(trainer, pl_module) as evaluating:
            with restore_state(pl_module):  # its transfer hooks may change it, as `training_step` may
                transfer = partial(self._transfer, trainer, pl_module, samples.batches, evaluating)
                batches = list(samples.batches) if samples.transferred else ranks.run_together(transfer)
            loss = AnalyzedLoss(trainer, pl_module, batches, self._loss_fn, options, evaluating)
            setting = self.mode.settle(loss)
            options = replace(
                options,
                mode=setting.mode,
                output_fn=setting.within(options.output_fn),
                output_loss=setting.within(options.output_loss),
            )
            matrix, is_preconditioned = options.matrix, options.preconditioner is not None
            cache = self._caches[analysis.name, matrix, is_preconditioned, mode_name(setting.mode)]
            compute = partial(analysis.compute, pl_module, batches, loss.function(setting))

            def attempt(options: AnalysisOptions, reason: str | None) -> Result:
                sharding = parameter_sharding_of(trainer, pl_module)
                work = partial(
                    compute,
                    options=options,
                    collectives=LOCAL if sharding.is_sharded else ranks,
                    sharding=sharding,
                    report=report,
                    cache=cache,
                    local_ranks=trainer.num_devices,
                    reason=reason,
                )
                return ranks.run_together(partial(sharding.collectives.run_together, work))

            try:
                yield partial(retry_on_oom, attempt, options, cache, ranks)
            finally:
                batches.clear()  # their memory on the device is free for the next analysis

    def _transfer(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batches: Sequence[WeightedBatch],
        evaluating: Evaluating,
    ) -> list[WeightedBatch]:
        """Move the batches to the device; random augmentation on the device is the same every time."""
        moved = []
        for batch in batches:
            seed_everything(self._options.seed + batch.index)
            with evaluating():
                data = dataloading.transfer_batch(trainer, pl_module, batch.copy().data)
            moved.append(replace(batch, data=data))
        return moved


def _growth(spectrum: Spectrum) -> float:
    """Return the factor by which the number of samples must grow for the sampling error to meet the tolerance."""
    error = spectrum.c_t_sampling_error
    if error is None or error <= spectrum.allowed_error:
        return 1.0
    # Standard errors fall with the square root; a little more, because they are estimates themselves.
    return min(1.2 * samples_needed(1, spectrum.allowed_error, error), MAX_GROWTH)
