"""Checks of arguments that several modules make."""

from __future__ import annotations

WANTED = {0: "a non-negative integer", 1: "a positive integer"}


def check_count(name: str, value: object, least: int = 1, *, alternative: str | None = None) -> None:
    """Check that an argument is a whole number, and large enough, or a text that stands for one.

    Raises:
        ValueError: If it is not.
    """
    if alternative is not None and value == alternative:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = WANTED.get(least, f"an integer of at least {least}")
        if alternative is not None:
            wanted += f" or {alternative!r}"
        msg = f"`{name}` must be {wanted}, got {value!r}."
        raise ValueError(msg)
