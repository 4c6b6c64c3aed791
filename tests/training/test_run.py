"""Runs with every kind of analysis, and runs that end within an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.training.modules import Classifier, callback, fit, freeze, loader, plain_loss

EVERYTHING: dict[str, Any] = {
    "loss_fn": plain_loss,
    "layers": "auto",
    "decompose": True,
    "output_fn": lambda module, batch: module.net(batch[0]),
    "output_loss": lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
    "generalization_dataloader": loader(),
}


def test_training_is_the_same_with_every_analysis(tmp_path: Path) -> None:
    observer = callback(**EVERYTHING, preconditioner="optimizer", monitor_gradients=True)
    trainers = [fit(tmp_path, *callbacks, gradient_clip_val=0.1) for callbacks in ([observer], [])]
    assert [record.error for record in observer.history] == [None, None]
    with_it, without = (freeze([t.lightning_module.state_dict(), t.optimizers[0].state_dict()]) for t in trainers)
    assert with_it == without


class StopsEarly(pl.Callback):
    """Ends training after the second batch of an epoch, which nothing tells before."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 7


class Validating(Classifier):
    def val_dataloader(self) -> Any:
        return loader()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", plain_loss(self, batch), batch_size=len(batch[1]))


@pytest.mark.parametrize("validates", [False, True])
def test_metrics_where_training_stops_within_an_epoch(validates: bool, tmp_path: Path) -> None:
    observer = callback()
    module = Validating() if validates else Classifier()
    trainer = fit(tmp_path, observer, StopsEarly(), module=module)
    assert trainer.global_step == observer.history[-1].global_step == 7
    last = observer.history[-1].metrics
    assert last["train_loss_epoch"] == pytest.approx(float(trainer.callback_metrics["train_loss_epoch"]))
    assert last["train_loss_epoch"] != observer.history[0].metrics["train_loss_epoch"]
    assert ("val_loss" in last) is validates
    if validates:
        assert last["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
