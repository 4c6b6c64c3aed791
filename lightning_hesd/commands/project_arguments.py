"""The arguments that commands on checkpoints share: checkpoints, their model and their data."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_hesd.commands.errors import CommandError, reported
from lightning_hesd.commands.project import Blueprint, Project, imported
from lightning_hesd.training.compat.namespaces import FABRIC, PYTORCH, lightning_types

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jsonargparse import ArgumentParser, Namespace

MODE = (
    "Mode of the module: 'eval'; 'deterministic', training mode without dropout and batch statistics; 'train'; 'keep', "
    "the present one; or 'auto', the one that the run chose."
)
SEPARATE = {"model": "model_args", "data": "data_args", "generalization": "generalization_args"}


def add_project(parser: ArgumentParser, *, in_one_process: bool = False) -> None:
    """Add the arguments about checkpoints, their model and their data; for several devices unless in one process."""
    parser.add_argument(
        "checkpoints", nargs="+", type=str, help="Lightning checkpoints, or patterns such as 'runs/*.ckpt'."
    )
    parser.add_argument("--config", type=str | None, help="A LightningCLI config.yaml to take `model` and `data` from.")
    parser.add_argument(
        "--model", type=str | None, help="LightningModule, as package.Class; --model.ARGUMENT for its own."
    )
    parser.add_argument("--model_args", type=dict[str, Any], default={}, help="Arguments of the module.")
    parser.add_argument(
        "--data", type=str | None, help="LightningDataModule, as package.Class; --data.ARGUMENT for its own."
    )
    parser.add_argument("--data_args", type=dict[str, Any], default={}, help="Arguments of the data module.")
    parser.add_argument(
        "--loss_fn", type=str | None, help="Function (module, batch) -> mean loss, as package.function."
    )
    ranks = {"devices", "num_nodes", "strategy"} if in_one_process else set[str | int]()
    parser.add_class_arguments(Project, skip={"model", "data", "loss_fn", *ranks})


def separated(argument: str) -> str:
    """Return --model.x and --model.init_args.x as --model_args.x, the form for entries of dictionaries."""
    return re.sub(rf"^--({'|'.join(SEPARATE)})\.(init_args\.)?", lambda match: f"--{SEPARATE[match[1]]}.", argument)


def project_of(config: Namespace) -> Project:
    """Return the project that the arguments, and the configuration of LightningCLI, describe."""
    given = {} if config.config is None else _lightning_config(Path(config.config))
    settings = {field.name for field in fields(Project)} - {"model", "data", "loss_fn"}
    return Project(
        model=_blueprint("model", config, given),
        data=_blueprint("data", config, given),
        loss_fn=None if config.loss_fn is None else imported(config.loss_fn),
        **{name: config[name] for name in settings if name in config},
    )


def _lightning_config(path: Path) -> dict[str, Any]:
    with reported(f"cannot read the configuration {path}", OSError, UnicodeDecodeError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        msg = f"{path} is no configuration of LightningCLI: it must have `model` and `data`."
        raise CommandError(msg)
    return found


def _blueprint(part: str, config: Namespace, given: Mapping[str, Any]) -> Blueprint:
    """Return the class that the command line names, else the configuration, with the arguments of both.

    Raises:
        CommandError: If neither names a class.
    """
    configured = given.get(part) or {}
    is_subclass = isinstance(configured, dict) and "class_path" in configured
    class_path = config[part] or (configured["class_path"] if is_subclass else None)
    if class_path is None:
        msg = f"there is no {part}: pass --{part} package.Class, or --config with a `class_path` for it."
        raise CommandError(msg)
    imported(class_path)  # now, so that `without_advice` finds the namespace of Lightning that it uses
    arguments = configured.get("init_args") or {} if is_subclass else configured
    return Blueprint(class_path, {**arguments, **config[SEPARATE[part]]})


def checkpoints_of(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoints by name: the stem, after the names of folders where stems are the same.

    Raises:
        CommandError: If a file does not exist, or a pattern matches none.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(glob(pattern, recursive=True)) if re.search(r"[*?\[]", pattern) else [pattern]  # noqa: PTH207
        found = found or ([pattern] if Path(pattern).exists() else [])
        if not found:
            msg = f"no file matches {pattern!r}."
            raise CommandError(msg)
        paths.update((Path(path), None) for path in found)
    for path in paths:
        if not path.is_file():
            msg = f"{path} is no file." if path.exists() else f"{path} does not exist."
            raise CommandError(msg)
    names: dict[str, Path] = {}
    for path in paths:
        _, *parts = path.resolve().with_suffix("").parts
        longer = ["_".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        names[next((name for name in longer if name not in names), longer[-1])] = path
    return names


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Silence Lightning's list of devices, its advice on training, and advice on the code of Lightning."""
    with contextlib.ExitStack() as stack:
        for name in PYTORCH:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        names = "|".join(re.escape(name) for name in PYTORCH)
        stack.enter_context(warnings.catch_warnings())
        for category in lightning_types("utilities.warnings.PossibleUserWarning", of=FABRIC):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"({names})\.")  # of PyTorch, to Lightning
        yield
