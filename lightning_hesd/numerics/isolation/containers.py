"""The content of containers: compared by identity, restored in place.

Items are read and written through the methods of the built-in base class, because subclasses may override them.
"""

from __future__ import annotations

import array
import ctypes
import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from operator import is_
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LARGE_CONTAINER = 1000
"""Number of items from which on a container is compared in thorough restorations only, until it has changed once."""

LONG_CONTAINER = 100
"""Number of items from which on testing for plain items is faster than visiting the items."""

PLAIN_TYPES = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Types of immutable values that refer to no other objects."""


class ContentState(ABC):
    """The objects that a container, an object or a class refers to, as they were when this state was saved.

    Attributes:
        description: The kind of container, for messages.
        values: The objects.
        keys: Their keys or names; None where they have none.
        views: Live views of keys and values, or of the items, for comparing many containers in one loop; empty where
            there are none.
        is_immutable: Whether the container itself cannot change.
    """

    views: tuple[Any, ...] = ()
    is_immutable: bool = False

    def __init__(self, owner: object, values: Sequence[Any], keys: Sequence[Any] | None = None) -> None:
        self.description = f"a {type(owner).__name__}"
        self.values = values
        self.keys = keys
        self._originals = values
        self._is_always_compared = len(values) < LARGE_CONTAINER

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:
        """Restore the saved objects, and return whether there were others.

        Args:
            replacer: None: objects that `replace` has put in the place of saved ones give way to these again.
            thorough: Whether to compare large containers that have never changed, too.
        """
        if replacer is None:
            self.values = self._originals
        if not (thorough or self._is_always_compared) or not self.differs():
            return False
        self._is_always_compared = True
        self.write()
        return True

    def replace(self, value: object, other: object, *, permanent: bool = False) -> None:
        """Put `other` in the place of `value`: until `restore(None)`, or permanently."""
        self.values = [other if v is value else v for v in self.values]
        if permanent:
            self._originals = [other if v is value else v for v in self._originals]
        self.write()

    def current(self) -> Mapping[Any, Any]:
        """Return the present objects by key, if there are keys."""
        return {}

    @abstractmethod
    def differs(self) -> bool:
        """Whether the container refers to other objects now."""

    @abstractmethod
    def write(self) -> None:
        """Make the container refer to the saved objects, and to no others."""


class MappingState(ContentState):
    """The items of a dict."""

    def __init__(self, mapping: Any) -> None:
        self._base: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
        self._mapping = mapping
        self.views = self._base.keys(mapping), self._base.values(mapping)
        keys, values = list(self.views[0]), list(self.views[1])
        self._has_names = set(map(type, keys)) == {str}
        super().__init__(mapping, values, keys)

    @override
    def current(self) -> Mapping[Any, Any]:
        return dict(zip(*self.views, strict=True))

    @override
    def differs(self) -> bool:
        if dict.__len__(self._mapping) != len(self.values):
            return True
        return bool(self.values) and not (self._has_saved_keys() and all(map(is_, self.views[1], self.values)))

    def _has_saved_keys(self) -> bool:
        keys: Any = self.keys
        if self._has_names:
            return bool(list(self.views[0]) == keys)
        return len(self.views[0]) == len(keys) and all(map(is_, self.views[0], keys))

    @override
    def write(self) -> None:
        if not self._has_saved_keys():  # else other threads would see an empty dict for no reason
            self._base.clear(self._mapping)
        for key, value in zip(self.keys or (), self.values, strict=True):
            self._base.__setitem__(self._mapping, key, value)


class _SequenceState(ContentState):
    """The items of a list, a deque, a set, a tuple or a frozen set."""

    def __init__(self, sequence: Any, base: Any) -> None:
        self.is_immutable = base in {tuple, frozenset}
        self._base = base
        self._sequence = sequence
        kind = type(sequence)
        if kind.__iter__ is base.__iter__ and kind.__len__ is base.__len__:
            self.views = (sequence,)
        super().__init__(sequence, list(base.__iter__(sequence)))

    @override
    def differs(self) -> bool:
        now, values = self._sequence, self.values
        if self._base.__len__(now) == len(values) and all(map(is_, self._base.__iter__(now), values)):
            return False
        return self._base is not set or {*map(id, set.__iter__(now))} != {*map(id, values)}

    @override
    def write(self) -> None:
        if self._base is list:
            list.__setitem__(self._sequence, slice(None), self.values)
        elif not self.is_immutable:
            self._base.clear(self._sequence)
            (self._base.update if self._base is set else self._base.extend)(self._sequence, self.values)


class BufferState(ContentState):
    """The bytes (`content`) of a `bytearray`, an `array.array`, or an object of `ctypes`, as processes share them."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.content = self._bytes()
        super().__init__(buffer, [])

    def _bytes(self) -> bytes:
        if isinstance(self._buffer, bytearray | array.array):
            return bytes(memoryview(self._buffer).cast("B"))
        return ctypes.string_at(ctypes.addressof(self._buffer), ctypes.sizeof(self._buffer))

    @override
    def differs(self) -> bool:
        return self._bytes() != self.content

    @override
    def write(self) -> None:
        if isinstance(self._buffer, bytearray):
            self._buffer[:] = self.content
        elif isinstance(self._buffer, array.array):
            self._buffer[:] = array.array(self._buffer.typecode, self.content)
        else:
            ctypes.memmove(ctypes.addressof(self._buffer), self.content, len(self.content))


class EmptyContainersState:
    """Containers that were empty, as most are: one loop without Python code compares them all."""

    description = "a container"

    def __init__(self, containers: Sequence[Any]) -> None:
        self._containers = containers

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Empty the containers again, and return whether one was not."""
        if not any(self._containers):
            return False
        for container in self._containers:
            container.clear()
        return True


def container_state(value: Any) -> ContentState | None:
    """Save the content of a container; None if the value is no container."""
    kind = type(value)
    if issubclass(kind, dict):
        return MappingState(value)
    for base in (list, deque, set, tuple, frozenset):
        if issubclass(kind, base):
            return _SequenceState(value, base)
    return BufferState(value) if issubclass(kind, (bytearray, array.array)) else None


def has_plain_items(container: Any) -> bool:
    """Whether a container holds only numbers, texts and None, or tuples of these: no mutable state.

    Runs no Python code for each item. Takes a list, tuple, set, deque or dict.
    """
    items = itertools.chain(container, container.values()) if isinstance(container, dict) else container
    kinds = set(map(type, items))
    if tuple not in kinds:
        return kinds <= PLAIN_TYPES
    items = container.values() if isinstance(container, dict) else container
    is_tuple = map(is_, map(type, items), itertools.repeat(tuple))
    inner = itertools.chain.from_iterable(itertools.compress(items, is_tuple))
    return (kinds - {tuple}) | set(map(type, inner)) <= PLAIN_TYPES
