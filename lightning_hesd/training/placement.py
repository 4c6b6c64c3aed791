"""Where a HessianCheckpoint stands among the callbacks of a Trainer, and which neighbours to warn of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.spectra.record import SUFFIXES
from lightning_hesd.training._lightning import callbacks_of, looks_before_the_epoch_ends, replace_callbacks, warn
from lightning_hesd.training.checkpoint import HessianCheckpoint
from lightning_hesd.training.history import SpectrumSource
from lightning_hesd.training.namespaces import MisconfigurationException, lightning_types

if TYPE_CHECKING:
    import lightning.pytorch as pl


def insert_checkpoint(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, checkpoint: HessianCheckpoint
) -> None:
    """Add `checkpoint` to the Trainer's callbacks, and set it up: the Trainer is setting up those it had before.

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
        replace_callbacks(trainer, [*callbacks, checkpoint])
        checkpoint.setup(trainer, pl_module, stage)


def put_hessian_checkpoints_first(trainer: pl.Trainer) -> None:
    """Make Lightning take a HessianCheckpoint for "best": it takes the first checkpoint callback there is.

    The one passed to a HessianSpectrumCallback comes before those that stand in `callbacks` by themselves, and all
    checkpoint callbacks come last, as Lightning has them, also those added to `trainer.callbacks` later. In a new list,
    because the Trainer may be walking the old one: each callback keeps its turn.
    """
    callbacks = callbacks_of(trainer)
    own = [source.checkpoint for source in callbacks if isinstance(source, SpectrumSource)]
    checkpoints = sorted(
        trainer.checkpoint_callbacks, key=lambda c: (not isinstance(c, HessianCheckpoint), c not in own)
    )
    others = [c for c in callbacks if not isinstance(c, lightning_types("callbacks.Checkpoint"))]
    replace_callbacks(trainer, [*others, *checkpoints])


def warn_about_stale_monitors(trainer: pl.Trainer, name: str, *, sparse: bool) -> None:
    """Warn of neighbours that would judge weights by a value that is not theirs.

    Args:
        trainer: The trainer, about to train.
        name: Prefix of the metrics in question.
        sparse: Whether some epochs are not analysed.
    """
    prefixes = tuple(f"{name}{suffix}/" for suffix in SUFFIXES.values())
    old = "logged values persist, so where weights were not analysed it judges them by an old value"
    kinds = lightning_types("callbacks.ModelCheckpoint", "callbacks.EarlyStopping")
    for callback in callbacks_of(trainer):
        if not isinstance(callback, kinds):
            continue
        if not (callback.monitor or "").startswith(prefixes):
            continue
        early = looks_before_the_epoch_ends(trainer, callback)
        if not sparse and not early:
            continue
        if isinstance(callback, lightning_types("callbacks.EarlyStopping")):
            problem = old if sparse else "it looks in validation, before the epoch is analysed, so at the epoch before"
            remedy = "analyse every epoch, and set `check_on_train_epoch_end=True`"
        else:
            problem = old if sparse else "unless `save_on_train_epoch_end=True`, it may save before the analysis"
            remedy = "use HessianCheckpoint, which ranks analysed weights only"
        warn(f"{type(callback).__name__}(monitor={callback.monitor!r}): {problem}; {remedy}.")
    for config in trainer.lr_scheduler_configs:
        in_question = config.reduce_on_plateau and (config.monitor or "").startswith(prefixes)
        if in_question and (sparse or config.interval != "epoch"):
            warn(
                f"{type(config.scheduler).__name__} with monitor={config.monitor!r}: {old}; analyse every epoch, and "
                "set `interval='epoch'`."
            )
