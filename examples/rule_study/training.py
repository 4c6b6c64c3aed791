"""One training of the study: a network and a schedule of the learning rate, analyzed twelve times."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from examples.digits import digits
from examples.paper_hesd.networks import ViT, resnet
from examples.shared import quiet, silent_trainer
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from pathlib import Path

Network = Literal["mlp", "resnet", "vit"]
Schedule = Literal["constant", "cosine", "too long"]
NETWORKS: tuple[Network, ...] = ("mlp", "resnet", "vit")
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "too long")

TRAIN, VALIDATION, HELD_OUT = range(900), range(900, 1200), range(1200, 1796)
"""The digits for each purpose; those held out are also distorted, as data from a shifted distribution."""

POINTS = 12
"""Analyses of a training, evenly spaced."""

TOO_LONG = 4
"""How many times as many epochs the schedule "too long" has."""

DONE = "settings.json"


@dataclass(frozen=True)
class Training:
    """The settings of a training.

    Attributes:
        network: Key of the network.
        schedule: "constant" learning rate; "cosine", to zero at the end; "too long": constant, for four times as long.
        seed: Seed of initialization and order of samples; the data are the same for every seed.
        epochs: Epochs of the schedules "constant" and "cosine", a multiple of `POINTS`.
        steps: Lanczos steps of every spectrum.
        samples: Training samples of every spectrum.
    """

    network: Network
    schedule: Schedule
    seed: int
    epochs: int
    steps: int = 20
    samples: int = 128

    @property
    def name(self) -> str:
        """Name of the folder."""
        return f"{self.network}-{self.schedule.replace(' ', '-')}-{self.seed:02d}"

    @property
    def all_epochs(self) -> int:
        """Number of epochs."""
        return self.epochs * (TOO_LONG if self.schedule == "too long" else 1)


class Classifier(pl.LightningModule):
    def __init__(self, network: nn.Module, epochs: int, *, cosine: bool) -> None:
        super().__init__()
        self.network = network
        self.epochs, self.cosine = epochs, cosine
        self.accuracies = nn.ModuleList(MulticlassAccuracy(10, average="micro") for _ in ("val", "test", "shifted"))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        logits, name = self.network(batch[0]), ("val", "test", "shifted")[dataloader_idx]
        accuracy = self.accuracies[dataloader_idx]
        accuracy(logits, batch[1])
        assert isinstance(accuracy, MulticlassAccuracy)
        self.log(f"{name}_acc", accuracy, add_dataloader_idx=False)
        self.log(f"{name}_loss", F.cross_entropy(logits, batch[1]), add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)
        if not self.cosine:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def build(network: Network) -> nn.Module:
    """Return a network for images of 8x8 pixels, with random weights."""
    if network == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
        )
    if network == "resnet":
        return resnet(channels=1, classes=10, width=8, blocks=1)
    return ViT(1, 16, 10, width=24, depth=2, heads=2, patch=2)


def is_done(training: Training, out: Path) -> bool:
    """Whether this training has ended, with these settings."""
    path = out / training.name / DONE
    return path.exists() and json.loads(path.read_text()) == asdict(training)


def run(training: Training, out: Path) -> None:
    """Train, and write the history of spectra to the folder of the training."""
    torch.set_num_threads(1)  # more threads hardly help here, and other trainings need the cores
    folder = out / training.name
    with quiet():
        pl.seed_everything(training.seed, verbose=False)
        learning, shifted = digits()
        everything, _ = digits(train_size=HELD_OUT.stop)  # in the same order; one must be left to distort
        held_out = Subset(everything, HELD_OUT)
        module = Classifier(build(training.network), training.all_epochs, cosine=training.schedule == "cosine")
        validation = Subset(learning, VALIDATION)
        every = training.all_epochs // POINTS
        callback = HessianSpectrumCallback(
            every,
            num_samples=training.samples,
            batch_size=training.samples,  # small images: all in one batch
            steps=training.steps,
            generalization_dataloader=DataLoader(validation, batch_size=len(VALIDATION)),
            preconditioner="optimizer",
            progress=False,
        )
        trainer = silent_trainer(
            folder,
            max_epochs=training.all_epochs,
            check_val_every_n_epoch=every,
            accelerator="cpu",
            callbacks=[callback],
        )
        trainer.fit(
            module,
            DataLoader(Subset(learning, TRAIN), batch_size=64, shuffle=True),
            [DataLoader(data, batch_size=597) for data in (validation, held_out, shifted)],
        )
        (folder / DONE).write_text(json.dumps(asdict(training)))
