"""Errors that end a command with one line."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from lightning_hesd.spectra.analysis_lines import listed
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator


MISSING = "{} is not installed; pip install 'lightning-hesd[cli]'"


class CommandError(Exception):
    """The command cannot do what the user asked for; the message says why."""


@contextlib.contextmanager
def reported(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Let exceptions of some kinds end the command with a message, and with theirs in the same line.

    Raises:
        CommandError: In place of such an exception; a CommandError itself is left alone.
    """
    try:
        yield
    except CommandError:
        raise
    except kinds as error:
        msg = f"{message}: {plain(one_line(error))}"
        raise CommandError(msg) from error


KINDS = {
    "float": "a number",
    "int": "an integer",
    "bool": "true or false",
    "str": "a text",
    "dict": "a dictionary",
    "list": "a list",
    "tuple": "a list",
    "Path": "the name of a file",
}
"""What values of a type are called in messages."""


def plain(message: str) -> str:
    """Return a message of jsonargparse in one line, and without the names of types and of its own parts.

    Examples:
        >>> plain('Parser key "mode": Expected a typing.Literal[1, 2]. Got value: up')
        "mode must be 1 or 2, got 'up'"
        >>> plain("the following arguments are required: judge.metric")
        'the following arguments are required: metric'
    """
    message = " ".join(message.split())
    if message.startswith("the following arguments are required: "):
        return re.sub(r" [\w-]+\.", " ", message)
    found = re.search(r'Parser key "([^"]+)": (.*?) (?:Given value type: .*?)?(?:Got|Given) value: (.*)', message)
    if found is None:
        return message
    key, words, value = found.groups()
    choices = [choice for listed in re.findall(r"Literal\[(.*?)\]", words) for choice in listed.split(", ")]
    kinds = [KINDS[name] for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", words) if name in KINDS]
    expected = listed([*dict.fromkeys([*choices, *kinds])] or ["of another type"], "or")
    return f"{key.removeprefix('instance.')} must be {expected}, got {value!r}"


def missing_dependency(error: ModuleNotFoundError) -> str:
    """Return the message about an optional dependency that is not installed."""
    return f"lightning-hesd: error: {MISSING.format(error.name)}"
