"""What a user of the command line has: a LightningModule, data modules, and a run with checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_hesd import HessianSpectrumCallback
from tests.training.modules import QUIET, Digits

ANALYSIS = {"steps": 6, "probes": 2}


class Net(pl.LightningModule):
    """A perceptron whose width comes from its hyperparameters."""

    def __init__(self, width: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["activation"])
        self.net = nn.Sequential(nn.Linear(64, width), activation or nn.Tanh(), nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class ManualNet(Net):
    """The same, optimized manually."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.automatic_optimization = False


def loss(module: Net, batch: Any) -> Tensor:
    """What ManualNet is trained for."""
    return F.cross_entropy(module.net(batch[0]), batch[1])


def plain_loss(module, batch):  # type: ignore[no-untyped-def]  # as many users write functions
    """The same for Net, without a word on types."""
    return loss(module, batch)


@dataclass
class Loss:
    """The same as an object with an argument."""

    scale: float = 1.0

    def __call__(self, module: Net, batch: Any) -> Tensor:
        return self.scale * loss(module, batch)


def weight(batch: Any) -> float:
    return float(len(batch[0]))


def without_biases(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


def negated_loss(record: Any) -> float:
    return -record.spectrum.loss


class FirstDigits(DataLoader[Any]):
    """A dataloader that a configuration can name."""

    def __init__(self, size: int) -> None:
        super().__init__(Digits(size), batch_size=5)


class Data(pl.LightningDataModule):
    """The first digits for training, later ones for everything else."""

    def __init__(self, size: int = 40, batch_size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.batch_size = batch_size

    def loader(self, samples: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(samples, batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> Any:
        return self.loader(Digits(self.size), shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader(Subset(Digits(1000), range(500, 540)))


class Other(Data):
    """The validation data as the training data of a data module."""

    def train_dataloader(self) -> Any:
        return self.val_dataloader()


def run(folder: Path, epochs: int = 3, **callback: Any) -> tuple[HessianSpectrumCallback, list[Path]]:
    """Train, and return the callback with its history and the checkpoints of all epochs."""
    torch.manual_seed(0)
    data = Data()
    spectra = HessianSpectrumCallback(
        num_samples=24, generalization_dataloader=data.val_dataloader(), on_error="raise", **{**ANALYSIS, **callback}
    )
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = pl.Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=[spectra, keep], **QUIET)
    trainer.fit(Net(6), datamodule=data)
    return spectra, [folder / f"epoch={epoch}.ckpt" for epoch in range(epochs)]
