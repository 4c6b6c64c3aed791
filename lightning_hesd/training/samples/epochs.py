"""Plans of the batches to analyze: the samples of each, its position in an epoch, and their state in checkpoints.

If a DataLoader shuffles, or reads its data in order, samples are drawn at random and grouped into batches. Other
samplers and batch samplers decide which samples share a batch, and how often a sample occurs: their batches are used as
they are.
"""

from __future__ import annotations

import itertools
import math
import random
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

from lightning_hesd.spectra.validation import at_least, check_fields, each, optional
from lightning_hesd.training.compat.dataloading import unwrap_sampler
from lightning_hesd.training.samples.loaders import private_copy
from lightning_hesd.training.samples.positions import spread_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.data import DataLoader

MAX_EPOCH_LENGTH = 1_000_000
"""Maximal number of samples read from a sampler of the user's; the beginning of a longer epoch stands for all of it."""

MAX_PERMUTATION = 2**24
"""Number of samples up to which a few are drawn from a permutation of all; of more, they are drawn directly."""

CONTENT_EVENNESS = 2.0
"""Weight of an even spread over the epoch if the content of a batch may depend on its position."""


@dataclass(frozen=True)
class PlannedBatch:
    """A batch to read.

    Attributes:
        keys: Positions of its samples in the dataset, in the order for the collate function.
        position: Position of the batch in an epoch of training.
    """

    keys: Sequence[Any]
    position: int


class RandomEpoch:
    """An epoch whose samples are drawn at random and grouped into batches."""

    def __init__(self, keys: Sequence[Any], batch_size: int, steps: int, seed: int, *, full: bool) -> None:
        """Take the positions of all samples of an epoch of `steps` training steps; `full`: only full batches."""
        self._keys = keys
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed
        self._full = full
        self._taken = 0
        self._positions: Iterator[int] | None = None

    def take(self, count: int) -> list[PlannedBatch]:
        """Return the next batches, with about `count` samples in total; fewer at the end of the epoch."""
        size = self._batch_size
        end = min(self._taken + (size * math.ceil(count / size) if self._full else count), len(self._keys))
        if self._full:
            end -= (end - self._taken) % size
        order = shuffled(len(self._keys), end, self._seed)[self._taken :]
        self._taken = end
        if not order:
            return []
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        self._positions = self._positions or itertools.cycle(spread_positions(len(parts), self._steps))
        keys = [[plain_key(self._keys[number]) for number in part] for part in parts]
        return [PlannedBatch(*planned) for planned in zip(keys, self._positions, strict=False)]


class SamplerEpoch:
    """An epoch with the batches of a sampler or batch sampler, as they are."""

    def __init__(self, batches: Sequence[Sequence[Any]], batch_size: int | None, steps: float = 1.0) -> None:
        """Take the positions of the samples of all batches, of which those larger than `batch_size` are split.

        A rank trains `steps` steps per batch.
        """
        self._batches = batches
        self._batch_size = batch_size
        self._steps = steps
        self._order: list[int] = []
        self._taken = 0

    def take(self, count: int) -> list[PlannedBatch]:
        """Return the next batches, with about `count` samples in total; fewer at the end of the epoch."""
        total = len(self._batches)
        if not self._order and total:
            mean = sum(map(len, self._batches)) / total or 1.0
            first = spread_positions(math.ceil(count / mean), total, evenness=CONTENT_EVENNESS)
            self._order = [*first, *sorted(set(range(total)) - set(first))]
        found: list[PlannedBatch] = []
        while count > 0 and self._taken < total:
            number = self._order[self._taken]
            keys, size = self._batches[number], self._batch_size or max(len(self._batches[number]), 1)
            chunks = [keys[start : start + size] for start in range(0, len(keys), size)]
            found += [PlannedBatch(chunk, int(number * self._steps)) for chunk in chunks]
            count -= len(keys)
            self._taken += 1
        return found


Epoch = RandomEpoch | SamplerEpoch
"""The batches of an epoch, in an order of which every beginning represents the whole."""


def epochs(
    loader: DataLoader[Any], num_samples: int, *, max_batches: float, batch_size: int | None, seed: int
) -> list[Callable[[], Epoch]]:
    """Return functions that make an epoch of a DataLoader: the first choice, and others in case it cannot be collated.

    They draw from the global random number generators. The loader is one of a map-style dataset, with a batch sampler;
    a rank trains on `max_batches` of its batches per epoch.
    """
    from_sampler = partial(_sampler_epoch, loader, num_samples, max_batches, batch_size)
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        return [from_sampler]
    distributed: Any = batch_sampler.sampler
    sampler, replicas = _undistributed(distributed)
    if type(sampler) not in _ELEMENTARY_SAMPLERS:
        return [from_sampler]

    def random_batches() -> Epoch:
        size = batch_sampler.batch_size
        steps = len(distributed) / size
        steps = min(math.floor(steps) if batch_sampler.drop_last else math.ceil(steps), max_batches)
        keys = _keys(sampler, loader.dataset)
        if type(sampler) is SequentialSampler:
            keys = keys[: int(min(max_batches * replicas * size, len(keys)))]
        full = batch_sampler.drop_last and batch_size is None
        return RandomEpoch(keys, batch_size or size, max(int(steps), 1), seed, full=full)

    if type(sampler) is not SequentialSampler:
        return [random_batches]
    reached = min(max_batches * batch_sampler.batch_size, len(sampler.data_source))
    if replicas == 1 and reached <= num_samples:  # the very batches of each epoch, on which the loss may depend
        return [from_sampler]
    # Perhaps only consecutive samples can be collated, such as those of equal length.
    return [random_batches, from_sampler]


