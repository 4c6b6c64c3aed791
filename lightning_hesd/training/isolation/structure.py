"""What containers, objects and arrays hold: compared fast enough for every evaluation of a loss, and put back in place.

Of containers and objects only the items are compared, as objects; each item that can change is a part of its own.
"""

from __future__ import annotations

import array
import ctypes
import os
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from enum import IntEnum, auto
from functools import partial
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGE = 10_000
"""Containers with more items are compared only when an analysis ends, and until then by their lengths.

What their items hold is not looked at.
"""

LARGE_BYTES = 2**20
"""Arrays that are larger are compared only when an analysis ends."""


class Owner(IntEnum):
    """Whose something is, by the way on which it was found."""

    MODULE = auto()
    """The module's."""

    USER = auto()
    """The user's, beyond the module."""

    TRAINER = auto()
    """The Trainer's own."""


class Place(NamedTuple):
    """Where something was found.

    Attributes:
        parent: What holds it.
        label: Its name in there.
        owner: Whose it is.
        of_attributes: Whether it is the dict of an object's attributes.
    """

    parent: Place | None
    label: str
    owner: Owner
    of_attributes: bool = False

    def __str__(self) -> str:
        """Return its name as an expression."""
        labels: list[str] = []
        place: Place | None = self
        while place is not None:
            labels.append(place.label)
            place = place.parent
        return "".join(reversed(labels))

    def label_of(self, key: object) -> str:
        """Return the label of an item."""
        if self.of_attributes:
            return f".{key}"
        return f"[{key!r}]" if isinstance(key, str | int) else "[...]"


class Part(ABC):
    """A mutable object, and what it held when this was made.

    Attributes:
        place: Where it was found.
        is_large: Whether comparing it takes too long to do it often.
    """

    place: Place
    is_large: bool = False

    @abstractmethod
    def changed(self) -> list[str]:
        """Return the labels of what is different now; "" stands for the whole."""

    @abstractmethod
    def put_back(self) -> None:
        """Make it hold what it held."""


class Items(Part):
    """The items of a list, set, deque or dict, which may be that of the attributes of an object, or of a class."""

    def __init__(self, container: Any, place: Place) -> None:
        self.place = place
        self._container = container
        # Live views of keys and values, or elements; unbound methods, because subclasses may have their own.
        if isinstance(container, OrderedDict):
            self.views: tuple[Any, ...] = (OrderedDict.keys(container), OrderedDict.values(container))
        elif isinstance(container, dict):
            self.views = (dict.keys(container), dict.values(container))
        elif isinstance(container, type):
            self.views = (vars(container).keys(), vars(container).values())
        else:
            self.views = (container,)
        self._before = tuple(map(list, self.views))
        self.is_large = len(self._before[0]) > LARGE

    def changed(self) -> list[str]:
        """Return the labels of the items that are others now; "" if it is their order, or there are no labels."""
        now = tuple(map(list, self.views))
        if all(map(_identical, now, self._before)):
            return []
        if isinstance(self._container, set):
            return [""] if set(now[0]) != set(self._before[0]) else []
        if len(now) == 1:
            return [""]
        old, new = (dict(zip(keys, values, strict=True)) for keys, values in (self._before, now))
        missing = object()
        names = [key for key in {**old, **new} if old.get(key, missing) is not new.get(key, missing)]
        if isinstance(self._container, type):  # Python itself fills in special names
            return [f".{name}" for name in names if not name.startswith("__")]
        return [self.place.label_of(key) for key in names] or [""]

    def put_back(self) -> None:
        """Make the items those from before, in their order."""
        container: Any = self._container
        if isinstance(container, type):
            self._put_back_attributes(container)
        elif isinstance(container, dict):
            kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
            keys, values = self._before
            if not _identical(list(kind.keys(container)), keys):
                kind.clear(container)
            for key, value in zip(keys, values, strict=True):
                kind.__setitem__(container, key, value)
        elif isinstance(container, list):
            list.__setitem__(container, slice(None), self._before[0])
        else:
            container.clear()
            (container.extend if isinstance(container, deque) else container.update)(self._before[0])

    def _put_back_attributes(self, owner: type) -> None:
        before = dict(zip(*self._before, strict=True))
        for name in [label[1:] for label in self.changed()]:
            if name in before:
                type.__setattr__(owner, name, before[name])
            else:
                type.__delattr__(owner, name)


class Slots(Part):
    """The attributes that an object keeps in slots."""

    def __init__(self, owner: object, names: Sequence[str], place: Place) -> None:
        self.place = place
        self._owner, self._names = owner, names
        self._before = self._values()

    def _values(self) -> list[Any]:
        return [getattr(self._owner, name, _UNSET) for name in self._names]

    def changed(self) -> list[str]:
        """Return the labels of the attributes that are others now."""
        values = zip(self._names, self._before, self._values(), strict=True)
        return [f".{name}" for name, before, now in values if before is not now]

    def put_back(self) -> None:
        """Set the attributes to what they were."""
        for name, value in zip(self._names, self._before, strict=True):
            if value is not _UNSET:
                object.__setattr__(self._owner, name, value)
            elif hasattr(self._owner, name):
                object.__delattr__(self._owner, name)


