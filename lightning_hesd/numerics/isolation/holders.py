"""What holds other objects: containers, attributes of objects and of classes; what they held, and how to put it back.

Identity counts, not equality. Containers are read and written by the methods of their built-in base: subclasses may
have overridden them with something else in mind.
"""

from __future__ import annotations

import array
import functools
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from operator import is_
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGE = 1000
"""Items from which on a container that has never been found changed is not looked through at every restoration."""


class _Nothing:
    """In the place of an attribute that is not set."""


FRAMEWORKS = {"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_hesd"}
"""Objects of these packages hold running machinery (trainers, optimizers, hooks), unless they are modules."""

_LIBRARIES = {*FRAMEWORKS, "abc", "builtins", "collections", "enum", "numpy", "typing", "typing_extensions"}
"""Classes of these packages do not collect what user code computes."""


class Holder(ABC):
    """Something that holds objects.

    Attributes:
        kind: What it is, for messages.
        values: The objects that belong there.
    """

    is_fixed: ClassVar[bool] = False

    def __init__(self, owner: object, values: Sequence[Any]) -> None:
        self.kind = f"a {type(owner).__name__}"
        self.values = values
        self._originals = values
        self._changes = len(values) < LARGE

    def restore(self, references: object | None, *, thorough: bool) -> bool:
        """Put the objects back where they were, and return whether others were there.

        Args:
            references: None: the original objects belong here again, whatever has replaced them.
            thorough: Whether to look through large containers, too, that have never been found changed.
        """
        if references is None:
            self.values = self._originals
        if not (thorough or self._changes) or not self._differs():
            return False
        self._changes = True
        self._write()
        return True

    def replace(self, value: object, other: object, *, for_good: bool = False) -> None:
        """Let another object belong where `value` does: until the originals come back, unless it is for good."""
        self.values = [other if v is value else v for v in self.values]
        if for_good:
            self._originals = [other if v is value else v for v in self._originals]
        self._write()

    @abstractmethod
    def _differs(self) -> bool:
        """Whether other objects are there now."""

    @abstractmethod
    def _write(self) -> None:
        """Put the objects that belong there in their places, and remove others."""


class _Mapping(Holder):
    def __init__(self, mapping: Any) -> None:
        self._base: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
        self._mapping = mapping
        self._keys = list(self._base.keys(mapping))
        self._has_names = set(map(type, self._keys)) == {str}
        super().__init__(mapping, list(self._base.values(mapping)))

    def _differs(self) -> bool:
        mapping, values = self._mapping, self.values
        if dict.__len__(mapping) != len(values):
            return True
        if not values:
            return False
        keys, there = self._keys, self._base.keys(mapping)
        same = list(there) == keys if self._has_names else all(map(is_, there, keys))
        return not same or not all(map(is_, self._base.values(mapping), values))

    def _write(self) -> None:
        self._base.clear(self._mapping)
        for key, value in zip(self._keys, self.values, strict=True):
            self._base.__setitem__(self._mapping, key, value)


class _Attributes(_Mapping):
    """The `__dict__` of an object."""

    def __init__(self, owner: object, mapping: dict[str, Any]) -> None:
        self._owner = owner
        super().__init__(mapping)
        self.kind = f"a {type(owner).__name__}"

    def _differs(self) -> bool:
        return object.__getattribute__(self._owner, "__dict__") is not self._mapping or super()._differs()

    def _write(self) -> None:
        if object.__getattribute__(self._owner, "__dict__") is not self._mapping:
            object.__setattr__(self._owner, "__dict__", self._mapping)
        super()._write()


class _Slots(Holder):
    def __init__(self, owner: object, names: Sequence[str]) -> None:
        self._owner = owner
        self._names = names
        super().__init__(owner, [_slot(owner, name) for name in names])

    def _differs(self) -> bool:
        return any(_slot(self._owner, n) is not v for n, v in zip(self._names, self.values, strict=True))

    def _write(self) -> None:
        for name, value in zip(self._names, self.values, strict=True):
            if value is not _Nothing:
                object.__setattr__(self._owner, name, value)
            elif _slot(self._owner, name) is not _Nothing:
                object.__delattr__(self._owner, name)


class _ScriptTensors(Holder):
    """The parameters and buffers of a scripted module, which is not an object of Python inside."""

    def __init__(self, module: Any) -> None:
        self._module = module
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        self._names = list(tensors)
        super().__init__(module, list(tensors.values()))

    def _differs(self) -> bool:
        return any(getattr(self._module, n) is not v for n, v in zip(self._names, self.values, strict=True))

    def _write(self) -> None:
        for name, value in zip(self._names, self.values, strict=True):
            setattr(self._module, name, value)


