"""Snapshots: put back whatever running somebody else's code has changed.

What the analysis calls (a loss function, a training step, a dataset) may leave traces: running statistics, metric
states, lists that grow, random numbers drawn. `preserved` remembers all of it that Python lets one reach, and puts it
back in place, also after an exception. Out of reach are files, globals, closures, and objects that hold anything but
plain values (a database connection, a logger's run).
"""

from __future__ import annotations

import contextlib
import copyreg
import datetime as dt
import decimal
import enum
import operator
import random
import re
import types
from collections import deque
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from lightning_hesd.numerics.containers import holds_atoms
from lightning_hesd.numerics.dtensors import is_distributed, local_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum, PurePath),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout),
    *(dt.date, dt.time, dt.timedelta, decimal.Decimal, re.Pattern),
)
_STATELESS = (*_IMMUTABLE, random.SystemRandom)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_PLAIN = (*_IMMUTABLE, *_GENERATORS, Tensor, np.ndarray, nn.Module, Dataset)
_FOREIGN = {"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"}
"""Objects of these packages hold running machinery (trainers, optimizers, hooks), unless they are modules."""

LONGEST_SEARCHED = 10_000
"""Of longer containers of a dataset it is remembered what they hold, but not how that looks inside."""

_LONG = 100
"""From this length on it pays to look whether a container holds plain values only."""


