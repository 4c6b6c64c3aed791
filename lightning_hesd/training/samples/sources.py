"""Kinds of loaders: whose samples can be read by their positions, and whose only as training gets its batches."""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.queues
import queue
import socket
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hesd.numerics.inputs.cuts import attributes
from lightning_hesd.numerics.isolation.containers import has_plain_items
from lightning_hesd.numerics.isolation.streams import STREAMS
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.isolation.kinds import is_one_way_iterator

if TYPE_CHECKING:
    from collections.abc import Iterator

_QUEUES = (
    *(queue.Queue, queue.SimpleQueue, multiprocessing.queues.Queue, multiprocessing.queues.SimpleQueue),
    *(multiprocessing.connection.Connection, socket.socket),
)
_ITERATION = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
"""What makes the batches of PyTorch's DataLoader, by the names of its methods and properties."""


def is_plain(loader: Any) -> bool:
    """Whether a loader iterates as PyTorch's DataLoader does, so that it can be taken apart."""
    if not isinstance(loader, DataLoader):
        return False
    kind: Any = type(loader)
    own = all(getattr(kind, name) is getattr(DataLoader, name) for name in _ITERATION)
    return own and "_get_iterator" not in vars(loader)


def is_addressable(loader: Any) -> bool:
    """Whether samples can be read from a loader by their positions, without taking anything away from training."""
    return (
        is_plain(loader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and not any(map(_is_used_up, _parts(loader.dataset)))
    )


def is_collection(loaders: Any) -> bool:
    """Whether Lightning takes it for several training loaders: also a list of batches."""
    return isinstance(loaders, dict | list | tuple) or is_combined(loaders)


def is_combined(loader: Any) -> bool:
    """Whether it is Lightning's loader of several loaders together."""
    return isinstance(loader, lightning_types("utilities.CombinedLoader"))


def holds_batches(loaders: Any) -> bool:
    """Whether a collection of loaders consists of tensors, over the rows of which Lightning iterates."""
    if isinstance(loaders, dict | list | tuple):
        return any(map(holds_batches, loaders.values() if isinstance(loaders, dict) else loaders))
    return isinstance(loaders, Tensor)


def combined(loaders: Any) -> Any:
    """Return one loader for a collection of loaders, as Lightning makes it; a list of batches is one already."""
    if isinstance(loaders, list | tuple):
        is_of_loaders = bool(loaders) and all(isinstance(loader, DataLoader) for loader in loaders)
    else:
        is_of_loaders = isinstance(loaders, dict)
    return CombinedLoader(loaders, "max_size_cycle") if is_of_loaders else loaders


def share_data(loader: Any, other: Any) -> bool:
    """Whether two loaders, or collections of loaders, are or hold one loader, or read one dataset."""
    others = {id(part) for part in _read_from(other)}
    return any(id(part) in others for part in _read_from(loader))


def _read_from(loader: Any) -> Iterator[Any]:
    if is_combined(loader):
        yield from _read_from(loader.iterables)
    elif isinstance(loader, dict | list | tuple):
        for part in loader.values() if isinstance(loader, dict) else loader:
            yield from _read_from(part)
    else:
        yield loader
        yield getattr(loader, "dataset", loader)


def _is_used_up(part: Any) -> bool:
    """Whether reading takes away from it, for good."""
    return isinstance(part, _QUEUES) or (is_one_way_iterator(part) and not isinstance(part, STREAMS))


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield what a dataset holds in its attributes, and those of the datasets within it; items of short containers."""
    pending, seen = [dataset], set[int]()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Dataset) or part is dataset:
            pending.extend(attributes(part).values())
        elif isinstance(part, list | tuple | dict) and len(part) <= _SHORT and not has_plain_items(part):
            pending.extend(part.values() if isinstance(part, dict) else part)


_SHORT = 100
"""Items of a container up to which each is looked at."""
