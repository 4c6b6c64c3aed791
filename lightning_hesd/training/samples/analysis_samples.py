"""The analysis samples: a fixed subset of what an epoch of training consists of, the same at every analysis.

They are drawn once, at the start of `fit`, without touching the user's dataloader, sampler or any random stream: what
reading uses up is copied, and the attributes of the dataset are put back afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything
from lightning_hesd.training.compat.messages import warn
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.samples.epochs import EVENNESS_OF_CONTENTS, PlannedBatch, epochs
from lightning_hesd.training.samples.positions import spread_positions
from lightning_hesd.training.samples.reading import CollationError, Reader
from lightning_hesd.training.samples.sources import combined, is_addressable, is_collection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.training.samples.epochs import Epoch
    from lightning_hesd.training.samples.reading import ReadBatch


MAX_SURPLUS = 1.5
"""Times as many samples as wanted: of more than these, some batches are left out."""


@dataclass(frozen=True)
class AnalysisSamples:
    """What an analysis runs on.

    Attributes:
        batches: This process's share, as the collate function made them, not yet on the device; a padding batch
            if the share would be empty and must not be.
        drawn: The batches of all processes, by the positions of their samples; None where these have none.
        transferred: Whether the batches are on the device, as training's transfer hooks left them.
    """

    batches: tuple[WeightedBatch, ...]
    drawn: tuple[PlannedBatch, ...] | None
    transferred: bool = False

    @property
    def indices(self) -> tuple[Any, ...] | None:
        """Positions in the dataset of the samples of all processes; None where it has no positions."""
        return None if self.drawn is None else tuple(key for batch in self.drawn for key in batch.keys)


@dataclass(frozen=True)
class Processes:
    """The processes that read samples together.

    Attributes:
        rank: This process.
        size: How many there are.
        agree: Does some work in every process and returns what the first one found.
        add: Does some work in every process and returns the sums of the numbers that they found.
    """

    rank: int = 0
    size: int = 1
    agree: Callable[[Callable[[], Any]], Any] = lambda work: work()
    add: Callable[[Callable[[], list[float]]], list[float]] = lambda work: work()


ALONE = Processes()


def training_loader(loaders: Any) -> Any:
    """Return what `trainer.train_dataloader` holds: a loader, or a collection of them.

    Raises:
        MisconfigurationException: If there is none.
    """
    if loaders is None:
        msg = (
            "the Trainer has no training dataloader, so it is not clear which samples to analyse: pass `dataloader=` "
            "to HessianSpectrumCallback, a loader or a list of batches that `training_step` (or your `loss_fn`) takes."
        )
        raise MisconfigurationException(msg)
    return loaders


def validation_loader(loaders: Any) -> Any:
    """Return the one loader of validation data, given what `trainer.val_dataloaders` holds.

    Raises:
        MisconfigurationException: If there is not exactly one.
    """
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        [loaders] = loaders
    if is_collection(loaders) or loaders is None:
        kind = "no validation dataloader" if loaders is None else f"a {type(loaders).__name__} of them for validation"
        msg = (
            f"the Trainer has {kind}, so `generalization_dataloader='val'` does not say which samples to analyse: pass "
            "a dataloader."
        )
        raise MisconfigurationException(msg)
    return loaders


def draw_samples(
    loader: Any,
    num_samples: int,
    *,
    max_batches: float | None = None,
    batch_size: int | None = None,
    batch_weight: Weigh | None = None,
    seed: int = 0,
    drawn: Sequence[PlannedBatch] | None = None,
    processes: Processes = ALONE,
    padding: bool = False,
    uses_up: bool = False,
) -> AnalysisSamples:
    """Draw the analysis samples and deal their batches to the processes, one after the other.

    Whole batches are dealt, so that every batch is the same for any number of processes.

    Where PyTorch's own samplers shuffle or go through the data one by one, the samples are drawn at random from an
    epoch. The batches of other samplers and batch samplers stay as these make them, and are taken from all over the
    epoch. Streams, and loaders that iterate in a way of their own, give their first batches, read from copies.

    Args:
        loader: A DataLoader, any other iterable of batches, or a collection of loaders, which are combined as Lightning
            does it.
        num_samples: How many samples, or all of an epoch if these are fewer; more if only whole batches will do.
        max_batches: Of an epoch, each process trains on so many batches only; None: all.
        batch_size: Most samples per batch; default: the batches as the loader makes them.
        batch_weight: Weight of a batch; default: its number of samples.
        seed: Seed of the draw, and of whatever is random in the dataset.
        drawn: Draw exactly these batches of a map-style dataset (those of the run that is resumed).
        processes: The processes.
        padding: Whether a process whose share is empty gets the first batch as padding.
        uses_up: Whether a loader that cannot be copied may be iterated itself, which takes its batches away.

    Raises:
        MisconfigurationException: If the loader's samples cannot be read without disturbing training.
        ValueError: If there are no samples.
    """
    loader = combined(loader)
    dataset = getattr(loader, "dataset", None)
    with restore_state(loader, dataset, tensors=False) as restore:
        seed_everything(seed)
        reader = Reader(loader, seed, restore, batch_weight, uses_up=uses_up)
        if is_addressable(loader):
            drawing = _Drawing(reader, num_samples, processes)
            if drawn is not None:
                _check_known(drawn, dataset)
                drawing.read(drawn)
            else:
                limit = math.inf if max_batches is None else max_batches
                drawing.read_any(epochs(loader, num_samples, max_batches=limit, batch_size=batch_size, seed=seed))
            return drawing.result(padding=padding)
        return _streamed(reader.stream(num_samples, batch_size), processes, padding=padding)


class _Drawing:
    """Batches of a map-style dataset, of which every process reads its own."""

    def __init__(self, reader: Reader, num_samples: int, processes: Processes) -> None:
        self._reader = reader
        self._num_samples = num_samples
        self._processes = processes
        self._restart()

    def _restart(self) -> None:
        self._drawn: list[PlannedBatch] = []
        self._sizes: list[float] = []
        self._own: dict[int, ReadBatch] = {}

    def read(self, planned: Sequence[PlannedBatch]) -> None:
        """Read the own ones of some batches, and find out the sizes of all.

        Raises:
            CollationError: If the collate function does not take them.
        """
        processes, first = self._processes, len(self._drawn)
        mine = [pair for pair in enumerate(planned, first) if pair[0] % processes.size == processes.rank]

        failure: list[CollationError] = []

        def found() -> list[float]:
            try:
                read = self._reader.planned(mine)
            except CollationError as error:  # which all processes must know
                failure.append(error)
                return [1.0, *[0.0] * len(planned)]
            self._own |= {number: batch for (number, _), batch in zip(mine, read, strict=True)}
            return [0.0, *(self._own[n].size if n in self._own else 0.0 for n in range(first, first + len(planned)))]

        failures, *sizes = processes.add(found)
        if failures:
            raise failure[0] if failure else CollationError("`collate_fn` fails in another process")
        self._sizes += sizes
        self._drawn += planned

    def read_any(self, ways: Sequence[Callable[[], Epoch]]) -> None:
        """Read as many samples as wanted from the first epoch whose batches the collate function takes.

        Raises:
            CollationError: If it takes none.
        """
        first, *others = ways
        try:
            self._read_from(first)
        except CollationError as error:
            if not others:
                raise
            self._restart()
            try:
                self.read_any(others)
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
            # A collate function may leave samples out; then it takes more of them.
            made_from, found = sum(len(batch.keys) for batch in self._drawn), sum(self._sizes)
            count = math.ceil(missing * made_from / found) if found else max(self._num_samples, made_from)
            planned = self._processes.agree(take)
            if not planned:
                break
            self.read(planned)
            missing = self._num_samples - sum(self._sizes)
        # Or it may add others, or each of the positions may stand for a whole batch.
        found, batches = sum(self._sizes), self._drawn
        if found > MAX_SURPLUS * self._num_samples:
            enough = math.ceil(len(batches) * self._num_samples / found)
            kept = spread_positions(enough, len(batches), evenness=EVENNESS_OF_CONTENTS)
            if len(kept) < len(batches):
                self._restart()
                self.read([batches[number] for number in kept])

    def result(self, *, padding: bool) -> AnalysisSamples:
        """Return the samples.

        Raises:
            ValueError: If there are none.
        """
        if not self._drawn:
            msg = (
                "the training dataset or its sampler is empty: there are no samples to analyse (with `drop_last=True` "
                "an epoch has none either if the samples do not fill a batch)."
            )
            raise ValueError(msg)
        kept = [number for number, size in enumerate(self._sizes) if size > 0]
        _check_any(kept)
        read = [(index, self._own[number], number) for index, number in enumerate(kept) if number in self._own]
        is_padding = padding and not read
        if is_padding:
            [batch] = self._reader.planned([(kept[0], self._drawn[kept[0]])])
            read = [(0, batch, kept[0])]
        batches = [
            b.weighted(b.data, index, self._drawn[number].position, is_padding=is_padding) for index, b, number in read
        ]
        _warn_of_doubts([b for _, b, _ in read])
        return AnalysisSamples(tuple(batches), tuple(self._drawn))


def _streamed(read: Sequence[ReadBatch], processes: Processes, *, padding: bool) -> AnalysisSamples:
    """Deal out batches that every process has read.

    Raises:
        ValueError: If there are none.
    """
    kept = [(position, batch) for position, batch in enumerate(read) if batch.size > 0]
    if not read:
        msg = "the training data are empty: there are no samples to analyse."
        raise ValueError(msg)
    _check_any(kept)
    _warn_of_doubts(read)
    batches = [b.weighted(b.data, index, p) for index, (p, b) in enumerate(kept)]
    own = batches[processes.rank :: processes.size]
    if padding and not own:
        own = [replace(batches[0], is_padding=True)]
    return AnalysisSamples(tuple(own), None)


def _check_any(kept: Sequence[Any]) -> None:
    if not kept:
        msg = "there are no samples to analyse: every batch that was read is None or empty, as `collate_fn` made it."
        raise ValueError(msg)


def _warn_of_doubts(read: Iterable[ReadBatch]) -> None:
    doubts = [batch.doubt for batch in read if batch.doubt is not None]
    if doubts:
        warn(doubts[0])


def _check_known(drawn: Iterable[PlannedBatch], dataset: Any) -> None:
    last = max((key for batch in drawn for key in batch.keys), default=-1)
    if hasattr(dataset, "__len__") and last >= len(dataset):
        msg = (
            f"the samples drawn before reach up to position {last}, but there are {len(dataset)}: these are not the "
            "data of that run. Draw others with another `num_samples`."
        )
        raise MisconfigurationException(msg)
