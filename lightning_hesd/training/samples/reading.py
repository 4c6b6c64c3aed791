"""Reading of batches from the data of a loader, in this process or through workers.

Each batch of a map-style dataset is read from the same state of the dataset and of the random number generators, on
every rank and in any order: augmentation is the same for every number of ranks.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_hesd.numerics.inputs import batches
from lightning_hesd.numerics.inputs.batches import WeightedBatch, copied
from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything
from lightning_hesd.training.compat.namespaces import FABRIC, lightning_types
from lightning_hesd.training.samples.loaders import NotCopiedError, is_combined, is_plain, private_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lightning_hesd.numerics.inputs.batches import Weigh
    from lightning_hesd.training.samples.epochs import PlannedBatch

    Collated = tuple[Any, int | None]
    """A batch, and the number of positions or items that it was made from, if known."""

T = TypeVar("T")


class CollationError(RuntimeError):
    """The collate function fails for some samples."""


@dataclass(frozen=True)
class ReadBatch:
    """A batch of the collate function.

    Attributes:
        data: The batch.
        size: Number of samples; 0 for a batch that training would skip.
        weight: Weight of the batch in the mean loss.
        size_warning: Reason why the size is uncertain; None if it is certain.
    """

    data: Any
    size: float
    weight: float
    size_warning: str | None = None

    def weighted(self, data: Any, index: int, position: int, *, is_padding: bool = False) -> WeightedBatch:
        """Return the batch as a weighted batch of the analysis, with other data."""
        return WeightedBatch(data, self.weight, index, position=position, size=self.size, is_padding=is_padding)


class Reader:
    """Reads batches of a loader."""

    def __init__(
        self,
        loader: Any,
        seed: int,
        restore: Callable[[], None],
        batch_weight: Weigh | None,
        *,
        may_consume: bool = False,
    ) -> None:
        """Prepare to read a DataLoader, or any other iterable of batches.

        The seed is that of random numbers in the dataset, and `restore` restores the state of the dataset. With
        `may_consume`, a loader that cannot be copied may be iterated itself.
        """
        self._loader = loader
        self._may_consume = may_consume
        self._seed = seed
        self._restore = restore
        self._batch_weight = batch_weight

    def planned(self, planned: Sequence[tuple[int, PlannedBatch]]) -> list[ReadBatch]:
        """Read batches of a map-style dataset, given with their numbers, which determine the seeds."""
        loader = self._loader
        source = _BatchDataset(loader.dataset, loader.collate_fn, self._seed)
        items = [(number, batch.keys) for number, batch in planned]

        def in_process() -> list[Any]:
            return [source.read(item, self._restore) for item in items]

        def through_workers() -> list[Any]:
            init = functools.partial(_init_worker, loader.worker_init_fn)
            workers = min(loader.num_workers, len(items))
            own = self._worker_loader(source, sampler=items, collate_fn=_unchanged, init=init, workers=workers)
            return list(_read(own))

        made = self._in_process_or_workers(in_process, through_workers) if items else []
        return [measure_batch(data, len(keys), self._batch_weight) for data, (_, keys) in zip(made, items, strict=True)]

    def stream(self, num_samples: int, batch_size: int | None) -> list[ReadBatch]:
        """Read the first batches of a loader without positions, up to a total number of samples.

        Raises:
            NotCopiedError: If the loader cannot be copied, and may not be iterated itself.
        """

        def in_process() -> list[ReadBatch]:
            taken: list[ReadBatch] = []
            made = self._collated(batch_size, lambda: num_samples - sum(batch.size for batch in taken))
            return self._take(num_samples, made, taken)

        def through_workers() -> list[ReadBatch]:
            return self._take(num_samples, self._collated_by_workers(batch_size), [])

        try:
            return self._in_process_or_workers(in_process, through_workers)
        except NotCopiedError:
            if not self._may_consume:
                raise
            self._restore()
            return self._take(num_samples, ((batch, None) for batch in _read(self._loader)), [])

    def _take(self, num_samples: int, made: Iterable[Collated], taken: list[ReadBatch]) -> list[ReadBatch]:
        for data, made_from in made:
            taken.append(measure_batch(data, made_from, self._batch_weight))
            if sum(batch.size for batch in taken) >= num_samples:
                break
        return taken

    def _collated(self, batch_size: int | None, wanted: Callable[[], float]) -> Iterator[Collated]:
        """Yield batches, read in this process from copies of the objects that reading consumes."""
        loader = self._loader
        if not is_plain(loader):
            copy = private_copy(loader, getattr(loader, "dataset", None))
            yield from ((batch, None) for batch in _batches(copy, iter(copy)))
        elif not isinstance(loader.dataset, IterableDataset):  # each key of the sampler is for a whole batch
            for key in private_copy(loader.sampler, loader.dataset):
                yield loader.collate_fn(loader.dataset[key]), len(key) if isinstance(key, list | tuple) else None
        elif loader.batch_size is None:  # the dataset yields whole batches
            yield from ((loader.collate_fn(batch), None) for batch in private_copy(loader.dataset))
        else:
            items, most = iter(private_copy(loader.dataset)), batch_size or loader.batch_size
            whole = loader.drop_last and batch_size is None
            while chunk := list(itertools.islice(items, most if whole else min(most, math.ceil(wanted())))):
                if not whole or len(chunk) == most:
                    yield loader.collate_fn(chunk), len(chunk)

    def _collated_by_workers(self, batch_size: int | None) -> Iterator[Collated]:
        loader = self._loader
        if not is_plain(loader):
            yield from ((batch, None) for batch in _read(private_copy(loader, loader.dataset, in_process=False)))
            return
        how: dict[str, Any] = {"init": loader.worker_init_fn, "workers": loader.num_workers}
        how["collate_fn"] = loader.collate_fn
        made_from = None
        if not isinstance(loader.dataset, IterableDataset):
            how["sampler"] = private_copy(loader.sampler, loader.dataset)
        else:
            private_copy(loader.dataset)  # raises for objects that workers would share with training: a queue, a socket
            if loader.batch_size is not None:
                how["drop_last"] = loader.drop_last and batch_size is None
                made_from = how["batch_size"] = batch_size or loader.batch_size
        yield from ((batch, made_from) for batch in _read(self._worker_loader(loader.dataset, **how)))

    def _worker_loader(self, dataset: Any, *, init: Any, workers: int, **how: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            **{"batch_size": None, **how},
            num_workers=max(workers, 1),
            worker_init_fn=init,
            multiprocessing_context=self._loader.multiprocessing_context,
            timeout=self._loader.timeout,
            generator=torch.Generator().manual_seed(self._seed),
        )

    def _in_process_or_workers(self, in_process: Callable[[], T], through_workers: Callable[[], T]) -> T:
        """Read in this process; through workers if training does so and reading in this process fails.

        A loader with its own `worker_init_fn` is always read through workers.
        """
        if not getattr(self._loader, "num_workers", 0) or not isinstance(self._loader, DataLoader):
            return in_process()
        if _has_own_init(self._loader):
            return through_workers()
        try:
            return in_process()
        except Exception as error:  # noqa: BLE001 - raised below if the workers fail, too
            self._restore()
            try:
                return through_workers()
            except Exception as again:
                raise error from again


def measure_batch(data: Any, made_from: int | None, batch_weight: Weigh | None) -> ReadBatch:
    """Return a batch with its size and weight, given the number of positions or items it was made from, if known."""
    if data is None:  # Lightning skips it
        return ReadBatch(data, 0.0, 0.0)
    return ReadBatch(data, *batches.size_and_weight(data, batch_weight, made_from))


def _batches(loader: Any, iterator: Iterator[Any]) -> Iterator[Any]:
    """Return the batches of an iterator over a loader, or over Lightning's combination of loaders."""
    return (batch for batch, _, _ in iterator) if is_combined(loader) else iterator


