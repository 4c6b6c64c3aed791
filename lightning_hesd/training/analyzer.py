"""The analysis of a LightningModule in its Trainer: its samples, its loss, all processes together."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from lightning_hesd.landscape.sample_size import find_sample_size
from lightning_hesd.numerics.modes import name_of_mode
from lightning_hesd.numerics.pipeline import analyze, analyze_layers
from lightning_hesd.numerics.portable import LeftOut, Portable
from lightning_hesd.numerics.retry import retried
from lightning_hesd.numerics.sampling import samples_needed
from lightning_hesd.numerics.snapshot import preserved, seed_everything
from lightning_hesd.numerics.strategies import Calibration
from lightning_hesd.spectra.foreign import at_least, each, misfit, optional
from lightning_hesd.training import _lightning
from lightning_hesd.training.copies import NotCopiedError
from lightning_hesd.training.data import (
    AnalysisSamples,
    Processes,
    draw_samples,
    training_loader,
    validation_loader,
)
from lightning_hesd.training.epochs import PlannedBatch, plain_key
from lightning_hesd.training.isolation import Isolation
from lightning_hesd.training.kept import KeptBatches, NoBatchesError
from lightning_hesd.training.loss import check_gets_batches, make_loss_fn
from lightning_hesd.training.modes import AnalyzedLoss, LossMode
from lightning_hesd.training.sources import holds_batches, is_addressable, is_collection, share_data
from lightning_hesd.training.surroundings import DisturbedTrainingError, some_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import lightning.pytorch as pl

    from lightning_hesd.landscape.sample_size import SampleSize, Stability
    from lightning_hesd.numerics.batches import WeightedBatch
    from lightning_hesd.numerics.evaluation import LossFunction
    from lightning_hesd.numerics.layers import Layers
    from lightning_hesd.numerics.options import AnalysisOptions
    from lightning_hesd.numerics.pipeline import Report
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.isolation import Evaluating
    from lightning_hesd.training.modes import AnalysisMode

Result = TypeVar("Result")

FIRST_SAMPLES = 256
MOST_SAMPLES = 16_384
"""`num_samples="auto"` begins with the first number and ends at the second, for the samples are kept in memory."""

LARGEST_GROWTH = 4.0

SAMPLES = {
    "indices": optional(each(at_least(0))),
    "lengths": each(at_least(0)),
    "positions": each(at_least(0)),
    "num_samples": at_least(1),
}


def check_samples(state: object) -> None:
    """Check what a checkpoint says of the samples drawn.

    Raises:
        ValueError: If that is not what `TrainerAnalyzer.state_dict` says.
    """
    wrong = misfit(state, SAMPLES)
    if wrong is not None:
        msg = f"`{wrong}` of the samples is missing or is something else"
        raise ValueError(msg)
    of: dict[str, Any] = state  # type: ignore[assignment]  # or it would not fit
    if of["indices"] is not None and (
        sum(of["lengths"]) != len(of["indices"]) or len(of["lengths"]) != len(of["positions"])
    ):
        msg = "`indices`, `lengths` and `positions` of the samples do not fit together"
        raise ValueError(msg)


class TrainerAnalyzer:
    """Computes spectra of the module in training, on the same samples every time.

    With `num_samples="auto"` samples are added, to those there are, until the sampling error of C_t is within
    `tolerance`; once added they stay.

    Attributes:
        mode: The mode in which the loss is analysed; analyzers of one run share it.
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
        self._grows = num_samples == "auto"
        self._options = replace(options, sampling_error=True) if self._grows else options
        self._num_samples = FIRST_SAMPLES if num_samples == "auto" else num_samples
        self._batch_size = batch_size
        self._dataloader = dataloader
        self._loss_fn = loss_fn
        self._isolation = Isolation()
        self._keeps = keeps
        self._kept: KeptBatches | None = None
        self._samples: AnalysisSamples | None = None
        self._drawn: tuple[PlannedBatch, ...] | None = None
        self._resumed: tuple[PlannedBatch, ...] | None = None
        self._source: Any = None  # the loader of the first draw, which training may replace after an epoch
        self._calibrations: dict[object, Calibration] = defaultdict(Calibration)  # for each kind of analysis

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and which samples were drawn, not the samples."""
        return {
            **vars(self),
            "_dataloader": Portable("dataloader", self._dataloader),
            "_loss_fn": Portable("loss_fn", self._loss_fn),
            "_isolation": Isolation(),
            "_samples": None,
            "_calibrations": defaultdict(Calibration),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to draw the same samples."""
        batches = self._drawn or ()
        indices = [plain_key(key) for batch in batches for key in batch.keys]
        # Keys of another kind are not for a checkpoint; they are drawn again by the same seed.
        is_plain = self._drawn is not None and all(type(key) is int and key >= 0 for key in indices)
        return {
            "indices": indices if is_plain else None,
            "lengths": [len(batch.keys) for batch in batches],
            "positions": [batch.position for batch in batches],
            "num_samples": self._num_samples,
            "mode": self.mode.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the samples of the run that is resumed next, unless another number of them is asked for now.

        Raises:
            ValueError: If it does not say which.
        """
        check_samples(state)
        self.mode.load_state_dict(state.get("mode"))
        if self._grows:
            self._num_samples = state["num_samples"]
        self._resumed = None
        if self._num_samples != state["num_samples"]:
            _lightning.warn(
                f"the run that is resumed analysed {state['num_samples']} samples, and `num_samples` is "
                f"{self._num_samples} now: others are drawn, so spectra before and after are of different samples."
            )
        elif state["indices"] is not None:
            keys = iter(state["indices"])
            self._resumed = tuple(
                PlannedBatch(list(itertools.islice(keys, length)), position)
                for length, position in zip(state["lengths"], state["positions"], strict=True)
            )

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin with a run: let go of the samples of the last one, and of what its analyses changed."""
        self.release()
        self.mode.restart(trainer)
        self._isolation = Isolation()

    def release(self) -> None:
        """Let go of the samples; they are drawn anew when needed."""
        self._samples = None
        self._source = None
        if self._kept is not None:
            self._kept.finish()
            self._kept = None
        self._calibrations.clear()

    def prepare(self, trainer: pl.Trainer) -> None:
        """Draw the samples, or begin to keep those that training will see, unless that is done."""
        if self._samples is not None or self._kept is not None:
            return
        if self._source is None:
            self._source = _lightning.together(trainer, lambda: self._loader(trainer))
        may_keep = self._keeps and self._is_training_loader(trainer)
        if may_keep and not is_addressable(self._source):
            self._keep(trainer)
            return
        try:
            self._samples = _lightning.together(trainer, lambda: self._draw(trainer, self._source))
        except Exception as error:
            if not (may_keep and _lightning.anywhere(trainer, isinstance(error, NotCopiedError))):
                raise
            self._keep(trainer)
        else:
            self._drawn = self._samples.drawn
            self._resumed = None

    def _keep(self, trainer: pl.Trainer) -> None:
        """Begin to keep the first batches of training.

        Raises:
            MisconfigurationException: If `training_step` fetches its batches itself.
        """
        check_gets_batches(trainer.lightning_module)
        wanted = MOST_SAMPLES if self._grows else self._num_samples
        self._kept = KeptBatches(trainer, wanted, self._options.batch_weight)
        self._drawn = self._resumed = None
        if holds_batches(self._source):
            _lightning.warn(
                "Lightning takes each entry of a list of training dataloaders for a loader, and of batches each "
                "tensor: a step trains on one row of each tensor, and so does the analysis. To train on the batches, "
                "pass `train_dataloaders=DataLoader(batches, batch_size=None)`."
            )
        if trainer.global_step > 0:
            _lightning.warn(
                "the samples are the first batches that training sees from now on, because those of before this fit "
                "cannot be drawn again: spectra before and after are of different samples."
            )

    def waits(self) -> bool:
        """Whether there are no samples before training has seen its first batches."""
        return self._kept is not None

    def after_batch(self) -> None:
        """Take note that training has done a step with the last batch."""
        if self._kept is not None:
            self._kept.trained()

    def after_epoch(self) -> None:
        """Take note that an epoch of training has ended."""
        if self._kept is not None:
            self._kept.epoch_ended()

    def draw(self, trainer: pl.Trainer) -> AnalysisSamples:
        """Draw the samples, or return them if they are there already.

        Raises:
            NoBatchesError: If training has not seen any.
        """
        self.prepare(trainer)
        if self._samples is not None:
            return self._samples
        kept = cast("KeptBatches", self._kept)
        batches: list[WeightedBatch] = []

        def count() -> list[float]:
            batches.extend(kept.batches(self._num_samples))
            return [float(len(batches)), float(not batches)]

        found, without = _lightning.added_up(trainer, count)
        if found == 0 or (without and _lightning.is_sharded(trainer)):
            msg = (
                f"training has not seen a batch to analyse: samples of {type(self._source).__name__} are its first "
                "training batches. Pass `dataloader=` to HessianSpectrumCallback, a loader or a list of batches, for "
                "others."
            )
            raise NoBatchesError(msg)
        samples = AnalysisSamples(tuple(batches), None, transferred=True)
        if kept.is_complete:
            self._samples = samples
        else:
            self._calibrations.clear()  # of fewer batches
        return samples

    def _is_training_loader(self, trainer: pl.Trainer) -> bool:
        return self._dataloader is None or self._dataloader is trainer.train_dataloader

    def _draw(self, trainer: pl.Trainer, loader: Any) -> AnalysisSamples:
        own = self._dataloader is not None
        is_free = not self._keeps or (own and not share_data(loader, trainer.train_dataloader))
        with self._isolation.reading(trainer, trainer.lightning_module):
            return draw_samples(
                loader,
                self._num_samples,
                max_batches=None if own else trainer.num_training_batches,
                batch_size=self._batch_size,
                batch_weight=self._options.batch_weight,
                seed=self._options.seed,
                drawn=self._resumed,
                processes=_processes(trainer),
                spare=_lightning.is_sharded(trainer),
                uses_up=is_free and not isinstance(self._dataloader, str),
            )

    def _loader(self, trainer: pl.Trainer) -> Any:
        if self._dataloader is None:
            loaders = training_loader(trainer.train_dataloader)
            # For `draw_samples` a list of batches is one loader, for the Trainer it is several.
            is_one = self._keeps or not is_collection(loaders)
            return loaders if is_one else _lightning.combined_like_training(trainer, loaders)
        if isinstance(self._dataloader, LeftOut):
            self._dataloader.refuse()
        if isinstance(self._dataloader, str):
            with preserved():  # it may be made only now
                return validation_loader(_lightning.validation_loaders(trainer))
        return self._dataloader

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
        while self._grows and (factor := _growth(spectrum)) > 1 and self._num_samples < MOST_SAMPLES:
            self._num_samples = min(math.ceil(factor * self._num_samples), MOST_SAMPLES)
            self._samples = None
            self._calibrations.clear()
            before, spectrum = spectrum, self._analyze(trainer, pl_module, report, analyze, options)
            if spectrum.num_samples <= before.num_samples:  # there are no more
                self._grows = False
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
        """Let `work` analyse the samples, in all processes together."""
        _lightning.check_strategy(trainer)
        _lightning.together(trainer, self._check_harmless)
        all_reduce = None if _lightning.is_sharded(trainer) else _lightning.make_all_reduce(trainer)
        samples = self.draw(trainer)
        with self._isolation.around(trainer, pl_module) as evaluating:
            with preserved(pl_module):  # its transfer hooks may leave traces, as `training_step` may
                transfer = partial(self._transfer, trainer, pl_module, samples.batches, evaluating)
                batches = list(samples.batches) if samples.transferred else _lightning.together(trainer, transfer)
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
            kind = work is analyze, options.matrix, options.preconditioner is not None, name_of_mode(setting.mode)
            calibration = self._calibrations[kind]

            def analysis(options: AnalysisOptions, reason: str | None) -> Result:
                with _lightning.opened_layout(trainer, pl_module) as layout:
                    return work(
                        pl_module,
                        batches,
                        loss_fn,
                        options=options,
                        all_reduce=all_reduce,
                        layout=layout,
                        report=report,
                        calibration=calibration,
                        processes=trainer.num_devices,
                        reason=reason,
                    )

            def attempt(options: AnalysisOptions, reason: str | None) -> Result:
                return _lightning.together(trainer, lambda: analysis(options, reason))

            result = retried(attempt, options, calibration, partial(_lightning.anywhere, trainer))
        return trainer.strategy.broadcast(result)

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
                data = _lightning.transfer_batch(trainer, pl_module, batch.copy().data)
            moved.append(replace(batch, data=data))
        return moved

    def _check_harmless(self) -> None:
        """Refuse to analyse again where that has changed what cannot be put back.

        Raises:
            DisturbedTrainingError: If it has.
        """
        if self._isolation.harm:
            msg = f"changed in place {some_of(self._isolation.harm)} in an earlier analysis"
            raise DisturbedTrainingError(msg)


def _within(evaluating: Evaluating, function: Callable[..., Result] | None) -> Callable[..., Result] | None:
    """Return a function that is called in the context of an evaluation."""

    def within(*arguments: Any) -> Result:
        with evaluating():
            return cast("Callable[..., Result]", function)(*arguments)

    return None if function is None else within


def _processes(trainer: pl.Trainer) -> Processes:
    return Processes(
        trainer.global_rank,
        trainer.world_size,
        agree=lambda work: trainer.strategy.broadcast(_lightning.together(trainer, work)),
        add=partial(_lightning.added_up, trainer),
    )


def _growth(spectrum: Spectrum) -> float:
    """Return by which factor the number of samples must grow for the sampling error to meet the tolerance."""
    error = spectrum.c_t_sampling_error
    if error is None or error <= spectrum.allowed_error:
        return 1.0
    # Standard errors fall with the square root; a little more, because they are estimates themselves.
    return min(1.2 * samples_needed(1, spectrum.allowed_error, error), LARGEST_GROWTH)
