"""One run: train a network in Lightning, analyze its layers, and measure its ability to memorize."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.layer_study.data import Data, load
from examples.layer_study.outcomes import Numbers, is_done, write
from examples.shared import quiet, silent_trainer
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from pathlib import Path

    from examples.layer_study.settings import Run, Setup


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy for classes, the mean squared error for numbers."""
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


class MLP(pl.LightningModule):
    """Equally wide hidden layers with tanh.

    Not ReLU: a ReLU network is piecewise linear in the parameters of each layer, so the layer's Hessian is a
    Gauss-Newton matrix, without negative eigenvalues if the loss is convex. For the same reason the last layer here has
    none.
    """

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        hidden: list[nn.Module] = []
        for before, after in itertools.pairwise([inputs, *[width] * depth]):
            hidden += [nn.Linear(before, after), nn.Tanh()]
        self.network = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    @torch.no_grad()
    def performance(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Return the loss, and accuracy or R²."""
        outputs = self.network(x)
        if y.is_floating_point():
            score = 1 - (outputs - y).square().mean() / y.var(correction=0)
        else:
            score = (outputs.argmax(1) == y).float().mean()
        return float(loss(outputs, y)), float(score)


def constant_loss(y: Tensor) -> float:
    """Return the training loss of the best constant prediction."""
    if y.is_floating_point():
        return float(y.var(correction=0))
    shares = y.bincount().double() / len(y)
    return -math.fsum(share * math.log(share) for share in shares.tolist() if share)


def run(settings: Run, out: Path) -> float:
    """Train and write the outcome, unless it exists. Return the seconds this took."""
    folder = out / settings.folder
    if is_done(folder):
        return 0.0
    torch.set_num_threads(1)  # more threads hardly help here, and the other worker needs the core
    started, setup = time.perf_counter(), settings.setup
    data = load(settings.dataset, settings.seed, setup.train_size)
    everything = len(data.x_train)
    analysis = HessianSpectrumCallback(
        epochs=[setup.epochs // 2 - 1, setup.epochs - 1],
        layers="auto",
        num_samples=everything,
        batch_size=everything,
        steps=setup.steps,
        probes=setup.probes,
        progress=False,
        on_error="raise",
    )
    with quiet():
        network = _trained(settings, data, data.y_train, folder, [analysis])
        train_loss, train_score = network.performance(data.x_train, data.y_train)
        test_loss, test_score = network.performance(data.x_test, data.y_test)
        # How well the same network memorizes targets that do not depend on the inputs.
        order = torch.randperm(everything, generator=torch.Generator().manual_seed(settings.seed))
        shuffled = data.y_train[order]
        shuffled_loss, _ = _trained(settings, data, shuffled, folder, []).performance(data.x_train, shuffled)
    numbers = Numbers(
        train_loss=train_loss,
        test_loss=test_loss,
        train_score=train_score,
        test_score=test_score,
        constant_loss=constant_loss(data.y_train),
        shuffled_loss=shuffled_loss,
        parameters=sum(p.numel() for p in network.parameters()),
        train_size=everything,
        test_size=len(data.x_test),
        features=data.x_train.shape[1],
        seconds=time.perf_counter() - started,
    )
    write(settings, folder, numbers)
    return numbers.seconds


def _trained(settings: Run, data: Data, targets: Tensor, folder: Path, callbacks: list[pl.Callback]) -> MLP:
    setup: Setup = settings.setup
    pl.seed_everything(settings.seed, verbose=False)
    network = MLP(data.x_train.shape[1], data.outputs, settings.width, settings.depth, setup.learning_rate)
    trainer = silent_trainer(
        folder,
        max_epochs=setup.epochs,
        accelerator="cpu",
        callbacks=callbacks,
    )
    trainer.fit(network, DataLoader(TensorDataset(data.x_train, targets), setup.batch_size, shuffle=True))
    return network