def _has_own_init(loader: DataLoader[Any]) -> bool:
    init: Any = loader.worker_init_fn
    return init is not None and getattr(init, "func", init) not in lightning_types(
        "utilities.seed.pl_worker_init_function", of=FABRIC
    )


def _read(loader: Any) -> Iterator[Any]:
    """Yield the batches of a loader with workers, copied to this process, and end workers that are not persistent."""
    iterator = iter(loader)
    try:
        yield from map(copied, _batches(loader, iterator))
    finally:
        end = getattr(iterator, "_shutdown_workers", None)
        if end is not None and getattr(loader, "_iterator", None) is not iterator:
            end()


class _BatchDataset(Dataset[Any]):
    """A dataset of whole batches, whose keys are the number of a batch and the keys of its samples."""

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], seed: int) -> None:
        self.dataset = dataset
        self._collate_fn = collate_fn
        self._seed = seed
        self._context: Any = None
        self._restore: Callable[[], None] | None = None

    def __getitem__(self, item: tuple[int, Sequence[Any]]) -> Any:
        """Read a batch in a worker."""
        if self._restore is None:  # for the first time in this worker; it is never left
            self._context = restore_state(self.dataset, self._collate_fn, tensors=False)
            self._restore = self._context.__enter__()
        return self.read(item, self._restore)

    def read(self, item: tuple[int, Sequence[Any]], restore: Callable[[], None]) -> Any:
        number, keys = item
        restore()
        seed_everything(self._seed + number)
        if getattr(self.dataset, "__getitems__", None):
            samples = self.dataset.__getitems__(keys)
        else:
            samples = [self.dataset[key] for key in keys]
        try:
            return self._collate_fn(samples)
        except Exception as error:
            msg = f"`collate_fn` fails for a batch of {len(keys)} samples ({type(error).__name__}: {error})"
            raise CollationError(msg) from error


def _init_worker(own: Callable[[int], None] | None, worker_id: int) -> None:
    """Call the `worker_init_fn` of the loader with the original dataset in the worker info."""
    info: Any = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)
    if own is not None:
        own(worker_id)


def _unchanged(batch: Any) -> Any:
    return batch
