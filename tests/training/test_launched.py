"""Strategies whose processes end with the fit: the callbacks of the process that called `fit` get the results."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import pytest
import torch

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SharpnessMonitor, SpectrumHistory
from lightning_hesd.training import callback_copies
from lightning_hesd.training.compat import strategies
from lightning_hesd.training.history import SpectrumRecord
from tests.training.modules import pickled
from tests.training.scripted import STEPS_PER_EPOCH, Epoch, ScriptedModule, loader, make_trainer


class Curved(ScriptedModule):
    """A loss with a minimum, beyond which training does not go."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight - 9) ** 2 / 100


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning", "ignore:It is recommended to use `self.log")
def test_the_history_the_pick_and_tracked_records_come_back(tmp_path: Path) -> None:
    alone = HessianCheckpoint("lowest_max_eigenvalue", tolerance=9.0, dirpath=tmp_path / "alone")
    spectra = HessianSpectrumCallback(checkpoint=HessianCheckpoint(tolerance=9.0, save_last=True), num_samples=2)
    monitor = SharpnessMonitor(1, num_samples=2, on_error="raise")
    trainer = make_trainer(tmp_path, [spectra, alone, monitor], 2, strategy="ddp_fork", devices=2)
    trainer.fit(Curved([Epoch(None)] * 2), loader())
    steps = STEPS_PER_EPOCH // 2  # each rank has half of the batches
    assert [(r.epoch, r.global_step, r.error) for r in spectra.history] == [(0, steps, None), (1, 2 * steps, None)]
    assert spectra.history[1].spectrum.c_t == trainer.callback_metrics["hesd/c_t"] == 0.0
    on_disk = SpectrumHistory.load(tmp_path)
    assert [r.spectrum.loss for r in on_disk] == [r.spectrum.loss for r in spectra.history]
    for checkpoint in (spectra.checkpoint, alone):
        assert checkpoint.best is not None
        assert checkpoint.best_model_path == checkpoint.best.path
        assert torch.load(checkpoint.best_model_path)["global_step"] == checkpoint.best.global_step
    assert Path(spectra.checkpoint.last_model_path) == tmp_path / "checkpoints" / "last.ckpt"
    assert trainer.checkpoint_callback.best_model_path in {spectra.checkpoint.best_model_path, alone.best_model_path}
    assert [record.global_step for record in monitor.history] == [1, 2]
    assert [record.tracked_lambda_max for record in monitor.history] == pytest.approx([0.02, 0.02])


def test_letters_find_the_original() -> None:
    original = HessianSpectrumCallback()
    with mock.patch.object(callback_copies, "_RECIPIENTS", WeakValueDictionary()):
        in_another_process = pickled(original)
    assert in_another_process._address == original._address
    received: list[Any] = []
    original.take_results = received.append  # type: ignore[method-assign]
    pickled(callback_copies._SentState(in_another_process._address, {"a": torch.ones(1)}))
    assert received == [{"a": torch.ones(1)}]
    assert pickled(callback_copies._SentState("unknown address", {})) is None


def test_letters_to_a_copy_reach_the_original_too() -> None:
    original = HessianSpectrumCallback()
    copied, trained = copy.deepcopy(original), copy.deepcopy(original)
    trained.history.append(SpectrumRecord(0, 1, None, error="failed"))
    pickled(callback_copies._SentState(copied._address, trained.state_dict()))
    assert [r.error for r in copied.history] == [r.error for r in original.history] == ["failed"]


def test_nothing_is_sent_where_the_process_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], 1)
    strategies.add_result_of_fit(trainer, "address", {})
    assert trainer.strategy.launcher is None
