"""Data of unknown origin, read without trust: JSON from files, checkpoints' states, payloads of event files.

Nothing here runs what it reads. What is not as expected ends in a ValueError, never in another exception later on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Check = Callable[[Any], bool]
Fields = Mapping[str, Check]

MAX_DEPTH = 16
"""Levels of nesting; ours have seven. Far deeper ones would overflow the stack of whoever walks through them."""

MAX_INTEGER = 2**64
"""Seeds of 64 bits are the largest whole numbers there are; larger ones do not even become floats."""


def parsed(source: str | bytes, *, finite: bool = True) -> Any:
    """Return what a JSON text stands for.

    Args:
        source: The text, in UTF-8 if it is bytes.
        finite: Whether NaN and infinity are errors.

    Raises:
        ValueError: If it is no JSON, nested deeper than `MAX_DEPTH`, or has numbers or texts beyond what ours have.
    """
    json_text = source.decode() if isinstance(source, bytes) else source
    try:
        value = json.loads(
            json_text,
            parse_int=_integer,
            parse_float=_finite if finite else float,
            parse_constant=_finite if finite else float,
        )
    except RecursionError as error:
        msg = "it is nested too deeply"
        raise ValueError(msg) from error
    _check_depth(value)
    if "\\ud" in json_text.lower():
        # Half of a pair of surrogates is no character: nobody could print it, or write it to a file.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 21 else MAX_INTEGER
    if abs(value) >= MAX_INTEGER:
        msg = f"it has a whole number of {len(text)} digits"
        raise ValueError(msg)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        msg = f"it has the number {text[:20]}"
        raise ValueError(msg)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            entry
            for part in level
            if isinstance(part, dict | list)
            for entry in (part.values() if isinstance(part, dict) else part)
        ]
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
    """Check that data were written in the format of this version.

    Args:
        version: The version that the data name.
        where: Subject of the message, such as the name of a file.

    Raises:
        ValueError: If the version is another one.
    """
    if version != FORMAT_VERSION:
        msg = f"{where} has version {version}, and this lightning_hesd reads version {FORMAT_VERSION}: update it."
        raise ValueError(msg)


MAX_MESSAGE_LENGTH = 2000
"""Characters: a damaged file may have got any text into a message."""


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, not too long; its class if there is none."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MAX_MESSAGE_LENGTH else f"{said[:MAX_MESSAGE_LENGTH]} ..."


def check_regular(path: Path) -> None:
    """Check that opening a path will not wait for somebody to write, as opening a named pipe does.

    Raises:
        ValueError: If there is something else than a file.
    """
    if path.exists() and not path.is_file():
        msg = "it is no regular file"
        raise ValueError(msg)


# What values may be -----------------------------------------------------------------------------------------------


def of(*kinds: type) -> Check:
    """Check that a value is of one of these types; a truth value is no number."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def each(check: Check) -> Check:
    """Check all entries of a list or tuple."""
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


def each_named(check: Check) -> Check:
    """Check all values of a dict, whose keys are texts."""
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and check(v) for k, v in value.items())


def having(fields: Fields) -> Check:
    """Check that a value is a dict with these fields."""
    return lambda value: first_invalid_field(value, fields) is None


def optional(check: Check) -> Check:
    """Check a value unless it is None."""
    return lambda value: value is None or check(value)


integer, number, text = of(int), of(int, float), of(str)


def at_least(least: int) -> Check:
    """Check that a value is a whole number no smaller than this."""
    return lambda value: integer(value) and value >= least


def within(low: float, high: float) -> Check:
    """Check that a value is a number between two, and not NaN."""
    return lambda value: number(value) and low <= value <= high


def first_invalid_field(values: object, fields: Fields) -> str | None:
    """Return the name of the first field that is missing or invalid; None if all are valid."""
    if not isinstance(values, dict):
        return next(iter(fields))
    return next((name for name, check in fields.items() if name not in values or not check(values[name])), None)


def check_fields(values: object, fields: Fields, owner: str) -> None:
    """Check the fields of a dict.

    Args:
        values: The dict.
        fields: Check of each field that must be there.
        owner: Subject of the message.

    Raises:
        ValueError: If a field is missing or has another kind of value; the message names it.
    """
    wrong = first_invalid_field(values, fields)
    if wrong is not None:
        found = values.get(wrong, "nothing") if isinstance(values, dict) else values
        msg = f"`{wrong}` of {owner} is missing or invalid, got {found!r:.80}"
        raise ValueError(msg)
