"""The identity and the folder of a run, and the callbacks of its Trainer."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.folders import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

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


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the Trainer's own list of callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def replace_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Give the Trainer a new list of callbacks; a loop over the old list is not affected."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def looks_before_the_epoch_ends(trainer: pl.Trainer, callback: ModelCheckpoint | EarlyStopping) -> bool:
    """Return whether a callback reads metrics in validation, before `on_train_epoch_end` of other callbacks."""
    if not isinstance(callback, lightning_types("callbacks.EarlyStopping")):
        return callback._save_on_train_epoch_end is not True  # type: ignore[union-attr]  # noqa: SLF001
    after_epochs = callback._check_on_train_epoch_end  # noqa: SLF001
    if after_epochs is None:
        after_epochs = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return not after_epochs


@contextlib.contextmanager
def isolated_saving(
    trainer: pl.Trainer, isolation: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    """Put checkpoints together, for which Lightning calls hooks and `state_dict` of all objects, in a context."""
    connector = trainer._checkpoint_connector  # noqa: SLF001
    dump = connector.dump_checkpoint

    def isolated_dump(*args: Any, **kwargs: Any) -> dict[str, Any]:
        with isolation():
            return dump(*args, **kwargs)

    with patched(connector, "dump_checkpoint", isolated_dump):
        yield


def batches_begun(trainer: pl.Trainer) -> int:
    """Return how many training batches have begun, in all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
