"""The callbacks of a Trainer, and when they read metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.training.compat.namespaces import lightning_types

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


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
