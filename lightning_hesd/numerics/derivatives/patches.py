"""Attributes of other people's objects, classes and modules that have another value for a while."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class _Patches:
    """What one attribute is patched with.

    Attributes:
        is_own: Whether the object had the attribute itself, and does not inherit it.
        before: Its value without patches.
        values: The patches that have begun and not ended, each a list with its value; the last one holds.
    """

    is_own: bool
    before: Any
    values: list[list[Any]] = field(default_factory=list)


_PATCHES: dict[tuple[int, str], _Patches] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an attribute of an object, a class or a module another value, in all threads.

    Several trainings may run in threads of one process, so patches of one attribute may end in any order. The last to
    end puts back what there was before the first.
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
