"""Temporary values for attributes of objects, classes and modules of other packages."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class _Patches:
    """The active patches of one attribute.

    Attributes:
        is_own: Whether the object itself has the attribute, and does not inherit it.
        before: The value without patches.
        values: The active patches, each a list with its value; the last one counts.
    """

    is_own: bool
    before: Any
    values: list[list[Any]] = field(default_factory=list)


_PATCHES: dict[tuple[int, str], _Patches] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an object, a class or a module in this context, for all threads.

    Threads of one process may train at the same time, so patches of one attribute may end in any order. When the last
    one ends, the value from before the first is restored.
    """
    key, own = (id(owner), name), [value]
    with _LOCK:
        patches = _PATCHES.setdefault(key, _Patches(name in vars(owner), vars(owner).get(name)))
        patches.values.append(own)
        setattr(owner, name, value)
    try:
        yield
    finally:
        with _LOCK:
            patches.values = [other for other in patches.values if other is not own]
            if patches.values:
                setattr(owner, name, patches.values[-1][0])
            else:
                del _PATCHES[key]
                if patches.is_own:
                    setattr(owner, name, patches.before)
                else:
                    delattr(owner, name)
