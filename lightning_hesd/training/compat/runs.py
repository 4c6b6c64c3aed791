"""The identity and the folder of a run."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.folders import joined

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NAMES: WeakKeyDictionary[pl.Trainer, str] = WeakKeyDictionary()


def name_of(trainer: pl.Trainer) -> str:
    """Return a name that no other Trainer has in any process; an `id` may be used again."""
    if trainer not in _NAMES:
        _NAMES[trainer] = uuid.uuid4().hex
    return _NAMES[trainer]


def run_folder(trainer: pl.Trainer) -> str:
    """Return the folder of this run, a path or a URL, in which Lightning puts its checkpoints; every rank must ask.

    With loggers other than TensorBoard's and CSV's, `trainer.log_dir` is the folder of all runs, in which MLflow takes
    any other folder for a damaged experiment.
    """
    folder = str(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, lightning_types("loggers.TensorBoardLogger", "loggers.CSVLogger")):
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return joined(folder, str(logger.name), version)
