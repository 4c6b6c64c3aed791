"""A small classifier of handwritten digits, and its data."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianSpectrumCallback
from tests.training.modules import digits
from tests.training.scripted import make_trainer


class Net(pl.LightningModule):
    """A small classifier; `fail_at` interrupts training in that epoch."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == self.fail_at and batch_idx == 1:
            msg = "power cut"
            raise RuntimeError(msg)
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_acc", (self.net(x).argmax(1) == y).float().mean(), on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.03)


def data(first: int = 0) -> DataLoader[Any]:
    """Return 160 digits from the given one on."""
    # In order: Lightning does not restore the random state that shuffling depends on.
    return DataLoader(TensorDataset(*(part[first : first + 160] for part in digits())), batch_size=40)


def callback(**options: Any) -> HessianSpectrumCallback:
    """Return a callback with short analyses."""
    return HessianSpectrumCallback(**{"steps": 8, "num_samples": 48, "batch_size": 16, **options})


def fit(
    folder: Path, *callbacks: Any, net: Any = Net, epochs: int = 2, ckpt_path: Any = None, **arguments: Any
) -> pl.Trainer:
    """Train from the same initial weights, with epochs of four steps, and return the Trainer."""
    torch.manual_seed(0)
    trainer = make_trainer(folder, list(callbacks), epochs, **{"log_every_n_steps": 4, **arguments})
    trainer.fit(net(), data(), ckpt_path=ckpt_path)
    return trainer
