"""Kinds of loaders, and copies of loaders, samplers and streams.

From some loaders samples can be read by position; others yield batches in their order only. Reading a copy takes no
samples away from training. Data are not copied: the copy shares datasets with all their objects, modules and large
arrays. A list of a million file names or positions is copied as one list, not name by name.
"""

from __future__ import annotations

import copy
import multiprocessing.connection
import multiprocessing.queues
import queue
import socket
import types
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_hesd.numerics.isolation.attributes import attributes
from lightning_hesd.numerics.isolation.containers import LONG_CONTAINER, PLAIN_TYPES, has_plain_items
from lightning_hesd.numerics.isolation.streams import GENERATORS, STREAMS
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types
from lightning_hesd.training.isolation.kinds import CONTAINERS, is_one_way_iterator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_QUEUES = (
    *(queue.Queue, queue.SimpleQueue, multiprocessing.queues.Queue, multiprocessing.queues.SimpleQueue),
    *(multiprocessing.connection.Connection, socket.socket),
)
_ITERATION = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
"""The methods and properties by which PyTorch's DataLoader makes batches."""

_SHORT = 100
"""Number of items up to which containers are searched for objects that reading consumes."""

MAX_COPIED_BYTES = 2**28
"""Size in bytes up to which tensors and arrays are copied; larger ones are taken for data, and shared."""

_ATOMS = (
    *(*PLAIN_TYPES, range, type),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
)
_IN_PROCESS = {
    "num_workers": 0,
    "prefetch_factor": None,
    "pin_memory": False,
    "timeout": 0,
    "persistent_workers": False,
    "_DataLoader__multiprocessing_context": None,
}
"""Attributes of a DataLoader without workers."""


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


# Copies ---------------------------------------------------------------------------------------------------------------


class NotCopiedError(MisconfigurationException):
    """A loader, sampler or stream cannot be copied."""


def private_copy(source: Any, dataset: Any = None, *, in_process: bool = True) -> Any:
    """Copy a sampler, a loader or a stream.

    The copy shares the dataset that is read, and with `in_process` reads without workers. An iterator that a DataLoader
    keeps over itself cannot be copied: the copy gets a new one.

    Raises:
        NotCopiedError: If the object cannot be copied.
    """
    if isinstance(source, list | tuple | range):
        return source
    plan = _CopyPlan(source, dataset)
    try:
        copied = copy.deepcopy(source, plan.memo)
    except Exception as error:
        msg = (
            f"{type(source).__name__} cannot be copied ({error}), and reading samples for the analysis from the "
            "original could take them away from training: pass the callback `dataloader=`, another loader "
            "or a list of batches."
        )
        raise NotCopiedError(msg) from error
    for loader in plan.loaders:
        attributes = vars(plan.memo[id(loader)])
        attributes.update(_IN_PROCESS if in_process else {"persistent_workers": False})
    for loader, name in plan.iterators:
        if name != "_iterator":  # that of persistent workers
            vars(plan.memo[id(loader)])[name] = DataLoader.__iter__(plan.memo[id(loader)])
    return copied


class _CopyPlan:
    """The objects that a deep copy shares or treats specially.

    Attributes:
        memo: The `memo` of `deepcopy`: id of an object -> the object to use in the copy.
        loaders: DataLoaders to copy.
        iterators: DataLoaders with the names of their attributes that are iterators over them.
    """

    def __init__(self, source: Any, dataset: Any) -> None:
        self.memo: dict[int, Any] = {}
        self.loaders: list[Any] = []
        self.iterators: list[tuple[Any, str]] = []
        self._source = source
        self._alive: list[Any] = []  # keeps objects alive, so that ids stay unique
        if dataset is not None and dataset is not source:
            self.memo[id(dataset)] = dataset
            self._walk(attributes(dataset).values(), self._share)
        self._walk([source], self._plan)

    def _walk(self, roots: Iterable[Any], visit: Callable[[Any], Iterable[Any]]) -> None:
        """Visit all objects that can be reached from some roots; `visit` returns the objects that one refers to."""
        pending, seen = list(roots), set[int]()
        while pending:
            part = pending.pop()
            if isinstance(part, _ATOMS) or id(part) in seen or id(part) in self.memo:
                continue
            seen.add(id(part))
            self._alive.append(part)
            pending.extend(visit(part))

    def _share(self, part: Any) -> Iterable[Any]:
        if isinstance(part, CONTAINERS):
            return _items(part)
        if isinstance(part, (Tensor, np.ndarray, *GENERATORS)):
            return ()
        self.memo[id(part)] = part
        return attributes(part).values()

    def _plan(self, part: Any) -> Iterable[Any]:
        if isinstance(part, Tensor | np.ndarray):
            if part.nbytes > MAX_COPIED_BYTES:
                self.memo[id(part)] = part
            return ()
        if isinstance(part, CONTAINERS):
            items = _items(part)
            if not items and part:
                self.memo[id(part)] = copy.copy(part)
            return items
        if isinstance(part, nn.Module) or (isinstance(part, Dataset) and not isinstance(part, IterableDataset)):
            self.memo[id(part)] = part
            return ()
        if isinstance(part, DataLoader):
            self.loaders.append(part)
            for name, value in vars(part).items():
                if isinstance(value, _BaseDataLoaderIter):
                    self.iterators.append((part, name))
                    self.memo[id(value)] = None
        return attributes(part).values()


def _items(container: Any) -> Iterable[Any]:
    """Return the items of a container; none for a long container of plain values."""
    if len(container) > LONG_CONTAINER and has_plain_items(container):
        return ()
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
