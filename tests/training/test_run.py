"""Runs with every kind of analysis: a short way from the hook to the engine, and a training as without them."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hesd.training import recorder
from tests.training.modules import Classifier, Validated, callback, fit, freeze, loader, plain_loss

HOOKS = {"on_train_epoch_end", "on_train_batch_end"}
EVERYTHING: dict[str, Any] = {
    "loss_fn": plain_loss,
    "layers": "auto",
    "decompose": True,
    "output_fn": lambda module, batch: module.net(batch[0]),
    "output_loss": lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
    "generalization_dataloader": loader(),
}


def ours() -> list[str]:
    """Return the functions of `lightning_hesd.training` on the stack, from the hook to the engine."""
    frames = [(found.frame.f_globals.get("__name__", ""), found.function) for found in reversed(inspect.stack())]
    return [function for module, function in frames if module.startswith("lightning_hesd.training.")]


@pytest.mark.parametrize("schedule", [{}, {"every_n_train_steps": 5}], ids=["epoch", "step"])
def test_five_frames_from_the_hook_to_the_engine(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader with a debugger steps through few functions."""
    stacks: list[list[str]] = []

    def spied(compute: Any) -> Any:
        def compute_with_stack(*args: Any, **kwargs: Any) -> Any:
            stacks.append(ours())
            return compute(*args, **kwargs)

        return compute_with_stack

    monkeypatch.setattr(recorder, "SPECTRUM", recorder.Analysis("spectrum", spied(recorder.analyze)))
    monkeypatch.setattr(recorder, "analyze_layers", spied(recorder.analyze_layers))
    preconditioner = {name: torch.ones_like(p) for name, p in Classifier().named_parameters()}
    observer = callback(**schedule, **EVERYTHING, preconditioner=preconditioner)
    fit(tmp_path, observer, max_epochs=1)
    assert [record.error for record in observer.history] == [None]
    assert len(stacks) == 6  # the spectra of two data sets, of the preconditioned Hessian, of two terms, of layers
    for stack in stacks:
        assert stack[0] in HOOKS
        assert len(stack) <= 5, stack


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


@pytest.mark.parametrize("validates", [False, True])
def test_metrics_where_training_stops_within_an_epoch(validates: bool, tmp_path: Path) -> None:
    observer = callback()
    module = Validated() if validates else Classifier()
    trainer = fit(tmp_path, observer, StopsEarly(), module=module)
    assert trainer.global_step == observer.history[-1].global_step == 7
    last = observer.history[-1].metrics
    assert last["train_loss_epoch"] == pytest.approx(float(trainer.callback_metrics["train_loss_epoch"]))
    assert last["train_loss_epoch"] != observer.history[0].metrics["train_loss_epoch"]
    assert ("val_loss" in last) is validates
    if validates:
        assert last["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
