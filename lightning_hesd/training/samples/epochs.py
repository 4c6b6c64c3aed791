"""Which batches of an epoch are analysed, and which positions they have in it.

Where a DataLoader shuffles, or goes through its data one by one, any samples will do: they are drawn at random, and put
together to batches. Everything else decides for itself which samples meet in a batch, and how often one comes: of a
sampler or batch sampler that is not PyTorch's own, whole batches are taken as it makes them in an epoch.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from lightning_hesd.training.compat.dataloading import unwrap_sampler
from lightning_hesd.training.samples.copies import private_copy
from lightning_hesd.training.samples.positions import spread_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.utils.data import DataLoader

MAX_EPOCH_LENGTH = 1_000_000
"""Samples: of a longer epoch of a sampler of the user's own, the beginning is taken for the whole."""

MAX_PERMUTATION = 2**24
"""Of more samples than these a few are drawn without putting all of them into an order."""

EVENNESS_OF_CONTENTS = 2.0
"""Weight of an even spread where the position of a batch may decide what is in it."""


@dataclass(frozen=True)
class PlannedBatch:
    """A batch that is to be read.

    Attributes:
        keys: Positions of its samples in the dataset, in the order in which the collate function gets them.
        position: Its position in an epoch of training.
    """

    keys: Sequence[Any]
    position: int


class Epoch(ABC):
    """The batches of an epoch, in an order of which every beginning stands for the whole."""

    @abstractmethod
    def take(self, count: int) -> list[PlannedBatch]:
        """Return the next batches, of about so many samples together; fewer if the epoch ends."""


class MixedEpoch(Epoch):
    """An epoch in which any samples may meet in a batch."""

    def __init__(self, keys: Sequence[Any], batch_size: int, steps: int, seed: int, *, whole: bool) -> None:
        """Prepare.

        Args:
            keys: Positions in the dataset of all samples of the epoch.
            batch_size: Samples per batch.
            steps: Number of training steps in an epoch.
            seed: Seed of the order.
            whole: Whether all batches must be full.
        """
        self._keys = keys
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed
        self._whole = whole
        self._taken, self._batches = 0, 0
        self._positions: list[int] = []

    @override
    def take(self, count: int) -> list[PlannedBatch]:
        size = self._batch_size
        end = min(self._taken + (size * math.ceil(count / size) if self._whole else count), len(self._keys))
        if self._whole:
            end -= (end - self._taken) % size
        order = shuffled(len(self._keys), end, self._seed)[self._taken :]
        self._taken = end
        if not order:
            return []
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        self._positions = self._positions or spread_positions(len(parts), self._steps)
        return [
            PlannedBatch([plain_key(self._keys[number]) for number in part], self._next_position()) for part in parts
        ]

    def _next_position(self) -> int:
        self._batches += 1
        return self._positions[(self._batches - 1) % len(self._positions)]


class ComposedEpoch(Epoch):
    """An epoch whose batches are made by a sampler of the user's own, and stay as they are."""

    def __init__(self, batches: Sequence[Sequence[Any]], batch_size: int | None, steps: float = 1.0) -> None:
        """Prepare.

        Args:
            batches: All batches of the epoch, each the positions of its samples in the dataset.
            batch_size: Most samples per batch: larger ones are taken in pieces. None: they stay whole.
            steps: Steps that a process trains for one of the batches.
        """
        self._batches = batches
        self._batch_size = batch_size
        self._steps = steps
        self._order: list[int] = []
        self._taken = 0

    @override
    def take(self, count: int) -> list[PlannedBatch]:
        total = len(self._batches)
        if not self._order and total:
            mean = sum(map(len, self._batches)) / total or 1.0
            first = spread_positions(math.ceil(count / mean), total, evenness=EVENNESS_OF_CONTENTS)
            self._order = [*first, *sorted(set(range(total)) - set(first))]
        found: list[PlannedBatch] = []
        while count > 0 and self._taken < total:
            number = self._order[self._taken]
            keys, size = self._batches[number], self._batch_size or max(len(self._batches[number]), 1)
            pieces = [keys[start : start + size] for start in range(0, len(keys), size)]
            found += [PlannedBatch(piece, int(number * self._steps)) for piece in pieces]
            count -= len(keys)
            self._taken += 1
        return found


