"""The mutable state that can be reached from objects: by their attributes, those of their classes, and items."""

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

from lightning_hesd.numerics.isolation.attributes import FRAMEWORKS, ClassState, attribute_states, user_classes
from lightning_hesd.numerics.isolation.containers import LONG_CONTAINER, container_state, has_plain_items
from lightning_hesd.numerics.isolation.streams import STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning_hesd.numerics.isolation.containers import ContentState

_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, PurePath),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout),
    *(dt.date, dt.time, dt.timedelta, decimal.Decimal, re.Pattern),
)
_STATELESS = (*_IMMUTABLE, random.SystemRandom)
_PLAIN = (*_IMMUTABLE, type, *STREAMS, Tensor, np.ndarray, nn.Module, Dataset)

MAX_SEARCHED_LENGTH = 10_000
"""Number of items up to which containers in datasets are searched; of longer ones only the references are saved."""


class ReachableState:
    """The mutable state that can be reached from some objects.

    The search follows modules, datasets, containers, classes of the user, and objects that consist of plain values.
    Objects that raise when they are read are skipped.

    Attributes:
        contents: Containers that are not empty, attributes of objects, and attributes of classes.
        empty: Containers that are empty now.
        tensors: Tensors.
        arrays: NumPy arrays.
        streams: Random number generators, counters and iterators.
    """

    def __init__(self, roots: Sequence[object], *, datasets: bool, known: ReachableState | None = None) -> None:
        """Search.

        Args:
            roots: The objects; all of their attributes are searched, plain or not.
            datasets: Whether to search datasets that are not among the roots.
            known: State that was found before, which is skipped.
        """
        self.contents: list[ContentState] = []
        self.empty: list[Any] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[Any] = []
        self.streams: list[Any] = []
        self._datasets = datasets
        self._seen: dict[int, object] = {} if known is None else known._seen  # noqa: SLF001 - keeps objects alive, so that ids stay unique
        self._seen_classes: dict[int, type] = {} if known is None else known._seen_classes  # noqa: SLF001 - as above
        self._plain: dict[int, object] = {}  # objects that consist of plain values
        self._stateless: set[type] = {type(None), bool, int, float, str}  # types without state, as they are met
        pending = [*roots]
        own = {id(root) for root in roots}
        while pending:  # an explicit stack, because chains of objects may be longer than Python's
            value = pending.pop()
            if id(value) not in self._seen:
                with contextlib.suppress(Exception):  # odd objects may raise anything: they are skipped
                    pending += self._visit(value, is_root=id(value) in own)

    def _add(self, contents: Sequence[ContentState], owner: object) -> list[object]:
        """Add contents and the classes of their owner, and return those of their values that may have state."""
        kind = type(owner)
        described: list[Any] = [kind, type(kind), *([owner] if issubclass(kind, type) else [])]
        classes = [c for cls in described for c in user_classes(cls) if id(c) not in self._seen_classes]
        self._seen_classes.update((id(c), c) for c in classes)
        found: list[object] = []
        for content in [*contents, *(ClassState(c, methods=False) for c in classes)]:
            self.contents.append(content)
            kinds = set(map(type, content.values)) - self._stateless
            self._stateless.update(kind for kind in kinds if issubclass(kind, _STATELESS))
            if not kinds <= self._stateless and self._is_searched(content.values):
                found += [value for value in content.values if not self._is_stateless(value)]
        return found

    def _is_searched(self, values: Sequence[object]) -> bool:
        """Whether to visit the items of a container: not a million file names, nor a million of any in datasets."""
        if self._datasets and len(values) > MAX_SEARCHED_LENGTH:
            return False
        return len(values) <= LONG_CONTAINER or not has_plain_items(values)

    def _is_stateless(self, value: object) -> bool:
        """Whether a value has no state; False for some tuples without state, which costs time only."""
        kind = type(value)
        if kind is tuple:
            return self._stateless.issuperset(map(type, value))  # type: ignore[call-overload]
        return kind in self._stateless

    def _visit(self, value: Any, *, is_root: bool) -> Iterable[object]:
        """Add an object, and return the objects that it refers to."""
        kind = type(value)  # not `isinstance`: proxies lie about their class
        found: Iterable[object] = ()
        if issubclass(kind, Dataset) and not (self._datasets or is_root):
            return found
        self._seen[id(value)] = value
        if issubclass(kind, Tensor):
            self.tensors.append(value)
            # Plain tensors rarely have attributes, and always keep the same `__dict__`.
            found = [vars(value)] if kind in {Tensor, nn.Parameter} else self._add(attribute_states(value), value)
        elif issubclass(kind, np.ndarray):
            self.arrays.append(value)
            found = value.flat if value.dtype.hasobject else ()
        elif issubclass(kind, type):
            found = self._add([], value)
        elif issubclass(kind, STREAMS):
            self.streams.append(value)
        elif kind in {dict, OrderedDict, list, set} and not value:
            self.empty.append(value)
        elif (content := container_state(value)) is not None:
            found = self._add([content, *attribute_states(value)], value)
        elif not issubclass(kind, _STATELESS) and (
            is_root or issubclass(kind, nn.Module | Dataset) or (not _is_of_framework(value) and self._is_plain(value))
        ):
            found = self._add(attribute_states(value), value)
            if issubclass(kind, torch.jit.ScriptModule):
                found += value.children()
        return found

    def _is_plain(self, value: object) -> bool:
        """Whether an object consists of plain values only, at every depth."""
        reached: dict[int, object] = {}
        pending = [value]
        while pending:
            part = pending.pop()
            if issubclass(type(part), _PLAIN) or id(part) in reached or id(part) in self._plain:
                continue
            reached[id(part)] = part
            content = container_state(part)
            contents = [content] if content is not None else [] if _is_of_framework(part) else attribute_states(part)
            if not contents:
                return False
            for content in contents:
                pending.extend(content.values if self._is_searched(content.values) else ())
        self._plain.update(reached)
        return True


def _is_of_framework(value: object) -> bool:
    return type(value).__module__.split(".")[0] in FRAMEWORKS
