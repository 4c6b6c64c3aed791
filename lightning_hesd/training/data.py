"""The analysis samples: a fixed subset of the training samples, the same at every analysis.

They are drawn once, at the start of `fit`, without touching the user's dataloader, sampler or any random stream: the
dataset is read through a dataloader of our own, and its attributes are put back afterwards.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from lightning_hesd.numerics.batches import WeightedBatch
from lightning_hesd.numerics.batches import batch_size as infer_batch_size
from lightning_hesd.numerics.snapshot import preserved, seed_everything
from lightning_hesd.training._lightning import unwrap_sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

DEFAULT_BATCH_SIZE = 64
"""Where neither the user nor the dataloader has one."""


@dataclass(frozen=True)
class AnalysisSamples:
    """What an analysis runs on.

    Attributes:
        batches: This process's share, as the collate function made them, not yet on the device; a spare one if it
            would be empty and must not be.
        indices: Positions in the dataset of the samples of all processes; None where it has no positions.
    """

    batches: tuple[WeightedBatch, ...]
    indices: tuple[int, ...] | None


def training_loader(loaders: Any) -> Any:
    """Return the one loader the analysis can draw from, given what `trainer.train_dataloader` holds.

    Raises:
        MisconfigurationException: If there is not exactly one.
    """
    if isinstance(loaders, dict | list | tuple | CombinedLoader) or loaders is None:
        kind = "no training dataloader" if loaders is None else f"a {type(loaders).__name__} of dataloaders"
        msg = (
            f"the Trainer has {kind}, so it is not clear which samples to analyse: pass `dataloader=` to "
            "HessianSpectrumCallback, a dataloader whose batches `training_step` (or your `loss_fn`) takes."
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
    if isinstance(loaders, dict | list | tuple | CombinedLoader) or loaders is None:
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
    batch_weight: Callable[[Any], float] | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    spare: bool = False,
) -> AnalysisSamples:
    """Draw the analysis samples and deal their batches to the processes, one after the other.

    Whole batches are dealt, so that every batch is the same for any number of processes.

    Args:
        loader: A DataLoader, or any other iterable of batches.
        num_samples: How many samples, or all if there are fewer. They are drawn at random from the sampler's indices of
            a map-style dataset, as the sampler draws them (with repetition only if it does so itself); they are the
            first ones of an iterable dataset, and the first whole batches of any other iterable.
        max_batches: Of a sequential sampler only so many batches are trained on; None: all.
        batch_size: Samples per batch; default: the loader's.
        batch_weight: Weight of a batch; default: its number of samples.
        seed: Seed of the draw, and of whatever is random in the dataset.
        indices: Draw exactly these positions of a map-style dataset (those of the run that is resumed).
        rank: This process.
        world_size: Number of processes.
        spare: Whether a process whose share is empty gets the first batch as a spare one.

    Raises:
        MisconfigurationException: If the loader's samples cannot be read without disturbing training.
        ValueError: If there are no samples.
    """
    if isinstance(loader, dict):
        training_loader(loader)

    def dealt(share: slice) -> tuple[tuple[WeightedBatch, ...], list[int] | None]:
        return _dealt(
            loader,
            num_samples,
            share,
            max_batches=max_batches,
            batch_size=batch_size,
            batch_weight=batch_weight,
            seed=seed,
            indices=indices,
        )

    weighted, chosen = dealt(slice(rank, None, world_size))
    if spare and not weighted:
        first, _ = dealt(slice(0, 1))
        weighted = tuple(replace(batch, is_spare=True) for batch in first)
    if chosen is not None and not chosen:
        msg = "the training dataset or its sampler is empty: there are no samples to analyse."
        raise ValueError(msg)
    return AnalysisSamples(weighted, None if chosen is None else tuple(chosen))


def _dealt(
    loader: Any,
    num_samples: int,
    share: slice,
    *,
    max_batches: float | None,
    batch_size: int | None,
    batch_weight: Callable[[Any], float] | None,
    seed: int,
    indices: Sequence[int] | None,
) -> tuple[tuple[WeightedBatch, ...], list[int] | None]:
    """Return the batches of a share, and the positions of the samples of all of them."""
    dataset = getattr(loader, "dataset", None)
    chosen: list[int] | None = None
    with preserved(loader, dataset, tensors=False) as restore:
        seed_everything(seed)
        if (
            isinstance(loader, DataLoader)
            and not isinstance(dataset, IterableDataset)
            and loader.batch_sampler is not None
        ):
            chosen = (
                _known(indices, dataset) if indices is not None else _choose(loader, num_samples, seed, max_batches)
            )
            batches = _indexed_batches(loader, chosen, batch_size, seed, share=share, restore=restore)
        else:
            streamed = _streamed_batches(loader, num_samples, batch_size)
            batches = itertools.islice(streamed, share.start, share.stop, share.step)
        step = share.step or 1
        weighted = tuple(
            WeightedBatch(data, batch_weight(data) if batch_weight else float(size), share.start + position * step)
            for position, (data, size) in enumerate(batches)
        )
    return weighted, chosen


def _known(indices: Sequence[int], dataset: Any) -> list[int]:
    if max(indices, default=-1) >= len(dataset):
        msg = (
            f"the samples drawn before reach up to position {max(indices)}, but there are {len(dataset)}: these are "
            "not the data of that run. Draw others with another `num_samples`."
        )
        raise MisconfigurationException(msg)
    return list(indices)


def _choose(loader: DataLoader[Any], num_samples: int, seed: int, max_batches: float | None) -> list[int]:
    """Choose positions among those the loader's sampler can draw."""
    generator = torch.Generator().manual_seed(seed)
    sampler = unwrap_sampler(_sampler(loader))
    if isinstance(sampler, WeightedRandomSampler):
        weights = sampler.weights
        count = min(num_samples, len(weights) if sampler.replacement else int((weights > 0).sum()))
        return torch.multinomial(weights, count, sampler.replacement, generator=generator).tolist()
    population = _population(sampler, loader)
    if isinstance(sampler, SequentialSampler) and max_batches is not None and loader.batch_size:
        population = population[: int(min(max_batches * loader.batch_size, len(population)))]
    order = torch.randperm(len(population), generator=generator)[:num_samples]
    return [population[position] for position in order.tolist()]


