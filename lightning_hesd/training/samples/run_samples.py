"""The analysis samples of a run: drawn from a loader, or the first batches of training; the same in every analysis."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning_hesd.numerics.inputs.portable import LeftOut, Portable
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.training.compat import dataloading, messages, strategies
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.compat.strategies import collectives_of
from lightning_hesd.training.loss import check_gets_batches
from lightning_hesd.training.samples.analysis_samples import AnalysisSamples, draw_samples
from lightning_hesd.training.samples.epochs import check_samples, planned_batches, sample_state
from lightning_hesd.training.samples.first_batches import FirstBatches, NoBatchesError
from lightning_hesd.training.samples.loaders import (
    NotCopiedError,
    holds_tensors,
    is_addressable,
    is_collection,
    share_data,
    validation_loader,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.training.isolation.isolation import TrainingIsolation
    from lightning_hesd.training.samples.epochs import PlannedBatch

FIRST_SAMPLES = 256
"""Number of samples with which `num_samples="auto"` begins."""

MAX_SAMPLES = 16_384
"""Maximal number of samples with `num_samples="auto"`; they are held in memory."""


class RunSamples:
    """The analysis samples of a run.

    Attributes:
        grows: Whether samples are added until the sampling error of C_t is small enough.
        first_batches: The first batches of training, copied as samples; None: the samples are drawn from a loader.
    """

    def __init__(
        self,
        num_samples: int | Literal["auto"],
        options: AnalysisOptions,
        *,
        dataloader: Any,
        in_training: bool = False,
    ) -> None:
        """Take the options.

        Args:
            num_samples: Number of samples, on all ranks together.
            options: Options of the analyses, of which the seed, the weight of a batch, and `batch_size` are used, if
                that is a number: the most samples per batch.
            dataloader: Source of the samples; None: the training dataloader; "val": the validation dataloader.
            in_training: Whether training follows. Its first batches are then kept as samples if none can be drawn from
                the training dataloader; `after_step` and `after_epoch` of `first_batches` must then be called.
        """
        self.grows = num_samples == "auto"
        self._num_samples = FIRST_SAMPLES if num_samples == "auto" else num_samples
        self._batch_size = options.batch_size if isinstance(options.batch_size, int) else None
        self._batch_weight = options.batch_weight
        self._dataloader = dataloader
        self._seed = options.seed
        self._in_training = in_training
        self.first_batches: FirstBatches | None = None
        self._samples: AnalysisSamples | None = None
        self._drawn: tuple[PlannedBatch, ...] | None = None
        self._resumed: tuple[PlannedBatch, ...] | None = None
        self._source: Any = None  # the loader of the samples; training may replace its own after an epoch

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and the positions of the samples, without the samples."""
        left_out = {"_samples": None, "first_batches": None, "_source": None}
        portable = {name: Portable(name[1:], vars(self)[name]) for name in ("_dataloader", "_batch_weight")}
        return {**vars(self), **left_out, **portable}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to read the same samples."""
        return sample_state(self._drawn, self._num_samples)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read the samples of the resumed run next, unless `num_samples` differs.

        Raises:
            ValueError: If the state is invalid.
        """
        check_samples(state)
        if self.grows:
            self._num_samples = state["num_samples"]
        self._resumed = None
        if self._num_samples == state["num_samples"]:
            self._resumed = planned_batches(state)
        else:
            messages.warn(
                f"the resumed run analyzed {state['num_samples']} samples, and `num_samples` is {self._num_samples} "
                "now: other samples are drawn, so spectra before and after belong to different samples."
            )

    def release(self) -> None:
        """Release the samples; they are read again when needed."""
        self._samples = None
        self._source = None
        if self.first_batches is not None:
            self.first_batches.finish()
            self.first_batches = None

    def is_outdated(self, trainer: pl.Trainer) -> bool:
        """Whether training has replaced the dataloader of the samples; the same on all ranks."""
        drawn_from_training = self._dataloader is None and self._drawn is not None and self._source is not None
        return self._in_training and drawn_from_training and self._source is not trainer.train_dataloader

    def grow(self, factor: float) -> bool:
        """Increase the number of samples by a factor, up to `MAX_SAMPLES`, and return whether it has increased."""
        if factor <= 1 or self._num_samples >= MAX_SAMPLES:
            return False
        self._num_samples = min(math.ceil(factor * self._num_samples), MAX_SAMPLES)
        self._samples = None
        return True

    def prepare(self, trainer: pl.Trainer, isolation: TrainingIsolation) -> None:
        """Draw the samples, or begin to copy the first batches of training, unless that is done."""
        if self._samples is not None or self.first_batches is not None:
            return
        if self._source is None:
            self._source = collectives_of(trainer).run_together(partial(self._loader, trainer))
        is_of_training = self._dataloader is None or self._dataloader is trainer.train_dataloader
        may_copy = self._in_training and is_of_training
        if may_copy and not is_addressable(self._source):
            self._copy_first_batches(trainer)
            return
        try:
            self._samples = collectives_of(trainer).run_together(partial(self._draw, trainer, isolation))
        except Exception as error:
            if not (may_copy and collectives_of(trainer).any(isinstance(error, NotCopiedError))):
                raise
            self._copy_first_batches(trainer)
        else:
            self._drawn = self._samples.drawn
            self._resumed = None

    def _copy_first_batches(self, trainer: pl.Trainer) -> None:
        """Begin to copy the first batches of training.

        Raises:
            MisconfigurationException: If `training_step` fetches its batches itself.
        """
        check_gets_batches(trainer.lightning_module)
        num_samples = MAX_SAMPLES if self.grows else self._num_samples
        self.first_batches = FirstBatches(trainer, num_samples, self._batch_weight)
        self._drawn = self._resumed = None
        if holds_tensors(self._source):
            messages.warn(
                "Lightning takes each entry of a list of training dataloaders for a loader, and in a list of batches "
                "each tensor: a step trains on one row of each tensor, and so the analysis uses rows. To train on the "
                "batches, pass `train_dataloaders=DataLoader(batches, batch_size=None)`."
            )
        if trainer.global_step > 0:
            messages.warn(
                "the analysis samples are the first batches of training from now on, because earlier batches cannot be "
                "read again: spectra before and after belong to different samples."
            )

    @property
    def description(self) -> str:
        """The samples in words; call `prepare` before."""
        if self.first_batches is not None:
            return f"the first {self._num_samples} samples of training"
        names = {None: "the training data", "val": "the validation data"}
        of = names.get(self._dataloader, "`dataloader`") if isinstance(self._dataloader, str | None) else "`dataloader`"
        if not self._drawn:
            return f"{self._num_samples} samples of {of}"
        count, batches = sum(len(batch.keys) for batch in self._drawn), len(self._drawn)
        return f"{count} samples of {of} in {batches} batch{'es' if batches > 1 else ''}"

    def draw(self, trainer: pl.Trainer, isolation: TrainingIsolation) -> AnalysisSamples:
        """Return the samples, and draw them if needed.

        Raises:
            NoBatchesError: If the samples are the first batches of training, and there have been none.
        """
        self.prepare(trainer, isolation)
        if self._samples is not None:
            return self._samples
        first_batches = cast("FirstBatches", self.first_batches)
        ranks = collectives_of(trainer)
        batches = ranks.run_together(partial(first_batches.batches, self._num_samples))
        found, without = ranks.sum_values([float(len(batches)), float(not batches)])
        if found == 0 or (without and strategies.is_sharded(trainer)):
            msg = (
                f"there are no samples to analyze yet: none can be drawn from a {type(self._source).__name__} like the "
                "training dataloader without taking them away from training, so the first batches of training are the "
                "samples, and this run has had none so far. For other samples, pass the callback `dataloader=`, a "
                "loader or a list of batches."
            )
            raise NoBatchesError(msg)
        samples = AnalysisSamples(tuple(batches), None, transferred=True)
        if first_batches.is_complete:
            self._samples = samples
        return samples

    def _draw(self, trainer: pl.Trainer, isolation: TrainingIsolation) -> AnalysisSamples:
        own = self._dataloader is not None
        may_consume = not self._in_training or (own and not share_data(self._source, trainer.train_dataloader))
        with isolation.reading(trainer, trainer.lightning_module):
            return draw_samples(
                self._source,
                self._num_samples,
                max_batches=None if own else dataloading.batches_of_epoch(trainer),
                batch_size=self._batch_size,
                batch_weight=self._batch_weight,
                seed=self._seed,
                drawn=self._resumed,
                collectives=collectives_of(trainer),
                padding=strategies.is_sharded(trainer),
                may_consume=may_consume and not isinstance(self._dataloader, str),
            )

    def _loader(self, trainer: pl.Trainer) -> Any:
        if self._dataloader is None:
            loaders = trainer.train_dataloader
            if loaders is None:
                msg = (
                    "the Trainer has no training dataloader from which to draw the analysis samples: pass the "
                    "callback `dataloader=`, a loader or a list of batches that `training_step` (or your "
                    "`loss_fn`) takes."
                )
                raise MisconfigurationException(msg)
            # A list of batches is one loader for `draw_samples`, and several for the Trainer.
            is_one = self._in_training or not is_collection(loaders)
            return loaders if is_one else dataloading.combined_like_training(trainer, loaders)
        if isinstance(self._dataloader, LeftOut):
            self._dataloader.refuse()
        if isinstance(self._dataloader, str):
            with restore_state():  # Lightning may make the loader only now
                return validation_loader(dataloading.validation_loaders(trainer))
        return self._dataloader
