"""Kinds of loaders: those whose samples can be read by position, and those that yield batches in their order only."""

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
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types
from lightning_hesd.training.isolation.kinds import is_one_way_iterator

if TYPE_CHECKING:
    from collections.abc import Iterator

_QUEUES = (
    *(queue.Queue, queue.SimpleQueue, multiprocessing.queues.Queue, multiprocessing.queues.SimpleQueue),
    *(multiprocessing.connection.Connection, socket.socket),
)
_ITERATION = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
"""The methods and properties by which PyTorch's DataLoader makes batches."""


def check_loader(key: str, loader: object, alternative: str | None = None) -> None:
    """Refuse text in place of a dataloader.

    Raises:
        ValueError: If it is text other than the alternative.
    """
    if isinstance(loader, str) and loader != alternative:
        offered = "" if alternative is None else f" or {alternative!r}"
        msg = f"`{key}` must be a dataloader{offered}, got {loader!r}."
        raise ValueError(msg)


def is_plain(loader: Any) -> bool:
    """Whether a loader iterates as PyTorch's DataLoader does, so that its dataset and samplers can be used directly."""
    if not isinstance(loader, DataLoader):
        return False
    kind: Any = type(loader)
    own = all(getattr(kind, name) is getattr(DataLoader, name) for name in _ITERATION)
    return own and "_get_iterator" not in vars(loader)


def is_addressable(loader: Any) -> bool:
    """Whether samples can be read from a loader by position, without taking samples away from training."""
    return (
        is_plain(loader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and not any(map(_is_consumed_by_reading, _objects_in(loader.dataset)))
    )


def is_collection(loaders: Any) -> bool:
    """Whether Lightning takes an object for several training loaders, which includes a list of batches."""
    return isinstance(loaders, dict | list | tuple) or is_combined(loaders)


def is_combined(loader: Any) -> bool:
    """Whether a loader is Lightning's combination of several loaders."""
    return isinstance(loader, lightning_types("utilities.CombinedLoader"))


def holds_tensors(loaders: Any) -> bool:
    """Whether a collection of loaders contains tensors, over the rows of which Lightning iterates."""
    if isinstance(loaders, dict | list | tuple):
        return any(map(holds_tensors, loaders.values() if isinstance(loaders, dict) else loaders))
    return isinstance(loaders, Tensor)


def combined(loaders: Any) -> Any:
    """Return one loader for a collection of loaders, as Lightning combines them; a list of batches is one loader."""
    if isinstance(loaders, list | tuple):
        holds_loaders = bool(loaders) and all(isinstance(loader, DataLoader) for loader in loaders)
    else:
        holds_loaders = isinstance(loaders, dict)
    return CombinedLoader(loaders, "max_size_cycle") if holds_loaders else loaders


def validation_loader(loaders: Any) -> Any:
    """Return the one validation loader in `trainer.val_dataloaders`.

    Raises:
        MisconfigurationException: If there is none, or more than one.
    """
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        [loaders] = loaders
    if is_collection(loaders) or loaders is None:
        found = "none" if loaders is None else f"a {type(loaders).__name__} of them"
        msg = (
            f"`generalization_dataloader='val'` needs a Trainer with one validation dataloader, got {found}: pass a "
            "dataloader instead."
        )
        raise MisconfigurationException(msg)
    return loaders


def share_data(loader: Any, other: Any) -> bool:
    """Whether two loaders, or collections of loaders, have a loader or a dataset in common."""
    others = {id(part) for part in _loaders_and_datasets(other)}
    return any(id(part) in others for part in _loaders_and_datasets(loader))


def _loaders_and_datasets(loader: Any) -> Iterator[Any]:
    if is_combined(loader):
        yield from _loaders_and_datasets(loader.iterables)
    elif isinstance(loader, dict | list | tuple):
        for part in loader.values() if isinstance(loader, dict) else loader:
            yield from _loaders_and_datasets(part)
    else:
        yield loader
        yield getattr(loader, "dataset", loader)


def _is_consumed_by_reading(part: Any) -> bool:
    """Whether reading removes items from an object, permanently."""
    return isinstance(part, _QUEUES) or (is_one_way_iterator(part) and not isinstance(part, STREAMS))


def _objects_in(dataset: Any) -> Iterator[Any]:
    """Yield the attributes of a dataset and of datasets inside, and the items of short containers."""
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
"""Number of items up to which containers are searched."""
