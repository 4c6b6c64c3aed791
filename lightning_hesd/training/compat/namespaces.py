"""The two namespaces of Lightning, `lightning.pytorch` and `pytorch_lightning`: the same code in separate classes.

Users have one or the other, or both in one process. This package is written for the first. It supports the second once
other code has imported it, and never imports it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from importlib.abc import MetaPathFinder
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.fabric.utilities.exceptions
import lightning.pytorch  # noqa: F401 - the first namespace is always imported

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    Class = TypeVar("Class", bound=type)

PYTORCH = ("lightning.pytorch", "pytorch_lightning")
FABRIC = ("lightning.fabric", "lightning_fabric")
"""The packages that the two namespaces build on, which exist twice, too."""

_SHARED: list[tuple[type, str, tuple[str, ...]]] = []


def lightning_types(*paths: str, of: tuple[str, ...] = PYTORCH) -> Any:
    """Return classes of Lightning in each namespace that has been imported, for `isinstance`.

    It is a tuple, typed so that type checkers accept any class.

    Args:
        *paths: Names within a namespace, such as "callbacks.ModelCheckpoint"; names that a version lacks are left out.
        of: The namespaces.
    """
    return _found(paths, tuple(name for name in of if _is_imported(name)))


def _is_imported(name: str) -> bool:
    """Return whether a namespace has been imported to its end, where these names are defined."""
    module = sys.modules.get(name)
    return hasattr(module, "Trainer") or hasattr(module, "Fabric")


@functools.cache
def _found(paths: tuple[str, ...], namespaces: tuple[str, ...]) -> tuple[Any, ...]:
    found: list[Any] = []
    for namespace, path in itertools.product(namespaces, paths):
        with contextlib.suppress(AttributeError):  # in another version
            found.append(attrgetter(path)(sys.modules[namespace]))
    return tuple(found)


def namespace_of(value: object) -> ModuleType:
    """Return the namespace of a Trainer or LightningModule.

    Raises:
        TypeError: If it is of neither namespace.
    """
    for kind in type(value).__mro__:
        for name in PYTORCH:
            if f"{kind.__module__}.".startswith(f"{name}."):
                return sys.modules[name]
    msg = f"expected an object of {' or '.join(PYTORCH)}, got {type(value).__name__} of {type(value).__module__}."
    raise TypeError(msg)


def of_every_namespace(path: str, *, of: tuple[str, ...] = PYTORCH) -> Callable[[Class], Class]:
    """Make a class that derives from a class of the first namespace derive from that of the second, too.

    Trainers recognize callbacks by `isinstance`, and LightningCLI the classes in its configurations by `issubclass`.
    The second class is the last base, so that everything is inherited from the first namespace.

    Args:
        path: Name of the base class, within a namespace.
        of: The namespaces.
    """

    def register(cls: Class) -> Class:
        _SHARED.append((cls, path, of))
        join_namespaces()
        return cls

    return register


def join_namespaces() -> None:
    """Add the base classes of a namespace that has been imported since the last call.

    It is called whenever a callback is made or set up, and by `_Listener` on every import.
    """
    for cls, path, of in _SHARED:
        for base in lightning_types(path, of=of):
            if not issubclass(cls, base):
                cls.__bases__ = (*cls.__bases__, _in_name_only(base))


def _in_name_only(base: type) -> type:
    """Return a class without its constructor, which the one of `lightning.pytorch` would call by `super()`."""
    if not inspect.isfunction(inspect.getattr_static(base, "__init__")):
        return base

    def init(_self: object) -> None:
        pass

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__, "__doc__": base.__doc__})


class _Listener(MetaPathFinder):
    """Notices all imports, and finds no module.

    LightningCLI is imported after its namespace, and asks for classes of callbacks before any callback is made.
    """

    def find_spec(self, *_: object) -> None:
        join_namespaces()


sys.meta_path.insert(0, _Listener())


@of_every_namespace("utilities.exceptions.MisconfigurationException", of=FABRIC)
class MisconfigurationException(lightning.fabric.utilities.exceptions.MisconfigurationException):
    """An invalid use of a Trainer or module; users of either namespace can catch it as Lightning's own exception."""