_ELEMENTARY_SAMPLERS = {SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler}
"""PyTorch's own samplers, which do not care which samples share a batch; no subclasses."""


def _keys(sampler: Any, dataset: Any) -> Sequence[Any]:
    """Return the positions of the samples of an epoch, in any order."""
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    if type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement):
        return range(len(sampler.data_source))
    return list(itertools.islice(private_copy(sampler, dataset), MAX_EPOCH_LENGTH))


def _sampler_epoch(
    loader: DataLoader[Any], num_samples: int, max_batches: float, batch_size: int | None
) -> SamplerEpoch:
    """Make the batches of an epoch with a copy of the batch sampler."""
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
    # Without a length it may be endless: then read as many samples as the dataset has.
    most = MAX_EPOCH_LENGTH if length < math.inf else max(num_samples, min(_length(loader.dataset), MAX_EPOCH_LENGTH))
    batches: list[Sequence[Any]] = []
    drawn = 0
    for batch in batch_sampler:
        if len(batches) >= length or drawn >= most:
            break
        batches.append(list(batch))  # some samplers reuse one list
        drawn += len(batch)
    return SamplerEpoch(batches, batch_size, steps / replicas)


def _undistributed(sampler: Any) -> tuple[Any, int]:
    """Return the sampler of all ranks from which a distributed sampler is made, and the number of ranks."""
    own = unwrap_sampler(sampler)
    if own is not sampler:
        return own, sampler.num_replicas
    if type(sampler) is DistributedSampler:
        dataset: Any = sampler.dataset
        return RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset), sampler.num_replicas
    return sampler, 1


def _length(sized: Any) -> float:
    """Return a length; infinite if there is none."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError, OverflowError, ValueError):
        return math.inf


def plain_key(value: Any) -> Any:
    """Return an integer of NumPy or PyTorch as Python's own integer, and other values unchanged."""
    return int(value) if isinstance(value, np.integer | torch.Tensor) else value


def shuffled(total: int, count: int, seed: int) -> list[int]:
    """Return the first `count` numbers of a random order of range(total), which does not depend on `count`."""
    if total <= MAX_PERMUTATION:
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")[:count].tolist()
    return random.Random(seed).sample(range(total), count)


# State in checkpoints -------------------------------------------------------------------------------------------------

SAMPLES = {
    "indices": optional(each(at_least(0))),
    "lengths": each(at_least(0)),
    "positions": each(at_least(0)),
    "num_samples": at_least(1),
}
"""The fields of the state."""


def sample_state(batches: Sequence[PlannedBatch] | None, num_samples: int) -> dict[str, Any]:
    """Return the state of the samples; None for batches that have no positions."""
    indices = [plain_key(key) for batch in batches or () for key in batch.keys]
    # Keys of other types are not written to checkpoints; a resumed run draws them again with the same seed.
    is_plain = batches is not None and all(type(key) is int and key >= 0 for key in indices)
    return {
        "indices": indices if is_plain else None,
        "lengths": [len(batch.keys) for batch in batches or ()],
        "positions": [batch.position for batch in batches or ()],
        "num_samples": num_samples,
    }


def planned_batches(state: dict[str, Any]) -> tuple[PlannedBatch, ...] | None:
    """Return the batches of a state; None if their positions are not in it."""
    if state["indices"] is None:
        return None
    keys = iter(state["indices"])
    return tuple(
        PlannedBatch(list(itertools.islice(keys, length)), position)
        for length, position in zip(state["lengths"], state["positions"], strict=True)
    )


def check_samples(state: object) -> None:
    """Check the state of the samples in a checkpoint.

    Raises:
        ValueError: If it is not a state that `sample_state` returns.
    """
    check_fields(state, SAMPLES, "the samples")
    of: dict[str, Any] = state  # type: ignore[assignment]  # checked above
    if of["indices"] is not None and (
        sum(of["lengths"]) != len(of["indices"]) or len(of["lengths"]) != len(of["positions"])
    ):
        msg = (
            "the samples of the checkpoint are damaged: `lengths` must add up to the number of `indices`, and have as "
            f"many entries as `positions`, got a sum of {sum(of['lengths'])} for {len(of['indices'])} indices, and "
            f"{len(of['lengths'])} entries for {len(of['positions'])} positions."
        )
        raise ValueError(msg)
