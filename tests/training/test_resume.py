"""Interrupted and resumed training: the same history and the same pick as without the interruption."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SpectrumHistory
from tests.training.digits_run import Net, data
from tests.training.scripted import make_trainer

# Both are about the checkpoint callback that Lightning adds by default.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]

EPOCHS = 6


def fit(
    folder: Path, *, epochs: int = EPOCHS, fail_at: int | None = None, ckpt_path: Path | None = None, **arguments: Any
) -> tuple[HessianSpectrumCallback, HessianCheckpoint]:
    """Train in `folder`; every run makes its objects anew, as a new process would."""
    torch.manual_seed(0)
    checkpoint = HessianCheckpoint(train_metric="train_acc", tolerance=0.05, dirpath=folder, save_last=True)
    callback = HessianSpectrumCallback(steps=8, num_samples=48, batch_size=16, checkpoint=checkpoint, **arguments)
    trainer = make_trainer(folder, [callback], epochs)
    model = Net(fail_at)
    if fail_at is None:
        trainer.fit(model, data(), ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.fit(model, data(), ckpt_path=ckpt_path)
    return callback, checkpoint


def assert_same_history(first: SpectrumHistory, second: SpectrumHistory) -> None:
    assert [(r.epoch, r.global_step, r.error) for r in first] == [(r.epoch, r.global_step, r.error) for r in second]
    for mine, other in zip(first, second, strict=True):
        assert mine.spectrum is not None
        assert other.spectrum is not None
        np.testing.assert_array_equal(mine.spectrum.nodes, other.spectrum.nodes)
        np.testing.assert_array_equal(mine.spectrum.weights, other.spectrum.weights)
        assert mine.spectrum.c_t == other.spectrum.c_t
        assert mine.spectrum.loss == other.spectrum.loss


def assert_same_weights(first: str, second: str) -> None:
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, fail_at: int, same_folder: bool) -> None:
    whole, whole_checkpoint = fit(tmp_path / "whole")
    fit(tmp_path / "first", fail_at=fail_at)
    folder = tmp_path / ("first" if same_folder else "second")
    resumed, resumed_checkpoint = fit(folder, ckpt_path=tmp_path / "first" / "last.ckpt")

    assert [r.epoch for r in resumed.history] == list(range(EPOCHS))
    assert_same_history(whole.history, resumed.history)
    assert len(whole_checkpoint.candidates) == len(resumed_checkpoint.candidates)
    assert_same_weights(whole_checkpoint.best_model_path, resumed_checkpoint.best_model_path)


def test_history_on_disk_is_complete_in_the_folder_of_the_resumed_run(tmp_path: Path) -> None:
    fit(tmp_path / "first", fail_at=3)
    resumed, _ = fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert_same_history(SpectrumHistory.load(tmp_path / "second"), resumed.history)


def test_resuming_draws_the_same_samples_also_with_another_seed(tmp_path: Path) -> None:
    """The positions come from the checkpoint, not from drawing again."""
    first, _ = fit(tmp_path / "first", fail_at=3)
    positions = first.state_dict()["samples"]["training"]["indices"]
    resumed, _ = fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last.ckpt", seed=5)
    assert resumed.state_dict()["samples"]["training"]["indices"] == positions
    assert len(set(positions)) == 48


def test_a_candidate_whose_file_is_gone_is_dropped_with_a_warning(tmp_path: Path) -> None:
    _, checkpoint = fit(tmp_path / "first", fail_at=3)
    lost = checkpoint.best_model_path
    Path(lost).unlink()
    with pytest.warns(RuntimeWarning, match="are gone"):
        _, resumed = fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert Path(resumed.best_model_path).is_file()
    assert lost not in resumed.best_k_models


def test_start_is_analysed_once(tmp_path: Path) -> None:
    fit(tmp_path / "first", fail_at=2, at_start=True)
    resumed, _ = fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last.ckpt", at_start=True)
    assert [r.epoch for r in resumed.history] == [-1, *range(EPOCHS)]


def test_refitting_the_same_trainer_and_callback_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = HessianSpectrumCallback(steps=8, num_samples=48, batch_size=16, checkpoint="highest_c_t")
    trainer = make_trainer(tmp_path, [callback], 2)
    model = Net()
    trainer.fit(model, data())
    assert [r.epoch for r in callback.history] == [0, 1]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, data())
    assert [r.epoch for r in callback.history] == [0, 1, 2, 3]
    assert sum(isinstance(c, HessianCheckpoint) for c in trainer.callbacks) == 1


def test_a_new_trainer_starts_a_new_history(tmp_path: Path) -> None:
    callback = HessianSpectrumCallback(steps=8, num_samples=48, batch_size=16, checkpoint="highest_c_t")
    for run in ("first", "second"):
        torch.manual_seed(0)
        make_trainer(tmp_path / run, [callback], 2).fit(Net(), data())
        assert [r.epoch for r in callback.history] == [0, 1]
        assert {candidate.epoch for candidate in callback.checkpoint.candidates} <= {0, 1}


@pytest.mark.filterwarnings("ignore:.*called with Trainer configured with multiple .ModelCheckpoint. callbacks")
def test_testing_a_checkpoint_loses_nothing_that_came_after_it(tmp_path: Path) -> None:
    """Lightning loads the callbacks' states of whatever checkpoint it tests."""
    torch.manual_seed(0)
    first = HessianCheckpoint("highest_c_t", train_metric="train_acc", tolerance=1.0)
    second = HessianCheckpoint("lowest_max_eigenvalue", train_metric="train_acc", tolerance=1.0)
    callback = HessianSpectrumCallback(steps=8, num_samples=48, batch_size=16, checkpoint=first)
    trainer = make_trainer(tmp_path, [callback, second], EPOCHS)
    trainer.fit(Net(), data())
    picks, candidates = [first.best_model_path, second.best_model_path], [first.candidates, second.candidates]
    assert torch.load(min(first.best_k_models), weights_only=True)["epoch"] < EPOCHS - 1
    for path in {"best", *first.best_k_models, *second.best_k_models}:
        trainer.test(dataloaders=data(), ckpt_path=path, verbose=False)
        assert [r.epoch for r in callback.history] == list(range(EPOCHS))
        assert [first.best_model_path, second.best_model_path] == picks
        assert [first.candidates, second.candidates] == candidates


