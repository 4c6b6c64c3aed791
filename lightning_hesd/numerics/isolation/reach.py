"""What mutable state can be reached from an object: its attributes, those of its classes, and all that these hold."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import random
import re
import types
from collections import OrderedDict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_hesd.numerics.isolation.containers import holds_atoms
from lightning_hesd.numerics.isolation.holders import FRAMEWORKS, attributes, class_body, container, user_classes
from lightning_hesd.numerics.isolation.streams import STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning_hesd.numerics.isolation.holders import Holder

_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, PurePath),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout),
    *(dt.date, dt.time, dt.timedelta, decimal.Decimal, re.Pattern),
)
_STATELESS = (*_IMMUTABLE, random.SystemRandom)
_PLAIN = (*_IMMUTABLE, type, *STREAMS, Tensor, np.ndarray, nn.Module, Dataset)

MAX_SEARCHED_LENGTH = 10_000
"""Of longer containers in the reach of datasets it is remembered what they hold, but not how that looks inside."""

LONG = 100
"""From this length on it pays to look whether a container holds plain values only."""


class Reach:
    """The mutable state that can be reached from some objects.

    It extends to modules, datasets, containers, classes of the user, and objects whose whole content is plain values.
    What cannot be read is left alone.

    Attributes:
        holders: Containers, attributes of objects, and bodies of classes.
        empty: Containers that are empty now.
        tensors: Tensors.
        arrays: NumPy arrays.
        streams: Generators of random numbers, counters and iterators.
    """

    def __init__(self, roots: Sequence[object], *, datasets: bool, but: Reach | None = None) -> None:
        """Find it.

        Args:
            roots: The objects; of these all attributes are in reach, plain or not.
            datasets: Whether the attributes of datasets are, too, unless they are roots.
            but: What need not be found again.
        """
        self.holders: list[Holder] = []
        self.empty: list[Any] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[Any] = []
        self.streams: list[Any] = []
        self._datasets = datasets
        self._seen: dict[int, object] = {} if but is None else but._seen  # noqa: SLF001 - keeps objects alive, so that an id names one only
        self._bodies: dict[int, type] = {} if but is None else but._bodies  # noqa: SLF001 - classes that were taken in
        self._plain: dict[int, object] = {}  # those found to be
        self._stateless: set[type] = {type(None), bool, int, float, str}  # types without state that were met
        pending = [*roots]
        own = {id(root) for root in roots}
        while pending:  # a stack of its own, because chains of objects may be longer than Python's
            value = pending.pop()
            if id(value) not in self._seen:
                with contextlib.suppress(Exception):  # odd objects may raise anything: they are left alone
                    pending += self._take(value, is_root=id(value) in own)

    def _enter(self, holders: Sequence[Holder], owner: object) -> list[object]:
        """Take in holders, and return those of their values that may have state."""
        kind = type(owner)
        described: list[Any] = [kind, type(kind), *([owner] if issubclass(kind, type) else [])]
        classes = [c for cls in described for c in user_classes(cls) if id(c) not in self._bodies]
        self._bodies.update((id(c), c) for c in classes)
        found: list[object] = []
        for holder in [*holders, *map(class_body, classes)]:
            self.holders.append(holder)
            kinds = set(map(type, holder.values)) - self._stateless
            self._stateless.update(kind for kind in kinds if issubclass(kind, _STATELESS))
            if not kinds <= self._stateless and self._is_searched(holder.values):
                found += [value for value in holder.values if not self._is_stateless(value)]
        return found

    def _is_searched(self, values: Sequence[object]) -> bool:
        """Whether to look at each of some values: not at a million file names, nor at a million of any in datasets."""
        if self._datasets and len(values) > MAX_SEARCHED_LENGTH:
            return False
        return len(values) <= LONG or not holds_atoms(values)

    def _is_stateless(self, value: object) -> bool:
        """Whether a value has no state; a tuple that is taken for one that has costs time only."""
        kind = type(value)
        if kind is tuple:
            return self._stateless.issuperset(map(type, value))  # type: ignore[call-overload]
        return kind in self._stateless

    def _take(self, value: Any, *, is_root: bool) -> Iterable[object]:
        """Take in an object, and return others that it leads to."""
        kind = type(value)  # not `isinstance`: objects that stand for others lie about what they are
        found: Iterable[object] = ()
        if issubclass(kind, Dataset) and not (self._datasets or is_root):
            return found
        self._seen[id(value)] = value
        if issubclass(kind, Tensor):
            self.tensors.append(value)
            # Nearly all have none, and plain ones keep the dictionary that they have.
            found = [vars(value)] if kind in {Tensor, nn.Parameter} else self._enter(attributes(value), value)
        elif issubclass(kind, np.ndarray):
            self.arrays.append(value)
            found = value.flat if value.dtype.hasobject else ()
        elif issubclass(kind, type):
            found = self._enter([], value)
        elif issubclass(kind, STREAMS):
            self.streams.append(value)
        elif kind in {dict, OrderedDict, list, set} and not value:
            self.empty.append(value)
        elif (held := container(value)) is not None:
            found = self._enter([held, *attributes(value)], value)
        elif not issubclass(kind, _STATELESS) and (is_root or self._is_open(value)):
            found = self._enter(attributes(value), value)
            if issubclass(kind, torch.jit.ScriptModule):
                found += value.children()
        return found

    def _is_open(self, value: object) -> bool:
        """Whether to go on to the attributes of an object."""
        return issubclass(type(value), nn.Module | Dataset) or (_is_own(value) and self._is_plain(value))

    def _is_plain(self, value: object) -> bool:
        """Whether `value` consists of plain values only, all the way down."""
        reached: dict[int, object] = {}
        pending = [value]
        while pending:
            part = pending.pop()
            if issubclass(type(part), _PLAIN) or id(part) in reached or id(part) in self._plain:
                continue
            reached[id(part)] = part
            held = container(part)
            parts = [held] if held is not None else attributes(part) if _is_own(part) else []
            if not parts:
                return False
            for holder in parts:
                pending.extend(holder.values if self._is_searched(holder.values) else ())
        self._plain.update(reached)
        return True


def _is_own(value: object) -> bool:
    return type(value).__module__.split(".")[0] not in FRAMEWORKS
