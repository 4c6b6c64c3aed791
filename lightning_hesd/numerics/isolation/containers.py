"""Containers of plain values, such as a million file names: recognised without looking at every item in Python."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})


def holds_atoms(container: Any) -> bool:
    """Whether a list, tuple, set, deque or dict holds numbers, texts and None only, or tuples of such.

    What it holds then neither changes nor leads to anything else.
    """
    items = itertools.chain(container, container.values()) if isinstance(container, dict) else container
    kinds = set(map(type, items))
    if tuple not in kinds:
        return kinds <= _ATOMS
    items = container.values() if isinstance(container, dict) else container
    inner: Iterable[Any] = itertools.chain.from_iterable(item for item in items if type(item) is tuple)
    return (kinds - {tuple}) | set(map(type, inner)) <= _ATOMS
