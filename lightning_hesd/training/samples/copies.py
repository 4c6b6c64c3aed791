"""Copies of samplers, loaders and streams: reading a copy takes no samples away from training.

Data are not copied: the copy shares datasets with all their objects, modules and large arrays. A list of a million file
names or positions is copied as one list, not name by name.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_hesd.numerics.inputs.cuts import attributes
from lightning_hesd.numerics.isolation.containers import PLAIN_TYPES, has_plain_items
from lightning_hesd.numerics.isolation.streams import GENERATORS
from lightning_hesd.training.compat.namespaces import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_COPIED_BYTES = 2**28
"""Size in bytes up to which tensors and arrays are copied; larger ones are taken for data, and shared."""

_LONG = 100
"""Number of items from which on testing for plain items is faster than visiting the items."""

_ATOMS = (
    *(*PLAIN_TYPES, range, type),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_IN_PROCESS = {
    "num_workers": 0,
    "prefetch_factor": None,
    "pin_memory": False,
    "timeout": 0,
    "persistent_workers": False,
    "_DataLoader__multiprocessing_context": None,
}
"""Attributes of a DataLoader without workers."""


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
            "original could take them away from training: pass `dataloader=` to HessianSpectrumCallback, another "
            "loader or a list of batches."
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
        if isinstance(part, _CONTAINERS):
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
        if isinstance(part, _CONTAINERS):
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
    if len(container) > _LONG and has_plain_items(container):
        return ()
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
