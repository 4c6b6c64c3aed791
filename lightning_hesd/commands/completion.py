"""`lightning-hesd completion`: the script by which a shell completes commands, options and their values."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from lightning_hesd.commands.cli import full_parser
from lightning_hesd.commands.errors import MISSING, CommandError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="The shell: bash, zsh or tcsh.")


def run(config: Namespace) -> None:
    """Print the script.

    Raises:
        CommandError: If shtab is not installed.
    """
    if find_spec("shtab") is None:
        raise CommandError(MISSING.format("shtab"))
    print(full_parser().get_completion_script(f"shtab-{config.shell}"))
