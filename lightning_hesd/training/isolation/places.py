"""Places: where objects were found, for messages, and to whom they belong."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import NamedTuple


class Owner(IntEnum):
    """To whom an object belongs, by the place where it was found."""

    MODULE = auto()
    """To the module."""

    USER = auto()
    """To the user, outside the module."""

    TRAINER = auto()
    """To the Trainer."""


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
