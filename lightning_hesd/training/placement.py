"""Where a HessianCheckpoint stands among the callbacks of a Trainer, and which neighbours to warn of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_hesd.training._lightning import callbacks_of, warn
from lightning_hesd.training.checkpoint import HessianCheckpoint
from lightning_hesd.training.history import SpectrumSource

if TYPE_CHECKING:
    import lightning.pytorch as pl


def insert_checkpoint(trainer: pl.Trainer, checkpoint: HessianCheckpoint) -> None:
    """Add `checkpoint` to the Trainer's callbacks; for use in `setup`, where the Trainer has not yet reached its place.

    Raises:
        MisconfigurationException: If the Trainer does not write checkpoints.
    """
    if not trainer.checkpoint_callbacks:
        msg = (
            f"the rule {checkpoint.rule!r} picks a checkpoint, but the Trainer was made with "
            "`enable_checkpointing=False`: drop one of the two."
        )
        raise MisconfigurationException(msg)
    callbacks = callbacks_of(trainer)
    if checkpoint not in callbacks:
        callbacks.append(checkpoint)


def put_hessian_checkpoints_first(trainer: pl.Trainer) -> None:
    """Make Lightning take a HessianCheckpoint for "best": it takes the first checkpoint callback there is.

    The one passed to a HessianSpectrumCallback comes before those that stand in `callbacks` by themselves. In place and
    among checkpoint callbacks only, because the Trainer is walking this very list.
    """
    callbacks = callbacks_of(trainer)
    own = [source.checkpoint for source in callbacks if isinstance(source, SpectrumSource)]
    checkpoints = sorted(
        trainer.checkpoint_callbacks, key=lambda c: (not isinstance(c, HessianCheckpoint), c not in own)
    )
    callbacks[:] = [*(c for c in callbacks if not isinstance(c, Checkpoint)), *checkpoints]


def warn_about_stale_monitors(trainer: pl.Trainer, name: str, *, sparse: bool) -> None:
    """Warn of a plain ModelCheckpoint that would rank weights by a value that is not theirs.

    Args:
        trainer: The trainer.
        name: Prefix of the metrics in question.
        sparse: Whether some epochs are not analysed.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not (callback.monitor or "").startswith(f"{name}/"):
            continue
        if sparse:
            problem = "logged values persist, so on epochs without an analysis it ranks new weights by an old value"
        elif callback._save_on_train_epoch_end is not True:  # noqa: SLF001
            problem = "unless `save_on_train_epoch_end=True`, it may save before the analysis of the epoch"
        else:
            continue
        warn(
            f"ModelCheckpoint(monitor={callback.monitor!r}): {problem}; use HessianCheckpoint, which ranks analysed "
            "weights only."
        )
