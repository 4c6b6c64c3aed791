"""Which logged metrics are those of the present weights."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from lightning_hesd.training.compat.logged_metrics import current_metrics, logged_before_the_epoch, metrics_last_read
from lightning_hesd.training.compat.runs import batches_begun

if TYPE_CHECKING:
    import lightning.pytorch as pl


class FreshMetrics:
    """The logged metrics of the present weights.

    Logged values persist, without their age. A value is of the present weights if it was logged after the beginning of
    the batch that led to them: in its `training_step`, as the mean over the epoch that ended with it, or in the
    validation that followed. Lightning makes a new tensor whenever a metric is logged or computed, and returns views of
    it. So a memory address other than at the beginning of the batch means a new value; the old tensors are kept here,
    so that their addresses are not used again.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}
        self._early: set[str] = set()  # of this epoch, but from before its first batch
        self._batch: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return no tensors, whose addresses have no meaning in a copy."""
        return {"_before": {}, "_early": set(), "_batch": None}

    def begin_batch(self, trainer: pl.Trainer) -> None:
        """Keep the values before a batch, which are old after it."""
        self._keep(trainer, current_metrics(trainer))

    def begin_validation(self, trainer: pl.Trainer) -> None:
        """Keep the values before a validation, unless those before the last batch were kept."""
        if self._batch != batches_begun(trainer):
            self._keep(trainer, current_metrics(trainer))

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Keep the values at the end of an epoch, unless those before its last batch, or a validation, were kept.

        Nothing tells before a batch that training will stop after it. Means over the epoch are then known to be new;
        what the batch itself logged is not.
        """
        if not self.is_of_last_batch(trainer):
            self._keep(trainer, metrics_last_read(trainer))

    def _keep(self, trainer: pl.Trainer, metrics: dict[str, Any]) -> None:
        self._before = metrics
        self._early = logged_before_the_epoch(trainer)
        self._batch = batches_begun(trainer)

    def is_of_last_batch(self, trainer: pl.Trainer) -> bool:
        """Return whether values were last kept before the batch that came last, as rank zero has it.

        All ranks must agree, because they wait for each other for the values.
        """
        return trainer.strategy.broadcast(self._batch == batches_begun(trainer))

    def value(self, trainer: pl.Trainer, key: str) -> float | None:
        """Return a metric of the present weights; None if it was not logged for them."""
        value = current_metrics(trainer).get(key)
        return None if value is None or self._is_old(key, value) else float(value)

    def values(self, trainer: pl.Trainer, prefixes: tuple[str, ...]) -> dict[str, float]:
        """Return the finite metrics of the present weights, by key, but for those whose keys begin with a prefix.

        On all ranks they are those of rank zero.
        """
        logged = {key: value for key, value in current_metrics(trainer).items() if _is_number(value)}
        wanted = [key for key in logged if not key.startswith(prefixes)]
        found = {key: float(logged[key]) for key in wanted if not self._is_old(key, logged[key])}
        metrics = {key: value for key, value in found.items() if math.isfinite(value)}
        return trainer.strategy.broadcast(metrics)

    def _is_old(self, key: str, value: Any) -> bool:
        return key in self._early or _is_same(value, self._before.get(key))


def _is_number(value: Any) -> bool:
    """Return whether a value is a real number; what users put among the metrics themselves may be anything."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)  # also NumPy's


def _is_same(value: Any, before: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
        return value.data_ptr() == before.data_ptr()
    return value is before