def _sampler(loader: DataLoader[Any]) -> Any:
    """Return what decides which samples the loader yields."""
    batch_sampler = loader.batch_sampler
    # A subclass that makes batches in its own way may leave out what its sampler offers.
    if isinstance(batch_sampler, BatchSampler) and type(batch_sampler).__iter__ is BatchSampler.__iter__:
        return batch_sampler.sampler
    return batch_sampler


def _population(sampler: Any, loader: DataLoader[Any]) -> Sequence[int]:
    """Return the positions a sampler draws from, ascending where they must be found by drawing."""
    if (own := getattr(sampler, "indices", None)) is not None:
        return [int(index) for index in own]
    dataset: Any = loader.dataset
    if type(sampler).__module__.split(".")[0] in {"torch", "lightning"} and not isinstance(sampler, BatchSampler):
        # Sequential, random and distributed samplers run through the whole of what they were made for.
        return range(len(getattr(sampler, "data_source", dataset)))
    drawn: set[int] = set()
    for position in itertools.islice(_own_copy(sampler), 10 * len(dataset)):  # a sampler may be endless
        drawn.update(position if isinstance(position, list | tuple) else [position])
    return sorted(int(index) for index in drawn)


def _indexed_batches(
    loader: DataLoader[Any],
    chosen: Sequence[int],
    batch_size: int | None,
    seed: int,
    *,
    share: slice,
    restore: Callable[[], None],
) -> Iterator[tuple[Any, int]]:
    size = batch_size or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or DEFAULT_BATCH_SIZE
    batches = [list(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    # Without a generator of its own even a DataLoader without workers draws from the global stream.
    own: DataLoader[Any] = DataLoader(
        loader.dataset, batch_sampler=batches[share], collate_fn=loader.collate_fn, generator=torch.Generator()
    )
    iterator = iter(own)
    for number in range(len(batches))[share]:
        restore()  # the dataset's own generators, which in one process have served more batches than in another
        seed_everything(seed + number)  # the same augmentation for any number of processes
        yield next(iterator), len(batches[number])


def _streamed_batches(loader: Any, num_samples: int, batch_size: int | None) -> Iterator[tuple[Any, int]]:
    """Yield batches from the beginning of a stream that cannot be addressed by position."""
    stream: Iterable[Any]
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        stream = DataLoader(
            _Head(_own_copy(loader.dataset), num_samples),
            batch_size=batch_size or loader.batch_size,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),
        )
    elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        # Each of the sampler's positions stands for a whole batch.
        stream = DataLoader(
            loader.dataset,
            batch_size=None,
            sampler=_own_copy(loader.sampler),
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),
        )
    elif isinstance(loader, DataLoader):  # the dataset yields whole batches
        stream = DataLoader(
            _own_copy(loader.dataset), batch_size=None, collate_fn=loader.collate_fn, generator=torch.Generator()
        )
    elif isinstance(loader, CombinedLoader):
        stream = (batch for batch, _, _ in iter(_own_copy(loader)))
    else:
        stream = _own_copy(loader)
    taken = 0
    for batch in stream:
        size = round(infer_batch_size(batch))
        yield batch, size
        taken += size
        if taken >= num_samples:
            return


def _own_copy(source: Any) -> Any:
    """Copy a stream, so that reading it does not use up what training is to read.

    Raises:
        MisconfigurationException: If it cannot be copied.
    """
    if isinstance(source, list | tuple):
        return source
    try:
        return copy.deepcopy(source)
    except Exception as error:
        msg = (
            f"{type(source).__name__} cannot be copied ({error}), and reading samples for the analysis from the "
            "original could take them away from training: pass `dataloader=` to HessianSpectrumCallback."
        )
        raise MisconfigurationException(msg) from error


class _Head(IterableDataset[Any]):
    """The first samples of an iterable dataset."""

    def __init__(self, dataset: IterableDataset[Any], length: int) -> None:
        self.dataset = dataset
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.dataset, self.length)