@contextlib.contextmanager
def preserved(*roots: object, tensors: bool = True) -> Iterator[Callable[[], None]]:
    """Put back all state reachable from `roots`, and the global random number generators, on leaving.

    Args:
        *roots: Modules, datasets or other objects.
        tensors: Whether to restore the values of tensors and arrays too; they are copied for that. Without them,
            datasets are descended into, which may hold too many to copy.

    Yields:
        A function that puts the state of `roots` back meanwhile.
    """
    snapshot = _Snapshot(tensors=tensors)
    for root in roots:
        snapshot.take(root)
    generators = _global_generator_states()
    try:
        yield snapshot.restore
    finally:
        snapshot.restore()
        for restore in generators:
            restore()


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices); call it inside `preserved`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may draw from the legacy generator
    # Without accelerators `torch.manual_seed` notes, at each call, from where it was called, in case that one turns up:
    # a millisecond, which is more than the loss of a small network takes.
    (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(seed)


def _global_generator_states() -> list[Callable[[], object]]:
    """Return one restoring function for each global generator."""
    restorers: list[Callable[[], object]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available():
        restorers.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        restorers.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return restorers


class _Snapshot:
    """Remembers the mutable state reachable from the objects it takes, and restores it in place.

    Descends into modules, datasets, containers, and objects whose whole content is plain values.
    """

    def __init__(self, *, tensors: bool) -> None:
        self._tensors = tensors
        self._restorers: list[Callable[[], object]] = []
        self._seen: dict[int, object] = {}  # keeps the objects alive, so that an id names one object only
        self._plain: dict[int, object] = {}  # those found to be
        self._pending: list[object] = []

    def restore(self) -> None:
        for restore in reversed(self._restorers):
            restore()

    def take(self, root: object) -> None:
        """Remember a root: its attributes even if not all of them are plain."""
        self._take(root)
        self._take_attributes(root)
        while self._pending:  # a stack of its own, because chains of objects may be longer than Python's
            self._take(self._pending.pop())

    def _take(self, value: object) -> None:
        if isinstance(value, _STATELESS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._take_tensor(value)
        elif isinstance(value, np.ndarray):
            if self._tensors and value.flags.writeable:
                self._restorers.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, _GENERATORS):
            self._take_generator(value)
        elif isinstance(value, _CONTAINERS):
            self._take_container(value)
        elif self._is_open(value):
            self._take_attributes(value)

    def _take_attributes(self, value: object) -> None:
        self._pending.append(getattr(value, "__dict__", None))
        for name, item in _slots(value).items():
            self._pending.append(item)
            self._restorers.append(partial(object.__setattr__, value, name, item))

    def _take_tensor(self, tensor: Tensor) -> None:
        if not self._tensors or is_lazy(tensor) or tensor.is_inference():
            return
        if is_distributed(tensor):
            if tensor.is_leaf:
                self._restorers.append(partial(tensor.requires_grad_, tensor.requires_grad))
            self._take(local_part(tensor))
            return
        version, saved, requires_grad = tensor._version, tensor.detach().clone(), tensor.requires_grad  # noqa: SLF001
        memory = tensor.data  # the same storage, which `tensor.data = ...` would leave
        # Of elements that share one place (of expanded tensors) only one can be written.
        writable = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())

        def restore() -> None:
            if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape or tensor.dtype != memory.dtype:
                tensor.data = memory
            # The version counts changes in place, but neither those through `.data` nor those of batch normalisation.
            # Unchanged tensors are not written to: that would count as a change for graphs that hold them.
            if tensor._version != version or not torch.equal(memory, saved):  # noqa: SLF001
                with torch.no_grad():
                    tensor.detach()[writable].copy_(saved[writable])
            if tensor.is_leaf and tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)

        self._restorers.append(restore)

    def _take_generator(self, generator: Any) -> None:
        if isinstance(generator, torch.Generator):
            self._restorers.append(partial(generator.set_state, generator.get_state()))
        elif isinstance(generator, np.random.Generator):
            self._restorers.append(partial(setattr, generator.bit_generator, "state", generator.bit_generator.state))
        elif isinstance(generator, np.random.RandomState):
            self._restorers.append(partial(generator.set_state, generator.get_state()))
        else:
            self._restorers.append(partial(generator.setstate, generator.getstate()))

    def _take_container(self, container: Any) -> None:
        items = list(container)
        values = list(container.values()) if isinstance(container, dict) else items
        if self._is_searched(container):
            self._pending.extend(values)
        if isinstance(container, tuple | frozenset):
            return

        def restore() -> None:
            if _are_same(container, items) and (values is items or _are_same(container.values(), values)):
                return
            container.clear()
            if isinstance(container, dict):
                for key, value in zip(items, values, strict=True):  # the `update` of a Counter adds
                    container[key] = value
            else:
                (container.extend if isinstance(container, list | deque) else container.update)(items)

        self._restorers.append(restore)

    def _is_searched(self, container: Any) -> bool:
        """Whether to look at the items of a container: not at a million file names, nor at a million of anything."""
        if not self._tensors and len(container) > LONGEST_SEARCHED:
            return False
        return len(container) <= _LONG or not holds_atoms(container)

    def _is_open(self, value: object) -> bool:
        """Whether to descend into the attributes of `value`."""
        if isinstance(value, Dataset):
            return not self._tensors
        return isinstance(value, nn.Module) or (_has_own_attributes(value) and self._is_plain(value))

    def _is_plain(self, value: object) -> bool:
        """Whether `value` consists of plain values only, all the way down."""
        reached: dict[int, object] = {}
        pending = [value]
        while pending:
            part = pending.pop()
            if isinstance(part, _PLAIN) or id(part) in reached or id(part) in self._plain:
                continue
            reached[id(part)] = part
            if isinstance(part, _CONTAINERS) and not self._is_searched(part):
                continue
            parts = _parts(part)
            if parts is None:
                return False
            pending.extend(parts)
        self._plain.update(reached)
        return True


def _has_own_attributes(value: object) -> bool:
    has_attributes = hasattr(value, "__dict__") or bool(_slots(value))
    return has_attributes and type(value).__module__.split(".")[0] not in _FOREIGN


def _slots(value: object) -> dict[str, object]:
    """Return the attributes that `value` keeps in slots."""
    names = copyreg._slotnames(type(value))  # type: ignore[attr-defined]  # noqa: SLF001 - as `copy` and `pickle` do
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _parts(value: Any) -> Iterable[object] | None:
    """Return what a container or an object consists of, or None if that cannot be told."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, _CONTAINERS):
        return value
    return [*getattr(value, "__dict__", {}).values(), *_slots(value).values()] if _has_own_attributes(value) else None


def _are_same(container: Any, items: list[object]) -> bool:
    """Whether a container holds the same objects in the same order."""
    return len(container) == len(items) and all(map(operator.is_, container, items))