# Other data, and advice that is followed ------------------------------------------------------------------------------


def go_on(folder: Path, loader: Any, ckpt_path: Path, **arguments: Any) -> tuple[HessianSpectrumCallback, list[str]]:
    """Go on with other data or options, and return what the package warned of."""
    torch.manual_seed(0)
    tolerance = arguments.pop("tolerance_of_rule", 0.05)
    checkpoint = HessianCheckpoint(train_metric="train_acc", tolerance=tolerance, dirpath=folder, save_last=True)
    options = {"steps": 8, "num_samples": 48, "batch_size": 16, **arguments}
    callback = HessianSpectrumCallback(checkpoint=checkpoint, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(folder, [callback], EPOCHS).fit(Net(), loader, ckpt_path=ckpt_path)
    return callback, [str(w.message) for w in caught if "lightning_hesd" in str(w.message)]


def first_samples(count: int) -> DataLoader[Any]:
    return DataLoader(torch.utils.data.Subset(data().dataset, range(count)), batch_size=40)


def test_other_samples_can_be_asked_for(tmp_path: Path) -> None:
    fit(tmp_path / "first", fail_at=3)
    callback, said = go_on(tmp_path / "second", data(), tmp_path / "first" / "last.ckpt", num_samples=40)
    assert [r.spectrum and r.spectrum.num_samples for r in callback.history] == [48, 48, 48, 40, 40, 40]
    assert len(said) == 1
    assert "analyzed 48 samples, and `num_samples` is 40 now: other samples are drawn" in said[0]


def test_data_without_the_samples_drawn_before(tmp_path: Path) -> None:
    """As it says, another `num_samples` draws others."""
    fit(tmp_path / "first", fail_at=4)
    last = tmp_path / "first" / "last.ckpt"
    callback, said = go_on(tmp_path / "second", first_samples(80), last)
    assert [r.error is None for r in callback.history] == [True] * 4 + [False] * 2
    assert all("draw other samples with another `num_samples`" in message for message in said[:3])
    callback, said = go_on(tmp_path / "third", first_samples(80), last, num_samples=47)
    assert [r.spectrum and r.spectrum.num_samples for r in callback.history] == [48] * 4 + [47] * 2
    assert [r.error for r in callback.history] == [None] * 6
    assert len(said) == 1


@pytest.mark.parametrize(
    ("whose", "field", "advice", "changes", "epochs"),
    [
        ("HessianCheckpoint", "candidates", "Resume with another `tolerance`", {"tolerance_of_rule": 0.04}, 6),
        ("HessianSpectrumCallback", "history", "resume with another `name`", {"name": "again"}, 3),
    ],
)
def test_a_damaged_state_says_how_to_go_on(
    tmp_path: Path, whose: str, field: str, advice: str, changes: dict[str, Any], epochs: int
) -> None:
    fit(tmp_path / "first", fail_at=3)
    path = tmp_path / "first" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if key.startswith(whose)]
    del state[field]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=advice):
        go_on(tmp_path / "second", data(), path)
    callback, said = go_on(tmp_path / "third", data(), path, **changes)
    assert not said
    assert [r.error for r in callback.history] == [None] * epochs
    assert callback.checkpoint is not None
    assert callback.checkpoint.best is not None
    assert callback.checkpoint.best.epoch >= 3
    assert Path(callback.checkpoint.best_model_path).is_file()
