"""The attributes of objects and classes: read, compared by identity, restored in place."""

from __future__ import annotations

import functools
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_hesd.numerics.isolation.containers import ContentState, MappingState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FRAMEWORKS = {"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_hesd"}
"""Packages whose objects (trainers, optimizers, hooks) are running machinery, unless they are modules."""

_LIBRARIES = {*FRAMEWORKS, "abc", "builtins", "collections", "enum", "numpy", "typing", "typing_extensions"}
"""Packages whose classes have no mutable class attributes."""


_SCRIPTED = (bool, int, float, str, list, tuple, dict, torch.Tensor)
"""Types of attributes of scripted modules that can be written back."""


class _Unset:
    """Stands for an attribute that is not set."""


class _AttributeDictState(MappingState):
    """The `__dict__` of an object."""

    def __init__(self, owner: object, mapping: dict[str, Any]) -> None:
        self._owner = owner
        super().__init__(mapping)
        self.description = f"a {type(owner).__name__}"

    @override
    def differs(self) -> bool:
        return object.__getattribute__(self._owner, "__dict__") is not self._mapping or super().differs()

    @override
    def write(self) -> None:
        if object.__getattribute__(self._owner, "__dict__") is not self._mapping:
            object.__setattr__(self._owner, "__dict__", self._mapping)
        super().write()


class SlotState(ContentState):
    """The attributes that an object keeps in slots."""

    def __init__(self, owner: object) -> None:
        self._owner = owner
        kind: Any = type(owner)
        super().__init__(owner, [self._get(name) for name in slot_names(kind)], slot_names(kind))

    def _get(self, name: str) -> Any:
        try:
            return object.__getattribute__(self._owner, name)
        except AttributeError:
            return _Unset

    def _set(self, name: str, value: object) -> None:
        if value is not _Unset:
            object.__setattr__(self._owner, name, value)
        elif self._get(name) is not _Unset:
            object.__delattr__(self._owner, name)

    @override
    def current(self) -> Mapping[str, Any]:
        return {name: self._get(name) for name in self.keys or ()}

    @override
    def differs(self) -> bool:
        return not all(map(is_, map(self._get, self.keys or ()), self.values))

    @override
    def write(self) -> None:
        for name, value in zip(self.keys or (), self.values, strict=True):
            self._set(name, value)


class _ScriptState(SlotState):
    """The mode, attributes, parameters and buffers of a scripted module, which are no attributes of a Python object.

    Reading a list or a dict of a scripted module returns a copy, which is written back.
    """

    def __init__(self, module: Any) -> None:
        self._owner = module
        saved = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        for name in module._concrete_type.get_attributes():  # noqa: SLF001 - there is no other way to list them
            if isinstance(value := getattr(module, name, _Unset), _SCRIPTED):
                saved.setdefault(name, value)
        ContentState.__init__(self, module, list(saved.values()), list(saved))

    @override
    def _get(self, name: str) -> Any:
        return getattr(self._owner, name)

    @override
    def _set(self, name: str, value: object) -> None:
        setattr(self._owner, name, value)


class ClassState(ContentState):
    """The attributes of a class, without special names: these Python itself fills in."""

    def __init__(self, owner: type, *, methods: bool) -> None:
        """Save the data of a class, and methods and properties, too, if `methods` is set."""
        self._owner = owner
        self._methods = methods
        self._size = len(vars(owner))
        self.views = vars(owner).keys(), vars(owner).values()
        attributes = self.current()
        super().__init__(owner, list(attributes.values()), list(attributes))
        self.description = f"the class {owner.__name__}"

    @override
    def current(self) -> Mapping[str, Any]:
        return {
            name: value
            for name, value in vars(self._owner).items()
            if not (name.startswith("__") or (hasattr(type(value), "__get__") and not self._methods))
        }

    @override
    def differs(self) -> bool:
        own, names = vars(self._owner), self.keys or ()
        if len(own) != self._size and set(self.current()) != set(names):
            return True
        return not all(map(is_, map(own.get, names), self.values))

    @override
    def write(self) -> None:
        saved = dict(zip(self.keys or (), self.values, strict=True))
        for name in set(self.current()) - set(saved):
            type.__delattr__(self._owner, name)
        for name, value in saved.items():
            if vars(self._owner).get(name, _Unset) is not value:
                type.__setattr__(self._owner, name, value)


def attribute_states(value: object) -> list[ContentState]:
    """Save the attributes of an object: those in its `__dict__`, in slots, and of a scripted module."""
    found: list[ContentState] = []
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = None
    if isinstance(own, dict) and own is not value:
        found.append(_AttributeDictState(value, own))
    kind: Any = type(value)
    if slot_names(kind):
        found.append(SlotState(value))
    if issubclass(kind, torch.jit.ScriptModule):
        found.append(_ScriptState(value))
    return found


@functools.lru_cache
def user_classes(cls: Any) -> tuple[type, ...]:
    """Return a class and its bases, without those of libraries."""
    return tuple(c for c in cls.__mro__ if str(c.__module__).split(".", maxsplit=1)[0] not in _LIBRARIES)


@functools.lru_cache
def slot_names(cls: Any) -> Sequence[str]:
    """Return the names of the slots of a class and its bases, without writing to the class as `copyreg` does."""
    names = []
    for c in cls.__mro__:
        own = vars(c).get("__slots__", ())
        for name in [own] if isinstance(own, str) else own:
            is_private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{c.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in names if name not in {"__dict__", "__weakref__"})


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, including those in slots."""
    kind: Any = type(value)
    found = {name: getattr(value, name) for name in slot_names(kind) if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}