def epochs(
    loader: DataLoader[Any], num_samples: int, *, max_batches: float, batch_size: int | None, seed: int
) -> list[Callable[[], Epoch]]:
    """Return functions that make an epoch of a DataLoader: the one to take, and others in case that cannot be read.

    Call them where the global generators may be used.

    Args:
        loader: The loader, of a map-style dataset, with a batch sampler.
        num_samples: How many samples are wanted.
        max_batches: So many batches are trained on, by one process.
        batch_size: Samples per batch; None: those of the loader.
        seed: Seed of the order.
    """
    composed = partial(_composed, loader, num_samples, max_batches, batch_size)
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        return [composed]
    distributed: Any = batch_sampler.sampler
    sampler, replicas = _undistributed(distributed)
    if type(sampler) not in _MIXING:
        return [composed]

    def mixed() -> Epoch:
        size = batch_sampler.batch_size
        steps = len(distributed) / size
        steps = min(math.floor(steps) if batch_sampler.drop_last else math.ceil(steps), max_batches)
        keys = _keys(sampler, loader.dataset)
        if type(sampler) is SequentialSampler:
            keys = keys[: int(min(max_batches * replicas * size, len(keys)))]
        whole = batch_sampler.drop_last and batch_size is None
        return MixedEpoch(keys, batch_size or size, max(int(steps), 1), seed, whole=whole)

    # Samples that follow each other may be such as can be put together to a batch, and others not.
    return [mixed, composed] if type(sampler) is SequentialSampler else [mixed]


_MIXING = {SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler}
"""Samplers of PyTorch's own, without regard to which samples meet in a batch; no subclasses."""


def _keys(sampler: Any, dataset: Any) -> Sequence[Any]:
    """Return the positions of the samples of an epoch, in any order."""
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    if type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement):
        return range(len(sampler.data_source))
    return list(itertools.islice(private_copy(sampler, dataset), MAX_EPOCH_LENGTH))


def _composed(loader: DataLoader[Any], num_samples: int, max_batches: float, batch_size: int | None) -> ComposedEpoch:
    """Let a copy of the batch sampler make the batches of an epoch."""
    batch_sampler = private_copy(loader.batch_sampler, loader.dataset)
    sampler, replicas = _undistributed(getattr(batch_sampler, "sampler", None))
    if replicas > 1:
        batch_sampler.sampler = sampler
    steps = 1.0
    if batch_size is not None and type(batch_sampler) is BatchSampler:
        steps = batch_size / batch_sampler.batch_size
        batch_sampler.batch_size, batch_sampler.drop_last = batch_size, False
        max_batches = math.ceil(max_batches / steps) if max_batches < math.inf else max_batches
    length = min(_length(batch_sampler), max_batches * replicas)
    # Without a length it may be endless: as many samples as there are, then.
    most = MAX_EPOCH_LENGTH if length < math.inf else max(num_samples, min(_length(loader.dataset), MAX_EPOCH_LENGTH))
    batches: list[Sequence[Any]] = []
    drawn = 0
    for batch in batch_sampler:
        if len(batches) >= length or drawn >= most:
            break
        batches.append(list(batch))  # some samplers use one list for all of them
        drawn += len(batch)
    return ComposedEpoch(batches, batch_size, steps / replicas)


def _undistributed(sampler: Any) -> tuple[Any, int]:
    """Return the sampler that a distributed one is made from, of all processes together, and their number."""
    own = unwrap_sampler(sampler)
    if own is not sampler:
        return own, sampler.num_replicas
    if type(sampler) is DistributedSampler:
        dataset: Any = sampler.dataset
        return RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset), sampler.num_replicas
    return sampler, 1


def _length(sized: Any) -> float:
    """Return a length, infinite where there is none."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError, OverflowError, ValueError):
        return math.inf


def plain_key(value: Any) -> Any:
    """Return a position as Python's own integer if it is one of another library."""
    return int(value) if isinstance(value, np.integer | torch.Tensor) else value


def shuffled(total: int, count: int, seed: int) -> list[int]:
    """Return the first numbers of a random order of range(total); of another `count` they are the same."""
    if total <= MAX_PERMUTATION:
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return random.Random(seed).sample(range(total), count)
