"""The same module and data in both namespaces of Lightning, as a configuration can name them."""

from typing import Any

import lightning.pytorch as pl
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.training.modules import digits

NAMESPACES = {"lightning.pytorch": pl, "pytorch_lightning": pytorch_lightning}


def loader() -> DataLoader[Any]:
    """Four batches of eight digits."""
    x, y = digits()
    return DataLoader(TensorDataset(x[:32], y[:32]), batch_size=8)


class Steps:
    """What the modules have in common."""

    log: Any
    parameters: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Loaders:
    """What the data modules have in common."""

    def train_dataloader(self) -> Any:
        return loader()

    val_dataloader = train_dataloader


class Net(Steps, pl.LightningModule): ...


class OtherNet(Steps, pytorch_lightning.LightningModule): ...


class Data(Loaders, pl.LightningDataModule): ...


class OtherData(Loaders, pytorch_lightning.LightningDataModule): ...


NETS: dict[str, type[Any]] = {"lightning.pytorch": Net, "pytorch_lightning": OtherNet}
DATA: dict[str, type[Any]] = {"lightning.pytorch": Data, "pytorch_lightning": OtherData}
