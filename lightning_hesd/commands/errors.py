"""Errors that end a command with one line."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        msg = f"{message}: {one_line(error)}"
        raise CommandError(msg) from error


def missing_dependency(error: ModuleNotFoundError) -> str:
    """Return the message about an optional dependency that is not installed."""
    return f"lightning-hesd: error: {error.name} is not installed; pip install 'lightning-hesd[cli]'"
