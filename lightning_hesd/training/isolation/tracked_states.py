"""States of objects outside the module, and where these were found: compared quickly, and restored in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum, auto
from functools import partial
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_hesd.numerics.isolation.attributes import ClassState
from lightning_hesd.numerics.isolation.containers import BufferState, container_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd.numerics.isolation.containers import ContentState

LARGE_CONTAINER = 10_000
"""Number of items above which a container is compared only at the end of an analysis; until then only its length is.

The items of such containers are not searched.
"""

LARGE_BYTES = 2**20
"""Bytes above which an array or a buffer is compared only at the end of an analysis."""


class Owner(IntEnum):
    """To whom an object belongs, by the place where it was found: the module, the user outside it, or the Trainer."""

    MODULE = auto()
    USER = auto()
    TRAINER = auto()


class Place(NamedTuple):
    """The place where an object was found.

    Attributes:
        parent: Place of the object that refers to it; None for a root.
        label: Name within the parent, such as ".name" or "[0]".
        owner: To whom it belongs.
        of_attributes: Whether the object holds attributes, and not items.
    """

    parent: Place | None
    label: str
    owner: Owner
    of_attributes: bool = False

    def __str__(self) -> str:
        """Return the place as an expression, such as "self.layers[0]"."""
        labels: list[str] = []
        place: Place | None = self
        while place is not None:
            labels.append(place.label)
            place = place.parent
        return "".join(reversed(labels))

    def label_of(self, key: object) -> str:
        """Return the label of an item or attribute."""
        if self.of_attributes:
            return f".{key}"
        return f"[{key!r}]" if isinstance(key, str | int) else "[...]"


class TrackedState(ABC):
    """The state of an object as it was when this was made.

    Attributes:
        place: Where the object was found.
        is_large: Whether comparing takes too long for every evaluation.
    """

    place: Place
    is_large: bool = False

    @abstractmethod
    def changed(self) -> list[str]:
        """Return the labels of everything that differs now; "" stands for the whole object."""

    @abstractmethod
    def restore(self) -> None:
        """Restore the state."""


class TrackedContent(TrackedState):
    """The content of a container or a buffer, or the attributes of an object or a class.

    Objects are compared by identity; each of them that can change has a state of its own.
    """

    def __init__(self, content: ContentState, place: Place) -> None:
        self.place = place
        self.content = content
        size = len(content.content) if isinstance(content, BufferState) else 0
        self.is_large = len(content.values) > LARGE_CONTAINER or size > LARGE_BYTES

    @classmethod
    def of(cls, container: Any, place: Place) -> TrackedContent:
        """Return the state of a container or a class.

        Raises:
            TypeError: If the object is neither.
        """
        content = ClassState(container, methods=True) if isinstance(container, type) else container_state(container)
        if content is None:
            raise TypeError(type(container))
        return cls(content, place)

    def changed(self) -> list[str]:
        """Return the labels of items or attributes that differ; "" if their order does, or if they have no labels."""
        if not self.content.differs():
            return []
        saved, now = dict(zip(self.content.keys or (), self.content.values, strict=False)), self.content.current()
        missing = object()
        keys = [key for key in {**saved, **now} if saved.get(key, missing) is not now.get(key, missing)]
        return [self.place.label_of(key) for key in keys] or [""]

    def restore(self) -> None:
        """Restore items or attributes, in their order."""
        self.content.write()


class TrackedValue(TrackedState):
    """A value that is compared as a whole, by a function that tells whether it is as before."""

    def __init__(
        self, place: Place, is_same: Callable[[], bool], write: Callable[[], object], *, is_large: bool = False
    ) -> None:
        """Take the functions that compare the value with its state before, and that restore this state."""
        self.place = place
        self.is_large = is_large
        self._is_same, self._write = is_same, write

    @classmethod
    def of_array(cls, values: np.ndarray[Any, Any], place: Place) -> TrackedValue:
        """Return the elements of a NumPy array; compared as bytes, because NaN is not equal to itself."""
        before = values.copy()

        def is_same() -> bool:
            return bool(values.shape == before.shape and values.tobytes() == before.tobytes())

        return cls(place, is_same, partial(np.copyto, values, before), is_large=values.nbytes > LARGE_BYTES)

    @classmethod
    def of_table(cls, table: Any, place: Place) -> TrackedValue:
        """Return the content of a DataFrame or a Series of pandas."""
        before = table.copy()

        def write() -> None:  # as the methods of pandas with `inplace=True` do
            table._update_inplace(before.copy())  # noqa: SLF001

        return cls(place, lambda: before.equals(table), write, is_large=table.size > LARGE_CONTAINER)

    @classmethod
    def of_setting(cls, name: str, read: Callable[[], object], write: Callable[[Any], object]) -> TrackedValue:
        """Return a setting of the process, which functions read and write."""
        before = read()
        return cls(Place(None, name, Owner.USER), lambda: read() == before, lambda: write(before))

    def changed(self) -> list[str]:
        """Return a label if the value differs."""
        return [] if self._is_same() else [""]

    def restore(self) -> None:
        """Restore the value."""
        self._write()


class TrackedStates:
    """Many states, compared and restored together."""

    def __init__(self, states: Sequence[TrackedState]) -> None:
        self._states = states
        self._views = [view for state in states if not state.is_large for view in _views(state)]
        self._large_views = [view for state in states if state.is_large for view in _views(state)]
        self._others = [state for state in states if not (state.is_large or _views(state))]
        self._save_views()

    def _save_views(self) -> None:
        """Save the present items for the fast comparison."""
        self._items = list(chain.from_iterable(self._views))
        self._lengths = list(map(len, self._views))
        self._large_lengths = list(map(len, self._large_views))

    def _is_unchanged(self) -> bool:
        """Whether all states but the large ones are unchanged; one loop without Python code compares all items."""
        try:
            return (
                list(map(len, self._views)) == self._lengths
                and all(map(is_, chain.from_iterable(self._views), self._items))
                and not any(state.changed() for state in self._others)
            )
        except RuntimeError:  # another thread is changing one of the containers
            return False

    def restore(self, *, thorough: bool = False) -> dict[str, Exception | None]:
        """Restore all states that have changed.

        Args:
            thorough: Whether to compare large states, too, even if their lengths are the same.

        Returns:
            The names of objects that could not be restored -> the error; None if there was no error.
        """
        unrestored: dict[str, Exception | None] = {}
        thorough = thorough or list(map(len, self._large_views)) != self._large_lengths
        if not thorough and self._is_unchanged():
            return unrestored
        for state in self._states:
            if state.is_large and not thorough:
                continue
            try:
                if state.changed():
                    state.restore()
                    unrestored |= {f"{state.place}{label}": None for label in state.changed()}
            except Exception as error:  # noqa: BLE001 - returned to the caller; the others are restored
                unrestored[str(state.place)] = error
        self._save_views()
        return unrestored

    def changed(self) -> list[str]:
        """Return the names of everything that differs now."""
        return [f"{state.place}{label}" for state in self._states for label in state.changed()]


def _views(state: TrackedState) -> tuple[Any, ...]:
    return state.content.views if isinstance(state, TrackedContent) else ()
