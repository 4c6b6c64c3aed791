"""A parser whose help and errors are in plain words: without names of types, and each error in one line."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lightning_hesd.commands.errors import plain

if TYPE_CHECKING:
    from argparse import Action

EMPTY = re.compile(r" \(default: (?:null|\{\}|\[\])\)$")
"""The end of a help text about an argument that is left out by default."""


class PlainHelpFormatter(DefaultHelpFormatter):
    """Formats help without names of types and Python's None: the words of an argument say what it takes."""

    def _get_type_str(self, action: Action) -> str | None:  # noqa: ARG002
        return None

    def _expand_help(self, action: Action) -> str:
        return EMPTY.sub("", super()._expand_help(action)).replace("None: ", "default: ")


class PlainParser(ArgumentParser):
    """A parser with plain help, whose errors take one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=PlainHelpFormatter, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        """Say what is wrong and where to look, and exit with code 2."""
        sys.stderr.write(
            f"lightning-hesd: error: {self._with_dashes(plain(message))} (--help explains the arguments)\n"
        )
        sys.exit(2)

    def _with_dashes(self, message: str) -> str:
        """Return a message that begins with the name of an option, with the dashes before it."""
        name = message.partition(" ")[0]
        options = [option for action in self._actions if action.dest == name for option in action.option_strings]
        return message.replace(name, options[0], 1) if options else message
