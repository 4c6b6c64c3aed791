"""A LightningModule of a library and its training, to be run without and with the callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Train = Callable[[list[Any], Path], Any]
"""train(callbacks, folder) -> the trained LightningModule.

The function seeds all generators, makes its data, trains for a few epochs within seconds, and passes `callbacks` to the
Trainer in the library's way. It writes to `folder`, which is also the working directory.
"""


@dataclass(frozen=True)
class Case:
    """A model of a library.

    Attributes:
        name: Name of the model in the library.
        train: Trains the model.
        loss_fn: The callback's `loss_fn`, if `training_step` returns no loss.
        load: `load(path)` loads the picked checkpoint as the library's users do; None: `torch.load(weights_only=True)`
            and `load_state_dict`.
        note: Remark for readers of the table.
    """

    name: str
    train: Train
    loss_fn: Callable[[Any, Any], Any] | None = None
    load: Callable[[str], object] | None = None
    note: str = ""


@dataclass(frozen=True)
class Library:
    """A library, its installation and its cases.

    Only the cases import the library, not the module that declares it: the command that makes the environments reads
    the declarations without the libraries.

    Attributes:
        name: Name in the package registry.
        requirements: Requirements for pip, with versions.
        cases: Models to try.
        without_dependencies: Requirements that pip installs afterwards, without their dependencies.
        kind: Field of use.
        shown: Other packages whose versions the table shows.
    """

    name: str
    requirements: tuple[str, ...]
    cases: tuple[Case, ...]
    without_dependencies: tuple[str, ...] = ()
    kind: str = ""
    shown: tuple[str, ...] = ()
