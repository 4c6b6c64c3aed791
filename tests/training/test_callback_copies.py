"""Copies of the callback: libraries keep it in hyperparameters, and train with deep copies of it."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from tests.training import modules
from tests.training.modules import own_warnings, pickled
from tests.training.scripted import make_trainer

FEATURES = 4096
SMALL = 60_000
"""Bytes of a callback with two records; its samples take a megabyte."""


class Keeper(pl.LightningModule):
    """Keeps the callbacks in its hyperparameters, as libraries do."""

    def __init__(self, callbacks: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(FEATURES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


class PickledAtEachEpoch(pl.Callback):
    """Copies and pickles another callback during training."""

    def __init__(self, other: pl.Callback) -> None:
        self.other = other
        self.sizes: list[int] = []

    def on_train_epoch_end(self, *_args: Any) -> None:
        copy.deepcopy(self.other)
        self.sizes.append(len(pickle.dumps(self.other)))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(64, FEATURES, generator=generator)), 32)


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, logger: bool = False) -> None:
    make_trainer(folder, list(callbacks), 2, logger=logger, log_every_n_steps=1).fit(module, loader())


callback = functools.partial(modules.callback, checkpoint="highest_c_t", num_samples=512)


def largest(observer: HessianSpectrumCallback) -> list[Any]:
    return [record.spectrum and record.spectrum.lambda_max for record in observer.history]


def test_checkpoints_with_the_callback_in_their_hyperparameters_stay_small(tmp_path: Path) -> None:
    """Also with functions that cannot be pickled; a copy keeps the candidates of such a rule."""
    rule = HessianCheckpoint(lambda record: -record.spectrum.lambda_max)
    options = {"loss_fn": lambda module, batch: module.training_step(batch, 0), "checkpoint": rule}
    hesd = callback(monitor_gradients=True, **options)
    pickler = PickledAtEachEpoch(hesd)
    fit(tmp_path, Keeper([hesd]), pickler, hesd, logger=True)
    assert len(hesd.history) == 2
    assert max(pickler.sizes) < SMALL
    assert Path(hesd.checkpoint.best_model_path).stat().st_size < 4 * FEATURES + 2 * SMALL
    state = torch.load(hesd.checkpoint.best_model_path, weights_only=False)
    (kept,) = state["hyper_parameters"]["callbacks"]
    assert kept.options.steps == 3

    copied = pickled(hesd)
    assert largest(copied) == largest(hesd)
    for name in ("best_model_path", "rule_name", "state_key"):
        assert getattr(copied.checkpoint, name) == getattr(rule, name)
    assert copied.checkpoint.source is copied


def test_a_pickled_copy_trains_as_the_original(tmp_path: Path) -> None:
    hesd = callback(batch_size=16)
    copied = pickled(hesd)
    for each in (hesd, copied):
        pl.seed_everything(0, verbose=False)
        fit(tmp_path / str(id(each)), Keeper(), each)
    assert largest(copied) == largest(hesd)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss_fn", {"loss_fn": lambda module, batch: module.training_step(batch, 0)}),
        ("dataloader", {"dataloader": loader()}),
        ("batch_weight", {"batch_weight": lambda batch: float(len(batch))}),
    ],
)
def test_a_pickled_copy_says_what_it_lacks(tmp_path: Path, name: str, options: Any) -> None:
    hesd = callback(checkpoint=None, on_error="warn", **options)
    assert len(pickle.dumps(hesd)) < SMALL
    copied = pickled(hesd)
    with own_warnings():
        fit(tmp_path, Keeper(), copied)
    assert [record.spectrum for record in copied.history] == [None, None]
    assert f"`{name}` is missing in this pickled copy" in copied.history[0].error
    pickled(copied)


def test_the_original_shows_what_its_latest_copy_found(tmp_path: Path) -> None:
    template = callback()
    first, second = copy.deepcopy(template), copy.copy(copy.deepcopy(template))
    for fold, each in enumerate((first, second)):
        fit(tmp_path / f"fold{fold}", Keeper(), each)
        assert list(template.history) == list(each.history)
        assert len(template.history) == 2
        assert template.checkpoint.best_model_path == each.checkpoint.best_model_path
        assert f"fold{fold}" in template.checkpoint.best_model_path
    assert list(first.history) != list(second.history)
    assert "fold0" in first.checkpoint.best_model_path

    fit(tmp_path / "own", Keeper(), template)
    assert "own" in template.checkpoint.best_model_path
    assert len(first.history) == len(second.history) == len(template.history) == 2
    assert "fold0" in first.checkpoint.best_model_path
