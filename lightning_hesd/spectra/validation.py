"""Checks of numbers in arguments, and of data of unknown origin: JSON of files, states in checkpoints, payloads.

Nothing here runs the data. Unexpected data raise a ValueError here, and no other exception later on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

Check = Callable[[Any], bool]
Fields = Mapping[str, Check]

MAX_DEPTH = 16
"""Largest number of nested levels. Our data have seven; far more would overflow the stack of a recursive function."""

MAX_INTEGER = 2**64
"""Bound of integers. Our largest are seeds of 64 bits; much larger ones cannot be converted to floats."""


def parsed(source: str | bytes, *, finite: bool = True) -> Any:
    """Return the value of a JSON text.

    Args:
        source: The text, in UTF-8 if it is bytes.
        finite: Whether NaN and infinity are errors.

    Raises:
        ValueError: If it is no JSON, nested deeper than `MAX_DEPTH`, or has too large numbers or broken characters.
    """
    json_text = source.decode() if isinstance(source, bytes) else source
    try:
        value = json.loads(json_text, parse_int=_integer)
    except RecursionError as error:
        msg = "it is nested too deeply"
        raise ValueError(msg) from error
    _check_entries(value, finite=finite)
    if "\\ud" in json_text.lower():
        # Half of a pair of surrogates is no character: it can neither be printed nor written to a file.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 21 else MAX_INTEGER
    if abs(value) >= MAX_INTEGER:
        msg = f"it has a whole number of {len(text)} digits"
        raise ValueError(msg)
    return value


def _check_entries(value: Any, *, finite: bool) -> None:
    """Check that a value is nested at most `MAX_DEPTH` levels deep and, if `finite`, that its numbers are finite.

    Raises:
        ValueError: If it is not so.
    """
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for part in level:
            entries = list(part.values()) if isinstance(part, dict) else part
            kinds = {*map(type, entries)}  # most lists are of floats, and long: no loop in Python over these
            if finite and float in kinds:
                floats = entries if len(kinds) == 1 else [entry for entry in entries if isinstance(entry, float)]
                if not all(map(math.isfinite, floats)):
                    msg = "it has a number that is not finite"
                    raise ValueError(msg)
            if kinds & {dict, list}:
                below += [entry for entry in entries if isinstance(entry, dict | list)]
        level = below
        if not level:
            return
    msg = f"it is nested more than {MAX_DEPTH} levels deep"
    raise ValueError(msg)


FORMAT_VERSION = 1
"""Version of everything that is written: files, states in checkpoints, payloads, results of the command line.

It changes when a field changes its meaning or goes; new fields alone do not change it."""


def version_in(values: object, key: str = "format") -> int:
    """Return the version that data name.

    Raises:
        ValueError: If they name none.
    """
    version: Any = values.get(key) if isinstance(values, dict) else None
    if not integer(version):
        msg = f"its `{key}` must be a whole number, got {version!r:.40}"
        raise ValueError(msg)
    return int(version)


def check_version(version: int, where: str) -> None:
    """Check that data, named by `where` in the message, were written in the format of this version.

    Raises:
        ValueError: If the version is another one.
    """
    if version != FORMAT_VERSION:
        msg = f"{where} has version {version}, and this lightning_hesd reads version {FORMAT_VERSION}: update it."
        raise ValueError(msg)


MAX_MESSAGE_LENGTH = 2000
"""Largest number of characters of a message, into which a damaged file may bring any text."""


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line of limited length; without a message, the name of its class."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MAX_MESSAGE_LENGTH else f"{said[:MAX_MESSAGE_LENGTH]} ..."


def first_line(text: str | None) -> str:
    """Return the first line of a text, or "" if there is none."""
    return next(iter((text or "").splitlines()), "")


def check_regular(path: Path) -> None:
    """Check that a path is no named pipe or device: opening a pipe would wait until another process writes to it.

    Raises:
        ValueError: If it exists and is no regular file.
    """
    if path.exists() and not path.is_file():
        msg = "it is no regular file"
        raise ValueError(msg)


# Checks of values -----------------------------------------------------------------------------------------------


def of(*kinds: type) -> Check:
    """Return the check for values of some types; bool counts as no number."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def each(check: Check) -> Check:
    """Return the check for lists and tuples whose entries pass a check."""
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


def each_of(*kinds: type) -> Check:
    """Return the check for lists whose entries have exactly some types; far faster than `each` for long ones."""
    return lambda value: isinstance(value, list) and {*map(type, value)} <= {*kinds}


def each_named(check: Check) -> Check:
    """Return the check for dicts with texts as keys whose values pass a check."""
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and check(v) for k, v in value.items())


def having(fields: Fields) -> Check:
    """Return the check for dicts with some fields."""
    return lambda value: first_invalid_field(value, fields) is None


def optional(check: Check) -> Check:
    """Return the check for values that are None or pass a check."""
    return lambda value: value is None or check(value)


integer, number, text = of(int), of(int, float), of(str)


def at_least(least: int) -> Check:
    """Return the check for integers of at least `least`."""
    return lambda value: integer(value) and value >= least


def within(low: float, high: float) -> Check:
    """Return the check for numbers between two, not NaN."""
    return lambda value: number(value) and low <= value <= high


def first_invalid_field(values: object, fields: Fields) -> str | None:
    """Return the name of the first field that is missing or invalid; None if all are valid."""
    if not isinstance(values, dict):
        return next(iter(fields))
    return next((name for name, check in fields.items() if name not in values or not check(values[name])), None)


def check_fields(values: object, fields: Fields, owner: str) -> None:
    """Check that a dict, the owner of the fields in the message, has these fields with valid values.

    Raises:
        ValueError: If a field is missing or has another kind of value; the message names it.
    """
    wrong = first_invalid_field(values, fields)
    if wrong is not None:
        found = values.get(wrong, "nothing") if isinstance(values, dict) else values
        msg = f"`{wrong}` of {owner} is missing or invalid, got {found!r:.80}"
        raise ValueError(msg)


# Checks of arguments --------------------------------------------------------------------------------------------


def check_count(name: str, value: object, least: int = 1, *, alternative: str | None = None) -> None:
    """Check that an argument is an integer of at least `least`, or a text that is allowed in its place.

    Raises:
        ValueError: If it is neither.
    """
    if alternative is not None and value == alternative:
        return
    if not at_least(least)(value):
        wanted = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        if alternative is not None:
            wanted += f" or {alternative!r}"
        msg = f"`{name}` must be {wanted}, got {value!r}."
        raise ValueError(msg)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check that an argument is one of some texts.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        msg = f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}."
        raise ValueError(msg)
