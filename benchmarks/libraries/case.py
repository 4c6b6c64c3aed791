"""A LightningModule of a library and its training, to be run without and with the callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Train = Callable[[list[Any], Path], Any]
"""train(callbacks, folder) -> the trained LightningModule.

It seeds everything itself, makes its data, trains for some epochs within seconds, and hands `callbacks` to the Trainer
as the library has it. It writes to `folder`, which is also the working directory.
"""

PLAIN_LINE = 'HessianSpectrumCallback(checkpoint="highest_c_t")'


@dataclass(frozen=True)
class Case:
    """A model of a library.

    Attributes:
        name: As the library calls it.
        train: Trains it.
        loss_fn: The `loss_fn` that the callback is given, where `training_step` has no loss to analyze.
        load: `load(path)` loads the picked checkpoint as the library's users do; None: `torch.load(weights_only=True)`
            and `load_state_dict`.
        note: What readers of the table must know.
    """

    name: str
    train: Train
    loss_fn: Callable[[Any, Any], Any] | None = None
    load: Callable[[str], object] | None = None
    note: str = ""


@dataclass(frozen=True)
class Library:
    """A library, with how it is installed and what is tried of it.

    The library itself is imported by the cases, not by the module that declares it: the command that makes the
    environments reads the declarations where no library is installed.

    Attributes:
        name: As package registries call it.
        requirements: What pip installs, with versions.
        cases: What is tried.
        without_dependencies: What pip installs afterwards, without its dependencies.
        kind: What it is for.
        shown: Further packages whose versions the table shows.
    """

    name: str
    requirements: tuple[str, ...]
    cases: tuple[Case, ...]
    without_dependencies: tuple[str, ...] = ()
    kind: str = ""
    shown: tuple[str, ...] = ()
