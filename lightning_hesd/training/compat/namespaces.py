"""The two namespaces of Lightning, `lightning.pytorch` and `pytorch_lightning`: the same code, in classes of their own.

Other people's projects use one or the other, or both in one process. This package is written for the first; of the
second it takes note once it has been imported, and never imports it.
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
import lightning.pytorch  # noqa: F401 - the first namespace is there whenever this module is

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    Class = TypeVar("Class", bound=type)

PYTORCH = ("lightning.pytorch", "pytorch_lightning")
FABRIC = ("lightning.fabric", "lightning_fabric")
"""The same below: what both namespaces build on also exists twice."""

_SHARED: list[tuple[type, str, tuple[str, ...]]] = []


def in_namespaces(*paths: str, of: tuple[str, ...] = PYTORCH) -> tuple[Any, ...]:
    """Return what Lightning has under some names, in each namespace that has been imported.

    Args:
        *paths: Names within a namespace, such as "callbacks.ModelCheckpoint"; a version may lack some.
        of: The namespaces.
    """
    return _found(paths, tuple(name for name in of if _is_imported(name)))


def lightning_types(*paths: str, of: tuple[str, ...] = PYTORCH) -> Any:
    """Return classes of Lightning in each namespace that has been imported, for `isinstance`; see `in_namespaces`.

    A tuple, which type checkers may take for any class.
    """
    return in_namespaces(*paths, of=of)


def _is_imported(name: str) -> bool:
    """Whether a namespace has been imported to its end, where these stand."""
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
    """Return the namespace from which the class of a Trainer or LightningModule comes.

    Raises:
        TypeError: If it comes from none.
    """
    for kind in type(value).__mro__:
        for name in PYTORCH:
            if f"{kind.__module__}.".startswith(f"{name}."):
                return sys.modules[name]
    msg = f"expected an object of {' or '.join(PYTORCH)}, got {type(value).__name__} of {type(value).__module__}."
    raise TypeError(msg)


def of_every_namespace(path: str, *, of: tuple[str, ...] = PYTORCH) -> Callable[[Class], Class]:
    """Make a class, which derives from one of the first namespace, derive from that of the other, too.

    Trainers know their callbacks by `isinstance`, and LightningCLI the classes in its configurations by `issubclass`.
    The other class comes last among the bases, so all that is inherited is inherited from the first namespace.

    Args:
        path: Name of the class that it derives from, within a namespace.
        of: The namespaces.
    """

    def register(cls: Class) -> Class:
        _SHARED.append((cls, path, of))
        join_namespaces()
        return cls

    return register


def join_namespaces() -> None:
    """Take note of a namespace that has been imported since the last call.

    It is called whenever a callback is made or set up, and by `_Listener` for the classes themselves.
    """
    for cls, path, of in _SHARED:
        for base in lightning_types(path, of=of):
            if not issubclass(cls, base):
                cls.__bases__ = (*cls.__bases__, _in_name_only(base))


def _in_name_only(base: type) -> type:
    """Return a class without its constructor, which that of `lightning.pytorch` would call by `super()`."""
    if not inspect.isfunction(inspect.getattr_static(base, "__init__")):
        return base

    def init(_self: object) -> None:
        pass

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__, "__doc__": base.__doc__})


class _Listener(MetaPathFinder):
    """Hears of all imports, and finds nothing.

    LightningCLI is imported after its namespace, and asks for the classes of callbacks before there are any callbacks.
    """

    def find_spec(self, *_: object) -> None:
        join_namespaces()


sys.meta_path.insert(0, _Listener())


@of_every_namespace("utilities.exceptions.MisconfigurationException", of=FABRIC)
class MisconfigurationException(lightning.fabric.utilities.exceptions.MisconfigurationException):
    """Something cannot be done with this Trainer or module; users of either namespace catch it as Lightning's own."""
