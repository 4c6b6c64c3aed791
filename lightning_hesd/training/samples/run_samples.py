"""The samples of a run: drawn from a loader, or the first batches that training sees; the same in every analysis."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning_hesd.numerics.inputs.portable import LeftOut, Portable
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.spectra.validation import at_least, each, first_invalid_field, optional
from lightning_hesd.training.compat import dataloading, internals, messages, strategies
from lightning_hesd.training.loss import check_gets_batches
from lightning_hesd.training.samples.analysis_samples import (
    AnalysisSamples,
    Processes,
    draw_samples,
    training_loader,
    validation_loader,
)
from lightning_hesd.training.samples.copies import NotCopiedError
from lightning_hesd.training.samples.epochs import PlannedBatch, plain_key
from lightning_hesd.training.samples.first_batches import KeptBatches, NoBatchesError
from lightning_hesd.training.samples.sources import holds_batches, is_addressable, is_collection, share_data

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.training.isolation.isolation import Isolation

FIRST_SAMPLES = 256
MAX_SAMPLES = 16_384
"""`num_samples="auto"` begins with the first number and ends at the second, for the samples are kept in memory."""

SAMPLES = {
    "indices": optional(each(at_least(0))),
    "lengths": each(at_least(0)),
    "positions": each(at_least(0)),
    "num_samples": at_least(1),
}


def check_samples(state: object) -> None:
    """Check what a checkpoint says of the samples drawn.

    Raises:
        ValueError: If that is not what `RunSamples.state_dict` says.
    """
    wrong = first_invalid_field(state, SAMPLES)
    if wrong is not None:
        msg = f"`{wrong}` of the samples is missing or invalid"
        raise ValueError(msg)
    of: dict[str, Any] = state  # type: ignore[assignment]  # or it would not fit
    if of["indices"] is not None and (
        sum(of["lengths"]) != len(of["indices"]) or len(of["lengths"]) != len(of["positions"])
    ):
        msg = "`indices`, `lengths` and `positions` of the samples do not fit together"
        raise ValueError(msg)


class RunSamples:
    """The samples that a run analyses, the same every time; with `num_samples="auto"` samples are added.

    Attributes:
        grows: Whether samples are added, to those there are, until the sampling error of C_t is small enough.
    """

    def __init__(
        self,
        num_samples: int | Literal["auto"],
        *,
        batch_size: int | None,
        batch_weight: Weigh | None,
        dataloader: Any,
        seed: int,
        keeps: bool,
    ) -> None:
        """Prepare; arguments as for `TrainerAnalyzer`.

        Args:
            num_samples: How many samples, in all processes together.
            batch_size: Most samples per batch; None: as the loader makes them.
            batch_weight: Weight of a batch; None: its number of samples.
            dataloader: Whose samples; None: the training data's; "val": the validation data's.
            seed: Of the random numbers that drawing uses.
            keeps: Whether training follows, whose batches may be kept.
        """
        self.grows = num_samples == "auto"
        self._num_samples = FIRST_SAMPLES if num_samples == "auto" else num_samples
        self._batch_size = batch_size
        self._batch_weight = batch_weight
        self._dataloader = dataloader
        self._seed = seed
        self._keeps = keeps
        self._kept: KeptBatches | None = None
        self._samples: AnalysisSamples | None = None
        self._drawn: tuple[PlannedBatch, ...] | None = None
        self._resumed: tuple[PlannedBatch, ...] | None = None
        self._source: Any = None  # the loader of the first draw, which training may replace after an epoch

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and which samples were drawn, not the samples."""
        left_out = {"_samples": None, "_kept": None, "_source": None}
        portable = {name: Portable(name[1:], vars(self)[name]) for name in ("_dataloader", "_batch_weight")}
        return {**vars(self), **left_out, **portable}

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the samples of the run that is resumed next, unless another number of them is asked for now.

        Raises:
            ValueError: If it does not say which.
        """
        check_samples(state)
        if self.grows:
            self._num_samples = state["num_samples"]
        self._resumed = None
        if self._num_samples != state["num_samples"]:
            messages.warn(
                f"the run that is resumed analysed {state['num_samples']} samples, and `num_samples` is "
                f"{self._num_samples} now: others are drawn, so spectra before and after are of different samples."
            )
        elif state["indices"] is not None:
            keys = iter(state["indices"])
            self._resumed = tuple(
                PlannedBatch(list(itertools.islice(keys, length)), position)
                for length, position in zip(state["lengths"], state["positions"], strict=True)
            )

    def release(self) -> None:
        """Let go of the samples; they are drawn anew when needed."""
        self._samples = None
        self._source = None
        if self._kept is not None:
            self._kept.finish()
            self._kept = None

    def is_outdated(self, trainer: pl.Trainer) -> bool:
        """Whether training has replaced the dataloader from which the samples were drawn; the same in all processes."""
        drawn_from_training = self._dataloader is None and self._drawn is not None and self._source is not None
        return self._keeps and drawn_from_training and self._source is not trainer.train_dataloader

    def grow(self, factor: float) -> bool:
        """Ask for more samples.

        Args:
            factor: How many times as many, `MAX_SAMPLES` at most.

        Returns:
            Whether more may be had.
        """
        if factor <= 1 or self._num_samples >= MAX_SAMPLES:
            return False
        self._num_samples = min(math.ceil(factor * self._num_samples), MAX_SAMPLES)
        self._samples = None
        return True

    def prepare(self, trainer: pl.Trainer, isolation: Isolation) -> None:
        """Draw the samples, or begin to keep those that training will see, unless that is done.

        Args:
            trainer: The trainer.
            isolation: Keeps what drawing does from training.
        """
        if self._samples is not None or self._kept is not None:
            return
        if self._source is None:
            self._source = internals.together(trainer, lambda: self._loader(trainer))
        may_keep = self._keeps and self._is_training_loader(trainer)
        if may_keep and not is_addressable(self._source):
            self._keep(trainer)
            return
        try:
            self._samples = internals.together(trainer, lambda: self._draw(trainer, isolation))
        except Exception as error:
            if not (may_keep and internals.anywhere(trainer, isinstance(error, NotCopiedError))):
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
        wanted = MAX_SAMPLES if self.grows else self._num_samples
        self._kept = KeptBatches(trainer, wanted, self._batch_weight)
        self._drawn = self._resumed = None
        if holds_batches(self._source):
            messages.warn(
                "Lightning takes each entry of a list of training dataloaders for a loader, and of batches each "
                "tensor: a step trains on one row of each tensor, and so does the analysis. To train on the batches, "
                "pass `train_dataloaders=DataLoader(batches, batch_size=None)`."
            )
        if trainer.global_step > 0:
            messages.warn(
                "the samples are the first batches that training sees from now on, because those of before this fit "
                "cannot be drawn again: spectra before and after are of different samples."
            )

    @property
    def description(self) -> str:
        """Which samples these are, in words; once they are drawn, or begun to be kept."""
        if self._kept is not None:
            return f"the first {self._num_samples} samples that training sees"
        whose = {None: "the training data", "val": "the validation data"}
        of = whose.get(self._dataloader, "`dataloader`") if isinstance(self._dataloader, str | None) else "`dataloader`"
        if not self._drawn:
            return f"{self._num_samples} samples of {of}"
        count, batches = sum(len(batch.keys) for batch in self._drawn), len(self._drawn)
        return f"{count} samples of {of} in {batches} batch{'es' if batches > 1 else ''}"

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

    def draw(self, trainer: pl.Trainer, isolation: Isolation) -> AnalysisSamples:
        """Draw the samples, or return them if they are there already.

        Args:
            trainer: The trainer.
            isolation: Keeps what drawing does from training.

        Raises:
            NoBatchesError: If training has not seen any.
        """
        self.prepare(trainer, isolation)
        if self._samples is not None:
            return self._samples
        kept = cast("KeptBatches", self._kept)
        batches: list[WeightedBatch] = []

        def count() -> list[float]:
            batches.extend(kept.batches(self._num_samples))
            return [float(len(batches)), float(not batches)]

        found, without = internals.added_up(trainer, count)
        if found == 0 or (without and strategies.is_sharded(trainer)):
            msg = (
                f"training has not seen a batch to analyse: samples of {type(self._source).__name__} are its first "
                "training batches. Pass `dataloader=` to HessianSpectrumCallback, a loader or a list of batches, for "
                "others."
            )
            raise NoBatchesError(msg)
        samples = AnalysisSamples(tuple(batches), None, transferred=True)
        if kept.is_complete:
            self._samples = samples
        return samples

    def _is_training_loader(self, trainer: pl.Trainer) -> bool:
        return self._dataloader is None or self._dataloader is trainer.train_dataloader

    def _draw(self, trainer: pl.Trainer, isolation: Isolation) -> AnalysisSamples:
        own = self._dataloader is not None
        is_free = not self._keeps or (own and not share_data(self._source, trainer.train_dataloader))
        with isolation.reading(trainer, trainer.lightning_module):
            return draw_samples(
                self._source,
                self._num_samples,
                max_batches=None if own else trainer.num_training_batches,
                batch_size=self._batch_size,
                batch_weight=self._batch_weight,
                seed=self._seed,
                drawn=self._resumed,
                processes=_processes(trainer),
                padding=strategies.is_sharded(trainer),
                uses_up=is_free and not isinstance(self._dataloader, str),
            )

    def _loader(self, trainer: pl.Trainer) -> Any:
        if self._dataloader is None:
            loaders = training_loader(trainer.train_dataloader)
            # For `draw_samples` a list of batches is one loader, for the Trainer it is several.
            is_one = self._keeps or not is_collection(loaders)
            return loaders if is_one else dataloading.combined_like_training(trainer, loaders)
        if isinstance(self._dataloader, LeftOut):
            self._dataloader.refuse()
        if isinstance(self._dataloader, str):
            with restore_state():  # it may be made only now
                return validation_loader(dataloading.validation_loaders(trainer))
        return self._dataloader


def _processes(trainer: pl.Trainer) -> Processes:
    return Processes(
        trainer.global_rank,
        trainer.world_size,
        agree=lambda work: trainer.strategy.broadcast(internals.together(trainer, work)),
        add=partial(internals.added_up, trainer),
    )
