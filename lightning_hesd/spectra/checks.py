"""Checks of arguments that several modules share."""

from __future__ import annotations

WANTED = {0: "a non-negative integer", 1: "a positive integer"}


def check_count(name: str, value: object, least: int = 1, *, alternative: str | None = None) -> None:
    """Check that an argument is an integer.

    Args:
        name: Name of the argument.
        value: Its value.
        least: Smallest value allowed.
        alternative: Text allowed in place of an integer; None: none.

    Raises:
        ValueError: If it is neither.
    """
    if alternative is not None and value == alternative:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = WANTED.get(least, f"an integer of at least {least}")
        if alternative is not None:
            wanted += f" or {alternative!r}"
        msg = f"`{name}` must be {wanted}, got {value!r}."
        raise ValueError(msg)
