"""The analysis samples: a fixed subset of an epoch of training, the same in every analysis.

They are drawn once, at the start of `fit`, without changes of the user's dataloader, sampler or random number
generators: objects that reading consumes are copied, and the attributes of the dataset are restored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything
from lightning_hesd.training.compat.messages import warn
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.samples.epochs import CONTENT_EVENNESS, PlannedBatch, epochs
from lightning_hesd.training.samples.loaders import combined, is_addressable
from lightning_hesd.training.samples.positions import spread_positions
from lightning_hesd.training.samples.reading import CollationError, Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.training.samples.epochs import Epoch
    from lightning_hesd.training.samples.reading import ReadBatch


MAX_SURPLUS = 1.5
"""Maximal ratio of drawn to requested samples; above it some batches are left out."""


@dataclass(frozen=True)
class AnalysisSamples:
    """The samples of an analysis.

    Attributes:
        batches: The batches of this rank, as the collate function made them, on the CPU; a padding batch if there would
            be none and one is needed.
        drawn: The plans of the batches of all ranks; None for samples without positions.
        transferred: Whether the batches are on the device, after the transfer hooks of training.
    """

    batches: tuple[WeightedBatch, ...]
    drawn: tuple[PlannedBatch, ...] | None
    transferred: bool = False

    @property
    def indices(self) -> tuple[Any, ...] | None:
        """Positions in the dataset of the samples of all ranks; None for samples without positions."""
        return None if self.drawn is None else tuple(key for batch in self.drawn for key in batch.keys)


def draw_samples(
    loader: Any,
    num_samples: int,
    *,
    max_batches: float | None = None,
    batch_size: int | None = None,
    batch_weight: Weigh | None = None,
    seed: int = 0,
    drawn: Sequence[PlannedBatch] | None = None,
    collectives: Collectives = LOCAL,
    padding: bool = False,
    may_consume: bool = False,
) -> AnalysisSamples:
    """Draw the analysis samples, and distribute their batches over the ranks in turn.

    Whole batches are distributed, so that every batch is the same for every number of ranks.

    If PyTorch's own samplers shuffle or read the data in order, samples are drawn at random from an epoch. Batches of
    other samplers and batch samplers are used as they are, spread over the epoch. Of streams, and of loaders with their
    own way of iterating, the first batches are read, from copies.

    Args:
        loader: A DataLoader, another iterable of batches, or a collection of loaders, which is combined as in
            Lightning.
        num_samples: Number of samples; all of an epoch if it has fewer; more if batches cannot be split.
        max_batches: Number of batches per epoch on which each rank trains; None: all.
        batch_size: Maximal number of samples per batch; default: the batches of the loader.
        batch_weight: Weight of a batch; default: its number of samples.
        seed: Seed of the draw, and of random numbers in the dataset.
        drawn: Batches of a map-style dataset to read, those of the resumed run; None: draw some.
        collectives: Communication between the ranks that the batches are distributed to.
        padding: Whether a rank without batches gets the first batch as a padding batch.
        may_consume: Whether a loader that cannot be copied may be iterated itself, which consumes its batches.

    Raises:
        MisconfigurationException: If the loader's samples cannot be read without disturbing training.
        ValueError: If there are no samples.
    """
    loader = combined(loader)
    dataset = getattr(loader, "dataset", None)
    with restore_state(loader, dataset, tensors=False) as restore:
        seed_everything(seed)
        reader = Reader(loader, seed, restore, batch_weight, may_consume=may_consume)
        if is_addressable(loader):
            draw = _DatasetDraw(reader, num_samples, collectives)
            if drawn is not None:
                _check_known(drawn, dataset)
                draw.read(drawn)
            else:
                limit = math.inf if max_batches is None else max_batches
                draw.read_first(epochs(loader, num_samples, max_batches=limit, batch_size=batch_size, seed=seed))
            return draw.result(padding=padding)
        return _streamed(reader.stream(num_samples, batch_size), collectives, padding=padding)


class _DatasetDraw:
    """Batches of a map-style dataset, of which every rank reads its own."""

    def __init__(self, reader: Reader, num_samples: int, collectives: Collectives) -> None:
        self._reader = reader
        self._num_samples = num_samples
        self._collectives = collectives
        self._restart()

    def _restart(self) -> None:
        self._drawn: list[PlannedBatch] = []
        self._sizes: list[float] = []
        self._own: dict[int, ReadBatch] = {}

    def read(self, planned: Sequence[PlannedBatch]) -> None:
        """Read this rank's share of some batches, and get the sizes of all.

        Raises:
            CollationError: If the collate function fails for one.
        """
        ranks, first = self._collectives, len(self._drawn)
        mine = [pair for pair in enumerate(planned, first) if pair[0] % ranks.size == ranks.rank]

        failure: list[CollationError] = []

        def found() -> list[float]:
            try:
                read = self._reader.planned(mine)
            except CollationError as error:  # reported to all ranks
                failure.append(error)
                return [1.0, *[0.0] * len(planned)]
            self._own |= {number: batch for (number, _), batch in zip(mine, read, strict=True)}
            return [0.0, *(self._own[n].size if n in self._own else 0.0 for n in range(first, first + len(planned)))]

        failures, *sizes = ranks.sum_values(ranks.run_together(found))
        if failures:
            raise failure[0] if failure else CollationError("`collate_fn` fails on another rank")
        self._sizes += sizes
        self._drawn += planned

    def read_first(self, makers: Sequence[Callable[[], Epoch]]) -> None:
        """Read the requested number of samples from the first epoch that can be collated.

        Raises:
            CollationError: If none can.
        """
        first, *others = makers
        try:
            self._read_from(first)
        except CollationError as error:
            if not others:
                raise
            self._restart()
            try:
                self.read_first(others)
            except CollationError:
                raise error from error.__cause__

    def _read_from(self, make_epoch: Callable[[], Epoch]) -> None:
        epoch: list[Epoch] = []

        def take() -> list[PlannedBatch]:
            if not epoch:
                epoch.append(make_epoch())
            return epoch[0].take(count)

        missing = float(self._num_samples)
        while missing > 0:
            # If the collate function drops samples, more of them are needed.
            made_from, found = sum(len(batch.keys) for batch in self._drawn), sum(self._sizes)
            count = math.ceil(missing * made_from / found) if found else max(self._num_samples, made_from)
            planned = self._collectives.broadcast(self._collectives.run_together(take))
            if not planned:
                break
            self.read(planned)
            missing = self._num_samples - sum(self._sizes)
        # It may also add samples, or each position may be that of a whole batch.
        found, batches = sum(self._sizes), self._drawn
        if found > MAX_SURPLUS * self._num_samples:
            enough = math.ceil(len(batches) * self._num_samples / found)
            selected = spread_positions(enough, len(batches), evenness=CONTENT_EVENNESS)
            if len(selected) < len(batches):
                self._restart()
                self.read([batches[number] for number in selected])

    def result(self, *, padding: bool) -> AnalysisSamples:
        """Return the samples.

        Raises:
            ValueError: If there are no samples.
        """
        if not self._drawn:
            msg = (
                "there are no samples to analyze, because the training dataset or its sampler is empty (or, with "
                "`drop_last=True`, has fewer samples than a batch): pass another `dataloader=`."
            )
            raise ValueError(msg)
        filled = [number for number, size in enumerate(self._sizes) if size > 0]
        _check_any(filled)
        read = [(index, self._own[number], number) for index, number in enumerate(filled) if number in self._own]
        is_padding = padding and not read
        if is_padding:
            [batch] = self._reader.planned([(filled[0], self._drawn[filled[0]])])
            read = [(0, batch, filled[0])]
        batches = [
            b.weighted(b.data, index, self._drawn[number].position, is_padding=is_padding) for index, b, number in read
        ]
        _warn_of_sizes([b for _, b, _ in read])
        return AnalysisSamples(tuple(batches), tuple(self._drawn))


def _streamed(read: Sequence[ReadBatch], collectives: Collectives, *, padding: bool) -> AnalysisSamples:
    """Distribute batches that every rank has read.

    Raises:
        ValueError: If there are no batches.
    """
    filled = [(position, batch) for position, batch in enumerate(read) if batch.size > 0]
    if not read:
        msg = "there are no samples to analyze, because the training data are empty: pass another `dataloader=`."
        raise ValueError(msg)
    _check_any(filled)
    _warn_of_sizes(read)
    batches = [b.weighted(b.data, index, p) for index, (p, b) in enumerate(filled)]
    own = batches[collectives.rank :: collectives.size]
    if padding and not own:
        own = [replace(batches[0], is_padding=True)]
    return AnalysisSamples(tuple(own), None)


def _check_any(filled: Sequence[Any]) -> None:
    if not filled:
        msg = (
            "there are no samples to analyze, because `collate_fn` returned None or an empty batch in all cases: pass "
            "another `dataloader=`."
        )
        raise ValueError(msg)


def _warn_of_sizes(read: Iterable[ReadBatch]) -> None:
    warnings = [batch.size_warning for batch in read if batch.size_warning is not None]
    if warnings:
        warn(warnings[0])


def _check_known(drawn: Iterable[PlannedBatch], dataset: Any) -> None:
    last = max((key for batch in drawn for key in batch.keys), default=-1)
    if hasattr(dataset, "__len__") and last >= len(dataset):
        msg = (
            f"the resumed run analyzed samples up to position {last} of its dataset, but this one has {len(dataset)} "
            "samples: resume with the data of that run, or draw other samples with another `num_samples`."
        )
        raise MisconfigurationException(msg)
