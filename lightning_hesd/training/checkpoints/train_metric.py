"""The training metric by which checkpoints qualify, and whether a logged value is of the present weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_hesd.training.compat.logged_metrics import logged_before_the_epoch
from lightning_hesd.training.compat.namespaces import MisconfigurationException

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.spectra.spectrum import Spectrum

    Mode = Literal["min", "max"]


class TrainMetric:
    """A logged metric, or the mean loss of the analysis.

    Logged values persist, without their age. A value is of the present weights if it was logged after the beginning of
    the batch that led to them: in its `training_step`, as the mean over the epoch that ended with it, or in the
    validation that followed. Lightning makes a new tensor whenever a metric is logged or computed, and returns views of
    it. So a memory address other than at the beginning of the batch means a new value; the old tensor is kept here, so
    that its address is not used again.

    Args:
        key: Key of the metric; None: the mean loss of the analysis.
        mode: "max" or "min"; None: "max", but "min" without a key.

    Raises:
        MisconfigurationException: If `mode` is invalid, or is None for a metric that sounds like a loss.
    """

    def __init__(self, key: str | None, mode: Mode | None) -> None:
        self.key = key
        self.mode = _mode(key, mode)
        self._step = -1
        self._before: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the options without the logged tensor, whose address has no meaning in a copy."""
        return {**vars(self), "_step": -1, "_before": None}

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin a run: the present value is old."""
        self._step, self._before = trainer.global_step, self._value(trainer)

    def begin_batch(self, trainer: pl.Trainer) -> None:
        """Keep the value before the first batch of an optimizer step."""
        if trainer.global_step != self._step:
            self.restart(trainer)

    def score(self, trainer: pl.Trainer, spectrum: Spectrum) -> float | None:
        """Return the score of the present weights: the metric, or minus the metric with "min"; None if not logged."""
        sign = 1.0 if self.mode == "max" else -1.0
        if self.key is None:
            return sign * spectrum.loss
        value = self._value(trainer)
        is_old = _is_same(value, self._before) or logged_before_the_epoch(trainer, self.key)
        return None if value is None or is_old else sign * float(value)

    def complaint(self, trainer: pl.Trainer, ours: str) -> str:
        """Return why the metric of the present weights is not known, and what to do.

        The message names the metrics that are logged, without the callback's own, which begin with `ours`.
        """
        why = "the metric was last logged for older weights"
        if self.key not in trainer.callback_metrics:
            logged = sorted(key for key in trainer.callback_metrics if not key.startswith(ours))
            why = f"the metric is not among those logged so far, {logged}"
        return (
            f"HessianCheckpoint(train_metric={self.key!r}) does not rank the analysis of epoch {trainer.current_epoch} "
            f"after step {trainer.global_step}, nor later ones like it: {why}. Within an epoch it must be logged in "
            "`training_step` with `on_step=True`; at the end of an epoch by the end of the module's "
            "`on_train_epoch_end`; in validation only where validation comes right after the analyzed step. Log it so, "
            "analyze after such epochs or steps only, or leave `train_metric` out to rank by the loss of the analysis."
        )

    def _value(self, trainer: pl.Trainer) -> Any:
        return None if self.key is None else trainer.callback_metrics.get(self.key)


def _is_same(value: Any, before: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
        return value.data_ptr() == before.data_ptr()
    return value is before


def _mode(metric: str | None, mode: Mode | None) -> Mode:
    if mode not in {None, "min", "max"}:
        msg = f"`train_metric_mode` must be 'min' or 'max', got {mode!r}."
        raise MisconfigurationException(msg)
    if mode is not None:
        return mode
    if metric is None:
        return "min"
    if any(word in metric.lower() for word in ("loss", "err")):
        msg = f"`train_metric={metric!r}` sounds as if lower were better: say so with `train_metric_mode='min'`."
        raise MisconfigurationException(msg)
    return "max"