class Elements(Part):
    """The elements of a NumPy array; bit by bit, for NaN is not equal to itself."""

    def __init__(self, values: np.ndarray[Any, Any], place: Place) -> None:
        self.place = place
        self._array, self._before = values, values.copy()
        self.is_large = values.nbytes > LARGE_BYTES

    def changed(self) -> list[str]:
        """Return a label if there is a difference."""
        same = self._array.shape == self._before.shape and self._array.tobytes() == self._before.tobytes()
        return [] if same else [""]

    def put_back(self) -> None:
        """Copy the elements back."""
        np.copyto(self._array, self._before)


class Memory(Part):
    """The content of a byte array, an `array.array`, or an object of `ctypes`, as those that processes share are."""

    def __init__(self, buffer: Any, place: Place) -> None:
        self.place = place
        self._buffer, self._before = buffer, _content(buffer)
        self.is_large = len(self._before) > LARGE_BYTES

    def changed(self) -> list[str]:
        """Return a label if there is a difference."""
        return [] if _content(self._buffer) == self._before else [""]

    def put_back(self) -> None:
        """Write the content back."""
        if isinstance(self._buffer, bytearray):
            self._buffer[:] = self._before
        elif isinstance(self._buffer, array.array):
            self._buffer[:] = array.array(self._buffer.typecode, self._before)
        else:
            ctypes.memmove(ctypes.addressof(self._buffer), self._before, len(self._before))


class Table(Part):
    """The content of a DataFrame or a Series of pandas."""

    def __init__(self, table: Any, place: Place) -> None:
        self.place = place
        self._table, self._before = table, table.copy()
        self.is_large = table.size > LARGE

    def changed(self) -> list[str]:
        """Return a label if there is a difference."""
        return [] if self._before.equals(self._table) else [""]

    def put_back(self) -> None:
        """Let the table have a copy of what it held, as the methods of pandas with `inplace=True` do."""
        self._table._update_inplace(self._before.copy())  # noqa: SLF001


class Setting(Part):
    """A setting of the process, which functions tell and change."""

    def __init__(self, name: str, get: Callable[[], object], put: Callable[[Any], object]) -> None:
        self.place = Place(None, name, Owner.USER)
        self._get, self._put = get, put
        self._before = get()

    def changed(self) -> list[str]:
        """Return a label if there is a difference."""
        return [] if self._get() == self._before else [""]

    def put_back(self) -> None:
        """Set it to what it was."""
        self._put(self._before)


_CUDNN: Any = torch.backends.cudnn

SETTINGS: list[tuple[str, Callable[[], object], Callable[[Any], object]]] = [
    ("torch.get_num_threads()", torch.get_num_threads, torch.set_num_threads),
    ("torch.is_anomaly_enabled()", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (
        "torch.are_deterministic_algorithms_enabled()",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    ("torch.backends.cudnn.benchmark", lambda: _CUDNN.benchmark, partial(setattr, _CUDNN, "benchmark")),
    ("numpy.geterr()", np.geterr, lambda before: np.seterr(**before)),
    ("os.getcwd()", os.getcwd, os.chdir),
]
"""Settings of the process that the numbers of training may depend on: name, what tells it, and what changes it."""


def _content(buffer: Any) -> bytes:
    if isinstance(buffer, bytearray | array.array):
        return bytes(memoryview(buffer).cast("B"))
    return ctypes.string_at(ctypes.addressof(buffer), ctypes.sizeof(buffer))


class Structure:
    """Many parts at once."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        items = [part for part in parts if isinstance(part, Items)]
        self._views = [view for part in items if not part.is_large for view in part.views]
        self._large_views = [view for part in items if part.is_large for view in part.views]
        self._others = [part for part in parts if not isinstance(part, Items) and not part.is_large]
        self._renew()

    def _renew(self) -> None:
        """Let the fast comparison be with the items as they are now."""
        self._items = list(chain.from_iterable(self._views))
        self._lengths = list(map(len, self._views))
        self._large_lengths = list(map(len, self._large_views))

    def _is_unchanged(self) -> bool:
        """Whether all but the large parts hold what they held; all items in one loop of Python's own."""
        try:
            return (
                list(map(len, self._views)) == self._lengths
                and all(map(is_, chain.from_iterable(self._views), self._items))
                and not any(part.changed() for part in self._others)
            )
        except RuntimeError:  # another thread changes one of them just now
            return False

    def restore(self, *, thoroughly: bool = False) -> dict[str, Exception | None]:
        """Put back what changed.

        Args:
            thoroughly: Whether to look into large parts even if their lengths are the same.

        Returns:
            What could not be put back, by name, with the error if there was one.
        """
        left: dict[str, Exception | None] = {}
        thoroughly = thoroughly or list(map(len, self._large_views)) != self._large_lengths
        if not thoroughly and self._is_unchanged():
            return left
        for part in self._parts:
            if part.is_large and not thoroughly:
                continue
            try:
                if part.changed():
                    part.put_back()
                    left |= {f"{part.place}{label}": None for label in part.changed()}
            except Exception as error:  # noqa: BLE001 - told to the caller, and the rest is put back
                left[str(part.place)] = error
        self._renew()
        return left

    def changed(self) -> list[str]:
        """Return the names of what is different now."""
        return [f"{part.place}{label}" for part in self._parts for label in part.changed()]


_UNSET = object()


def _identical(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))
