"""Metrics as Lightning logs them: the step, the hook that logged them, and the loggers."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import torch

from lightning_hesd.training.compat.namespaces import namespace_of

if TYPE_CHECKING:
    from collections.abc import Collection

    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger


def logging_step(trainer: pl.Trainer, *, at_epoch_end: bool) -> int:
    """Return the step that Lightning gives to metrics logged now."""
    step = int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
    return max(step - 1, 0) if at_epoch_end else step


def log_scalars(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    values: dict[str, float],
    *,
    at_epoch_end: bool,
    in_bar: Collection[str],
) -> None:
    """Log scalars to `trainer.callback_metrics`, every logger and, those with keys `in_bar`, the progress bar.

    At the end of an epoch, in `on_train_epoch_end`, Lightning's `log` does that, and not the module's own, which may
    rename metrics, count them or take other arguments. At other times Lightning would send them to the loggers only at
    multiples of `log_every_n_steps` or at the end of the epoch, so the loggers get them directly.
    """
    if trainer.barebones:
        return
    if at_epoch_end:
        if _is_in_process_group():  # Lightning advises to average them over ranks, but they are the same on all
            for key in values:
                advice = re.escape(f"It is recommended to use `self.log({key!r}, ..., sync_dist=True)`")
                warnings.filterwarnings("ignore", message=advice)
        kind = namespace_of(pl_module).LightningModule
        for key, value in values.items():
            kind.log(pl_module, key, value, on_step=False, on_epoch=True, prog_bar=key in in_bar, batch_size=1)
        return
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.progress_bar_metrics.update({key: values[key] for key in in_bar if key in values})
    step = logging_step(trainer, at_epoch_end=False)
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)
        logger.save()


def _is_in_process_group() -> bool:
    """Return whether there is a process group, be it of one process only."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


BEFORE_BATCHES = {"on_train_start", "on_train_epoch_start"}
"""Hooks that log among the metrics of an epoch, but before its first batch."""


def current_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the logged metrics that have names, as `trainer.callback_metrics` has them.

    At the end of an epoch that computes logged torchmetrics objects, and Lightning would keep their values even if the
    module's `on_train_epoch_end` resets or updates them later. So the values are forgotten again; the objects remember
    them as long as they are valid. Those of logged tensors stay: to compute them twice would sum them twice over ranks.
    """
    results = trainer._results  # noqa: SLF001
    objects = [] if results is None else [result for result in results.values() if not result.is_tensor]
    before = [result._computed for result in objects]  # noqa: SLF001
    metrics = {key: value for key, value in trainer.callback_metrics.items() if isinstance(key, str)}
    for result, computed in zip(objects, before, strict=True):
        result._computed = computed  # noqa: SLF001
    return metrics


def metrics_last_read(trainer: pl.Trainer) -> dict[str, Any]:
    """Return `trainer.callback_metrics` as it was last read: at the end of an epoch, without the means over it."""
    return dict(trainer._logger_connector._callback_metrics)  # noqa: SLF001


def logged_before_the_epoch(trainer: pl.Trainer) -> set[str]:
    """Return the keys of metrics that were logged in this epoch so far, but only before its first batch."""
    early: set[str] = set()
    later: set[str] = set()
    for result in trainer.fit_loop.epoch_loop._results.values():  # noqa: SLF001
        if not result.has_reset:
            hooks = early if result.meta.fx in BEFORE_BATCHES else later
            hooks |= {result.meta.name, *map(result.meta.forked_name, (True, False))}
    return early - later


def logged_results(trainer: pl.Trainer) -> list[object]:
    """Return Lightning's collections of logged values, which hold a metric for each value."""
    loop = trainer.fit_loop.epoch_loop
    return [loop._results, loop.val_loop._results]  # noqa: SLF001


def tag_prefix(logger: TensorBoardLogger) -> str:
    """Return the prefix that a logger puts before the names of metrics."""
    prefix: str = logger._prefix  # noqa: SLF001
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""
