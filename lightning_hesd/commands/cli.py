"""`lightning-hesd`: analyze checkpoints, estimate the cost of that, judge checkpoint rules, draw and report."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hesd.commands.errors import CommandError, missing_dependency
from lightning_hesd.commands.plain_parser import PlainParser
from lightning_hesd.spectra.assessment import CAVEAT

if TYPE_CHECKING:
    from collections.abc import Sequence

REPORTED = (CommandError, ValueError, OSError, ArithmeticError, RuntimeError, TypeError)
"""Exceptions that end the command with their message in one line; so does Lightning's MisconfigurationException."""

DESCRIPTION = (
    "Analyze the Hessian's spectrum at checkpoints of a network, and use the results of runs with the callback."
)

COMMANDS = {
    "analyze": "analyze the Hessian's spectrum at the weights of checkpoints",
    "assess": f"apply the criteria of Gabdullin (2025, Fig. 10) to two spectra ({CAVEAT})",
    "plot": "draw spectral densities",
    "judge": "compare the checkpoint rules by what their picks were worth in given runs",
    "report": "write runs as one HTML file: a summary in words, and the content of TensorBoard's HESD tab",
    "sample-size": "estimate how many samples are enough at the weights of checkpoints",
    "estimate": "estimate what one analysis will cost: time, memory and communication",
    "completion": "print the script by which bash, zsh or tcsh completes these commands",
}
"""The commands, and what each does. A command has a module of its name with the functions `add_arguments(parser)` and
`run(config)`. It is imported when the command is asked for, because PyTorch and Lightning take seconds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with code 1 if the command fails, 2 if it cannot be understood.

    Without arguments, print the help.
    """
    sys.path.insert(0, str(Path.cwd()))  # where `python` itself would look for the user's modules
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    module = _module(words)
    parser = _parser() if module is None else _parser(module)
    if not words:
        parser.print_help()
        return
    separated = getattr(module, "separated", str)
    config = parser.parse_args([separated(word) for word in words])
    try:
        module.run(config[config.subcommand])
    except Exception as error:
        if not (isinstance(error, REPORTED) or _is_misuse_of_lightning(error)):
            raise
        said = " ".join(str(error).split()).replace("the callback `loss_fn=`", "`--loss_fn`")
        sys.stderr.write(f"lightning-hesd: error: {said}\n")
        sys.exit(1)


def _is_misuse_of_lightning(error: Exception) -> bool:
    from lightning_hesd.training.compat.namespaces import FABRIC, lightning_types  # noqa: PLC0415 - slow

    return isinstance(error, lightning_types("utilities.exceptions.MisconfigurationException", of=FABRIC))


def _module(words: Sequence[str]) -> Any:
    """Return the module of the command that the words ask for; None if they ask for none, or for help first."""
    name = next((word for word in words if not word.startswith("-") or word in {"-h", "--help"}), None)
    if name not in COMMANDS:
        return None
    try:
        return importlib.import_module(_module_name(name))
    except ModuleNotFoundError as error:
        sys.exit(missing_dependency(error))


def _module_name(command: str) -> str:
    return f"lightning_hesd.commands.{command.replace('-', '_')}"


def full_parser() -> PlainParser:
    """Return the parser of all commands with all their arguments."""
    return _parser(*(importlib.import_module(_module_name(name)) for name in COMMANDS))


def _parser(*modules: Any) -> PlainParser:
    """Return the parser; only the commands of the given modules have their arguments."""
    by_name = {module.__name__: module for module in modules}
    parser = PlainParser(prog="lightning-hesd", description=DESCRIPTION, version=version("lightning-hesd"))
    subcommands = parser.add_subcommands()
    for name, purpose in COMMANDS.items():
        sub = PlainParser(description=f"{purpose[0].upper()}{purpose[1:]}.")
        if _module_name(name) in by_name:
            by_name[_module_name(name)].add_arguments(sub)
        subcommands.add_subcommand(name, sub, help=purpose)
    return parser
