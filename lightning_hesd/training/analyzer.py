"""The analysis of a LightningModule in its Trainer: its samples, its loss, all processes together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from lightning_hesd.numerics.analysis.engine import analyze, analyze_layers
from lightning_hesd.numerics.analysis.retry import retry_on_oom
from lightning_hesd.numerics.analysis.sampling_error import samples_needed
from lightning_hesd.numerics.collectives import LOCAL
from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.numerics.isolation.modes import mode_name
from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from lightning_hesd.sample_size.recommendation import find_sample_size
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.compat import internals
from lightning_hesd.training.compat.collectives import collectives_of, parameter_sharding_of
from lightning_hesd.training.isolation.isolation import TrainingIsolation
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError, names_in_words
from lightning_hesd.training.loss import make_loss_fn
from lightning_hesd.training.loss_mode import AnalyzedLoss, LossMode
from lightning_hesd.training.samples.run_samples import RunSamples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import lightning.pytorch as pl

    from lightning_hesd.numerics.analysis.engine import Report
    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.sample_size.recommendation import SampleSize, Stability
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.isolation.isolation import Evaluating
    from lightning_hesd.training.loss_mode import AnalysisMode
    from lightning_hesd.training.samples.analysis_samples import AnalysisSamples

Result = TypeVar("Result")

MAX_GROWTH = 4.0
"""Most samples of a spectrum, as a multiple of those of the one before, with `num_samples="auto"`."""


class TrainerAnalyzer:
    """Computes spectra of the module in training, on the same samples every time.

    With `num_samples="auto"` samples are added, to those there are, until the sampling error of C_t is within
    `tolerance`; once added they stay.

    Attributes:
        mode: The mode in which the loss is analysed; analyzers of one run share it.
        samples: The samples that are analysed.
    """

    def __init__(
        self,
        options: AnalysisOptions,
        *,
        num_samples: int | Literal["auto"],
        batch_size: int | None,
        dataloader: Any,
        loss_fn: LossFunction | None,
        mode: AnalysisMode = "auto",
        keeps: bool = False,
    ) -> None:
        """Prepare.

        Args:
            options: The options of the analyses.
            num_samples: How many samples, in all processes together.
            batch_size: Most samples per batch; None: as the loader makes them.
            dataloader: Whose samples; None: the training data's; "val": the validation data's.
            loss_fn: The loss; None: that of `training_step`.
            mode: In which modes of its modules the loss is evaluated.
            keeps: Whether training follows, whose first batches are kept as samples where its loader is not one of
                which samples can be drawn; `after_batch` and `after_epoch` are called then. Without it, the loader is
                read.
        """
        self.mode = LossMode(mode)
        self._options = replace(options, sampling_error=True) if num_samples == "auto" else options
        self._loss_fn = loss_fn
        self._isolation = TrainingIsolation()
        self.samples = RunSamples(
            num_samples,
            batch_size=batch_size,
            batch_weight=options.batch_weight,
            dataloader=dataloader,
            seed=options.seed,
            in_training=keeps,
        )
        self._cached_samples: AnalysisSamples | None = None
        self._caches: dict[object, AnalysisCache] = defaultdict(AnalysisCache)  # for each kind of analysis

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and which samples were drawn, not what a run has found."""
        return {
            **vars(self),
            "_loss_fn": Portable("loss_fn", self._loss_fn),
            "_isolation": TrainingIsolation(),
            "_cached_samples": None,
            "_caches": defaultdict(AnalysisCache),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to analyse the same loss of the same samples."""
        return {**self.samples.state_dict(), "mode": self.mode.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the samples of the run that is resumed next, unless another number of them is asked for now.

        Raises:
            ValueError: If it does not say which.
        """
        self.samples.load_state_dict(state)
        self.mode.load_state_dict(state.get("mode"))

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin with a run: let go of the samples of the last one, and of what its analyses changed."""
        self.release()
        self.mode.restart(trainer)
        self._isolation = TrainingIsolation()

    def release(self) -> None:
        """Let go of the samples; they are drawn anew when needed."""
        self.samples.release()
        self._cached_samples = None
        self._caches.clear()

    def prepare(self, trainer: pl.Trainer) -> None:
        """Draw the samples, or begin to keep those that training will see, unless that is done."""
        self.samples.prepare(trainer, self._isolation)

    def draw(self, trainer: pl.Trainer) -> AnalysisSamples:
        """Draw the samples, or return them if they are there already.

        Raises:
            NoBatchesError: If training has not seen any.
        """
        samples = self.samples.draw(trainer, self._isolation)
        if samples is not self._cached_samples:
            self._caches.clear()
            self._cached_samples = samples
        return samples

    def spectrum(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        report: Report | None = None,
        **changes: Any,
    ) -> Spectrum:
        """Return the spectrum at the present weights, the same in every process.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            report: Called after every Lanczos step.
            **changes: Options that differ for this spectrum; the samples are those there are.
        """
        options = replace(self._options, **changes)
        spectrum = self._analyze(trainer, pl_module, report, analyze, options)
        if changes:
            return spectrum
        while self.samples.grows and self.samples.grow(_growth(spectrum)):
            before, spectrum = spectrum, self._analyze(trainer, pl_module, report, analyze, options)
            if spectrum.num_samples <= before.num_samples:  # there are no more
                self.samples.grows = False
        return spectrum

    def layers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Layers, report: Report | None = None
    ) -> dict[str, Spectrum]:
        """Return the spectra of layers at the present weights, the same in every process.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            layers: Which, as for `layer_spectra`.
            report: Called after every Lanczos step.
        """
        return self._analyze(trainer, pl_module, report, partial(analyze_layers, layers=layers), self._options)

    def sample_size(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stability: Stability) -> SampleSize:
        """Return how many samples are enough at the present weights, with those there are as the pilot; one process.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            stability: How stable is stable enough.
        """
        return self._analyze(trainer, pl_module, None, partial(find_sample_size, stability=stability), self._options)

    def _analyze(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        report: Report | None,
        work: Callable[..., Result],
        options: AnalysisOptions,
    ) -> Result:
        """Let `work` analyse the samples, in all processes together.

        Where training has replaced its dataloader, `training_step` may have come to need what the samples of the first
        one lack, such as values that a baseline has added to the data. Then samples of the present one replace them.
        """
        try:
            return self._analyze_samples(trainer, pl_module, report, work, options)
        except Exception as error:
            if not self.samples.is_outdated(trainer):
                raise
            of_weights = isinstance(error, ArithmeticError | DisturbedTrainingError)  # a loss that is NaN, for example
            says_nothing_of_samples = of_weights or is_out_of_memory(error)
            if collectives_of(trainer).any(says_nothing_of_samples):
                raise
            self.release()
            self.prepare(trainer)
            if self.samples.waits():
                raise
            failure = one_line(error)
        result = self._analyze_samples(trainer, pl_module, report, work, options)
        internals.warn(
            "training has replaced its dataloader, and the samples of the first one can no longer be analysed "
            f"({failure}), so samples of the present one are from now on: spectra before and after are of different "
            "samples."
        )
        return result

    def _analyze_samples(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        report: Report | None,
        work: Callable[..., Result],
        options: AnalysisOptions,
    ) -> Result:
        internals.check_strategy(trainer)
        ranks = collectives_of(trainer)
        ranks.run_together(self._check_harmless)
        samples = self.draw(trainer)
        with self._isolation.analysis(trainer, pl_module) as evaluating:
            with restore_state(pl_module):  # its transfer hooks may leave traces, as `training_step` may
                transfer = partial(self._transfer, trainer, pl_module, samples.batches, evaluating)
                batches = list(samples.batches) if samples.transferred else ranks.run_together(transfer)
            make_loss = partial(make_loss_fn, trainer, self._loss_fn)
            loss = AnalyzedLoss(trainer, pl_module, batches, make_loss, options, evaluating)
            setting = self.mode.settle(loss)
            loss_fn = make_loss(setting.evaluating)
            options = replace(
                options,
                mode=setting.mode,
                output_fn=_within(setting.evaluating, options.output_fn),
                output_loss=_within(setting.evaluating, options.output_loss),
            )
            kind = work is analyze, options.matrix, options.preconditioner is not None, mode_name(setting.mode)
            cache = self._caches[kind]

            def analysis(options: AnalysisOptions, reason: str | None) -> Result:
                sharding = parameter_sharding_of(trainer, pl_module)
                run = partial(
                    work,
                    pl_module,
                    batches,
                    loss_fn,
                    options=options,
                    collectives=LOCAL if sharding.is_sharded else ranks,
                    sharding=sharding,
                    report=report,
                    cache=cache,
                    processes=trainer.num_devices,
                    reason=reason,
                )
                return sharding.collectives.run_together(run)

            def attempt(options: AnalysisOptions, reason: str | None) -> Result:
                return ranks.run_together(partial(analysis, options, reason))

            result = retry_on_oom(attempt, options, cache, ranks)
        return ranks.broadcast(result)

    def _transfer(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batches: Sequence[WeightedBatch],
        evaluating: Evaluating,
    ) -> list[WeightedBatch]:
        """Bring the batches to the device; augmentation done there is the same every time."""
        moved = []
        for batch in batches:
            seed_everything(self._options.seed + batch.index)
            with evaluating():
                data = internals.transfer_batch(trainer, pl_module, batch.copy().data)
            moved.append(replace(batch, data=data))
        return moved

    def _check_harmless(self) -> None:
        """Refuse to analyse again where that has changed what cannot be put back.

        Raises:
            DisturbedTrainingError: If it has.
        """
        if self._isolation.damaged:
            msg = f"changed in place {names_in_words(self._isolation.damaged)} in an earlier analysis"
            raise DisturbedTrainingError(msg)


def _within(evaluating: Evaluating, function: Callable[..., Result] | None) -> Callable[..., Result] | None:
    """Return a function that is called in the context of an evaluation."""

    def within(*arguments: Any) -> Result:
        with evaluating():
            return cast("Callable[..., Result]", function)(*arguments)

    return None if function is None else within


def _growth(spectrum: Spectrum) -> float:
    """Return by which factor the number of samples must grow for the sampling error to meet the tolerance."""
    error = spectrum.c_t_sampling_error
    if error is None or error <= spectrum.allowed_error:
        return 1.0
    # Standard errors fall with the square root; a little more, because they are estimates themselves.
    return min(1.2 * samples_needed(1, spectrum.allowed_error, error), MAX_GROWTH)
