"""The place of HessianCheckpoints among the callbacks of a Trainer, and warnings about other callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.scalars import metric_prefixes
from lightning_hesd.training.checkpoints.checkpoint import HessianCheckpoint
from lightning_hesd.training.checkpoints.exclusive_checkpoint import place as path_of
from lightning_hesd.training.checkpoints.weights import AnalyzedWeights
from lightning_hesd.training.compat.messages import silence_several_checkpoints, warn
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types
from lightning_hesd.training.compat.runs import callbacks_of, looks_before_the_epoch_ends, replace_callbacks, run_folder
from lightning_hesd.training.folders import joined
from lightning_hesd.training.source import sources_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.training.error_policy import OnError
    from lightning_hesd.training.source import SpectrumSource

SETTINGS = frozenset(
    {
        *("dirpath", "filename", "monitor", "verbose", "save_last", "save_top_k", "save_weights_only", "mode"),
        *("auto_insert_metric_name", "save_on_exception", "_save_on_train_epoch_end", "_enable_version_counter"),
        *("_every_n_train_steps", "_train_time_interval", "_every_n_epochs"),
    }
)
"""Attributes that the arguments of a ModelCheckpoint set."""


def as_checkpoints(checkpoint: object) -> list[HessianCheckpoint]:
    """Return the checkpoint callbacks of the argument `checkpoint`: names of rules, callbacks, or a list of them.

    Raises:
        TypeError: If the argument is none of these, nor None.
        MisconfigurationException: If a name is not that of a rule, or two callbacks would be the same.
    """
    if checkpoint is None:
        return []
    given = checkpoint if isinstance(checkpoint, list | tuple) else [checkpoint]
    checkpoints: list[HessianCheckpoint] = []
    for one in given:
        made = HessianCheckpoint(one) if isinstance(one, str) else one  # type: ignore[arg-type]  # checks the name
        if not isinstance(made, HessianCheckpoint):
            msg = (
                "`checkpoint` must be the name of a rule, a HessianCheckpoint, a list of these or None, got "
                f"{checkpoint!r}."
            )
            raise TypeError(msg)
        if made.state_key in {other.state_key for other in checkpoints}:
            msg = f"`checkpoint` has the rule {made.rule!r} twice with the same options: leave one of them out."
            raise MisconfigurationException(msg)
        checkpoints.append(made)
    return checkpoints


def insert_checkpoint(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, checkpoint: HessianCheckpoint, on_error: OnError
) -> None:
    """Add `checkpoint` to the Trainer's callbacks and set it up: the Trainer sets up only the callbacks it had before.

    Raises:
        MisconfigurationException: With `on_error="raise"`, if the Trainer was made without checkpointing.
    """
    if stage == "fit" and not trainer.checkpoint_callbacks:
        problem = (
            f"the rule {checkpoint.rule!r} picks a checkpoint, but the Trainer was made with "
            "`enable_checkpointing=False`: "
        )
        if on_error == "raise":
            msg = f"{problem}drop one of the two."
            raise MisconfigurationException(msg)
        warn(f"{problem}the checkpoints of the rule are written all the same; pass `checkpoint=None` to have none.")
    callbacks = callbacks_of(trainer)
    if not any(callback is checkpoint for callback in callbacks):  # those of users may not be comparable
        checkpoint.setup(trainer, pl_module, stage)
        replace_callbacks(trainer, [*callbacks, checkpoint])


def checkpoints_of(trainer: pl.Trainer, source: SpectrumSource) -> list[HessianCheckpoint]:
    """Return the checkpoint callbacks of a Trainer that rank the records of a callback."""
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, HessianCheckpoint) and c.source is source]


def keep_weights(trainer: pl.Trainer, source: SpectrumSource, pl_module: pl.LightningModule) -> None:
    """Give the analyzed weights to the checkpoint callbacks: other callbacks may change them before they are saved."""
    if checkpoints := checkpoints_of(trainer, source):
        weights = AnalyzedWeights(pl_module)
        for checkpoint in checkpoints:
            checkpoint.keep_weights(weights)


def order_checkpoints(trainer: pl.Trainer) -> None:
    """Order the checkpoint callbacks so that "best" is what the user expects: Lightning takes the first one's.

    First stand the ModelCheckpoints of the user or a library; then the HessianCheckpoints, those passed to a
    HessianSpectrumCallback before others; then the ModelCheckpoint that Lightning adds to a Trainer without any, and
    callbacks without a best checkpoint. All stand after the other callbacks, as in Lightning, also those added to
    `trainer.callbacks` later. The list is a new one, because the Trainer may be iterating over the old one.

    Where the user has one checkpoint callback at most, Lightning would warn of ours beside it only. The end of training
    says which of them is "best".
    """
    callbacks = callbacks_of(trainer)
    own = {id(checkpoint) for source in sources_of(trainer) for checkpoint in source.checkpoints}
    others = [checkpoint for checkpoint in trainer.checkpoint_callbacks if id(checkpoint) not in own]
    if own and len(others) <= 1:
        silence_several_checkpoints()
    is_alone = len(others) == 1 and _is_made_without_arguments(trainer, others[0])

    def place(checkpoint: pl.Callback) -> int:
        if isinstance(checkpoint, HessianCheckpoint):
            return 1 if id(checkpoint) in own else 2
        return 3 if is_alone or not hasattr(checkpoint, "best_model_path") else 0

    checkpoints = sorted(trainer.checkpoint_callbacks, key=place)
    replace_callbacks(
        trainer, [*(c for c in callbacks if not isinstance(c, lightning_types("callbacks.Checkpoint"))), *checkpoints]
    )


def _is_made_without_arguments(trainer: pl.Trainer, checkpoint: Any) -> bool:
    """Return whether this may be the ModelCheckpoint that Lightning adds to a Trainer without any.

    Lightning makes it without arguments. A single plain `ModelCheckpoint()` in `callbacks` looks the same, and does the
    same: it keeps the last weights.
    """
    if type(checkpoint) not in lightning_types("callbacks.ModelCheckpoint") or any(
        name.isupper() for name in vars(checkpoint)
    ):
        return False
    plain = vars(type(checkpoint)())
    differing = {name for name in SETTINGS & vars(checkpoint).keys() if vars(checkpoint)[name] != plain.get(name)}
    if differing == {"dirpath"} and checkpoint.dirpath is not None:  # set when the callback was set up
        return path_of(checkpoint.dirpath) == path_of(joined(run_folder(trainer), "checkpoints"))
    return not differing


def warn_about_stale_monitors(trainer: pl.Trainer, name: str, *, sparse: bool) -> None:
    """Warn of callbacks and schedulers that may judge weights by a metric, called `name`/..., of other weights."""
    prefixes = metric_prefixes(name)
    old = "logged values persist, so it judges weights that were not analyzed by an old value"
    kinds = lightning_types("callbacks.ModelCheckpoint", "callbacks.EarlyStopping")
    for callback in callbacks_of(trainer):
        if not isinstance(callback, kinds):
            continue
        if not (getattr(callback, "monitor", None) or "").startswith(prefixes):
            continue
        early = looks_before_the_epoch_ends(trainer, callback)
        if not sparse and not early:
            continue
        if isinstance(callback, lightning_types("callbacks.EarlyStopping")):
            problem = (
                old
                if sparse
                else "it looks in validation, before the epoch is analyzed, so it judges by the epoch before"
            )
            remedy = "analyze every epoch, and set `check_on_train_epoch_end=True`"
        else:
            problem = old if sparse else "unless `save_on_train_epoch_end=True`, it may save before the analysis"
            remedy = "use HessianCheckpoint, which ranks analyzed weights only"
        warn(f"{type(callback).__name__}(monitor={callback.monitor!r}): {problem}; {remedy}.")
    for config in trainer.lr_scheduler_configs:
        in_question = config.reduce_on_plateau and (config.monitor or "").startswith(prefixes)
        if in_question and (sparse or config.interval != "epoch"):
            warn(
                f"{type(config.scheduler).__name__} with monitor={config.monitor!r}: {old}; analyze every epoch, and "
                "set `interval='epoch'`."
            )