class _ClassBody(Holder):
    """The attributes of a class that are data, classes among them: no methods or properties."""

    def __init__(self, owner: type) -> None:
        self._owner = owner
        data = self._data()
        self._names = list(data)
        self._size = len(vars(owner))
        super().__init__(owner, list(data.values()))
        self.kind = f"the class {owner.__name__}"

    def _data(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self._owner).items()
            if not (name.startswith("__") or hasattr(type(value), "__get__"))
        }

    def _differs(self) -> bool:
        own = vars(self._owner)
        return len(own) != self._size or not all(map(is_, map(own.get, self._names), self.values))

    def _write(self) -> None:
        for name in self._data():
            if name not in self._names:
                type.__delattr__(self._owner, name)
        for name, value in zip(self._names, self.values, strict=True):
            if vars(self._owner).get(name, _Nothing) is not value:
                type.__setattr__(self._owner, name, value)


class _Sequence(Holder):
    def __init__(self, sequence: Any, base: Any) -> None:
        self._base = base
        self._sequence = sequence
        super().__init__(sequence, list(base.__iter__(sequence)))

    def _differs(self) -> bool:
        now, values = self._sequence, self.values
        return self._base.__len__(now) != len(values) or not all(map(is_, self._base.__iter__(now), values))

    def _write(self) -> None:
        self._base.clear(self._sequence)
        (self._base.update if self._base is set else self._base.extend)(self._sequence, self.values)


class _Fixed(Holder):
    """A tuple or a frozen set."""

    is_fixed: ClassVar[bool] = True

    def __init__(self, items: Any, base: Any) -> None:
        super().__init__(items, list(base.__iter__(items)))

    def _differs(self) -> bool:
        return False

    def _write(self) -> None:
        """Leave it as it is."""


class _Numbers(Holder):
    """A `bytearray` or `array.array`."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers
        self._saved = numbers[:]
        super().__init__(numbers, [])

    def _differs(self) -> bool:
        return bytes(self._numbers) != bytes(self._saved)

    def _write(self) -> None:
        self._numbers[:] = self._saved


class Empties:
    """Containers that were empty: most are, and all of them together are looked at in no time."""

    kind = "a container"

    def __init__(self, containers: Sequence[Any]) -> None:
        self._containers = containers

    def restore(self, references: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Empty them again."""
        if not any(self._containers):
            return False
        for value in self._containers:
            value.clear()
        return True


def container(value: Any) -> Holder | None:
    """Return the holder that a container is; None if the value is none."""
    kind = type(value)
    if issubclass(kind, dict):
        return _Mapping(value)
    growing: Sequence[type] = (list, deque, set)
    for base in growing:
        if issubclass(kind, base):
            return _Sequence(value, base)
    fixed: Sequence[type] = (tuple, frozenset)
    for base in fixed:
        if issubclass(kind, base):
            return _Fixed(value, base)
    return _Numbers(value) if issubclass(kind, (bytearray, array.array)) else None


def attributes(value: object) -> list[Holder]:
    """Return the holders of an object's attributes."""
    found: list[Holder] = []
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = None
    if isinstance(own, dict) and own is not value:
        found.append(_Attributes(value, own))
    kind: Any = type(value)
    names = _slot_names(kind)
    if names:
        found.append(_Slots(value, names))
    if issubclass(kind, torch.jit.ScriptModule):
        found.append(_ScriptTensors(value))
    return found


@functools.lru_cache
def user_classes(cls: Any) -> tuple[type, ...]:
    """Return a class and its bases, without those of libraries."""
    return tuple(c for c in cls.__mro__ if str(c.__module__).split(".", maxsplit=1)[0] not in _LIBRARIES)


def class_body(owner: type) -> Holder:
    """Return the holder of the data in the body of a class."""
    return _ClassBody(owner)


@functools.lru_cache
def _slot_names(cls: Any) -> tuple[str, ...]:
    """Return the names of the attributes that objects of a class keep in slots; `copyreg` would note them in it."""
    names = []
    for c in cls.__mro__:
        own = vars(c).get("__slots__", ())
        for name in [own] if isinstance(own, str) else own:
            is_private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{c.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in names if name not in {"__dict__", "__weakref__"})


def _slot(owner: object, name: str) -> Any:
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return _Nothing
