"""Checks of arguments that several modules make."""

from __future__ import annotations


def check_count(name: str, value: object, least: int = 1) -> None:
    """Check that an argument is a whole number, and large enough.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        msg = f"`{name}` must be {wanted}, got {value!r}."
        raise ValueError(msg)
