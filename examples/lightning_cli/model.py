"""The LightningModule and the LightningDataModule that `config.yaml` names; both contain no code for spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

if TYPE_CHECKING:
    from torch.utils.data import Dataset


class Perceptron(pl.LightningModule):
    """Two linear layers.

    Args:
        width: Hidden units.
        lr: Learning rate.
    """

    def __init__(self, width: int = 32, lr: float = 0.003) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))
        self.train_acc, self.val_acc = (MulticlassAccuracy(10, average="micro") for _ in range(2))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        self.train_acc(logits, labels)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.val_acc(self.net(batch[0]), batch[1])
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(pl.LightningDataModule):
    """The 8x8 digits of scikit-learn.

    Args:
        train_size: Number of digits to train on, of 1797; the others are for validation.
        batch_size: Number of digits in a batch.
    """

    def __init__(self, train_size: int = 1200, batch_size: int = 64) -> None:
        super().__init__()
        self.train_size = train_size
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:  # noqa: ARG002 - of Lightning
        images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        data = TensorDataset(images.float() / 16, labels)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        self.train: Dataset[tuple[Tensor, ...]] = torch.utils.data.Subset(data, order[: self.train_size])
        self.val: Dataset[tuple[Tensor, ...]] = torch.utils.data.Subset(data, order[self.train_size :])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, 256)


def cross_entropy(module: Perceptron, batch: list[Tensor]) -> Tensor:
    """Return the loss without the metrics, for `loss_fn: examples.lightning_cli.model.cross_entropy`."""
    return F.cross_entropy(module.net(batch[0]), batch[1])
