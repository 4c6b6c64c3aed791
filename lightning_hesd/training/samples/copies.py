"""Copies of samplers, loaders and streams: reading a copy takes nothing away from training.

The data stay where they are: datasets, modules and large arrays are shared by the copy, and so are the objects that a
dataset consists of. A million file names or positions are copied as one list, not name by name.
"""

from __future__ import annotations

import copy
import random
import types
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_hesd.numerics.inputs.cuts import attributes
from lightning_hesd.numerics.isolation.containers import has_plain_items
from lightning_hesd.training.compat.namespaces import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_COPIED_BYTES = 2**28
"""Bytes: larger tensors and arrays are data, and shared."""

_LONG = 100
"""From this length on it pays to look whether a container holds plain values only."""

_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_IN_PROCESS = {
    "num_workers": 0,
    "prefetch_factor": None,
    "pin_memory": False,
    "timeout": 0,
    "persistent_workers": False,
    "_DataLoader__multiprocessing_context": None,
}
"""Attributes of a DataLoader that reads in this process."""


class NotCopiedError(MisconfigurationException):
    """A loader, sampler or stream cannot be copied."""


def private_copy(source: Any, dataset: Any = None, *, in_process: bool = True) -> Any:
    """Copy a sampler, a loader or a stream.

    Iterators over a DataLoader that the loader itself keeps cannot be copied: the copy gets new ones.

    Args:
        source: What to copy.
        dataset: The data that it reads, to be shared.
        in_process: Whether the DataLoaders in the copy read in this process instead of through workers.

    Raises:
        NotCopiedError: If it cannot be copied.
    """
    if isinstance(source, list | tuple | range):
        return source
    plan = _Plan(source, dataset)
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


class _Plan:
    """What a deep copy shares, and what it cannot copy.

    Attributes:
        memo: Copies that are known beforehand, by the identities of the originals, as `deepcopy` takes them.
        loaders: DataLoaders to be copied.
        iterators: DataLoaders with the names of attributes that are iterators over them.
    """

    def __init__(self, source: Any, dataset: Any) -> None:
        self.memo: dict[int, Any] = {}
        self.loaders: list[Any] = []
        self.iterators: list[tuple[Any, str]] = []
        self._source = source
        self._kept: list[Any] = []  # identities are those of objects that live
        if dataset is not None and dataset is not source:
            self.memo[id(dataset)] = dataset
            self._walk(attributes(dataset).values(), self._share)
        self._walk([source], self._look)

    def _walk(self, roots: Iterable[Any], look: Callable[[Any], Iterable[Any]]) -> None:
        """Look at what can be reached from some objects, as far as `look` returns what they consist of."""
        pending, seen = list(roots), set[int]()
        while pending:
            part = pending.pop()
            if isinstance(part, _ATOMS) or id(part) in seen or id(part) in self.memo:
                continue
            seen.add(id(part))
            self._kept.append(part)
            pending.extend(look(part))

    def _share(self, part: Any) -> Iterable[Any]:
        if isinstance(part, _CONTAINERS):
            return _items(part)
        if isinstance(part, (Tensor, np.ndarray, *_GENERATORS)):
            return ()
        self.memo[id(part)] = part
        return attributes(part).values()

    def _look(self, part: Any) -> Iterable[Any]:
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
    """Return the items of a container, nothing for a long one of plain values."""
    if len(container) > _LONG and has_plain_items(container):
        return ()
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
