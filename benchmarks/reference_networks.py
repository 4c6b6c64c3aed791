"""The small networks of the reference range: their settings, their data, and their trainings."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import GPT, ViT
from benchmarks.problems import CHARACTERS, CONTEXT, large_digits, small_digits, text
from examples.shared import quiet, silent_trainer
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from lightning_hesd import SpectrumHistory

Kind = Literal["MLP", "ResNet", "ViT", "GPT"]
OptimizerName = Literal["SGD", "AdamW"]

BATCHES = 8
"""Batches of an epoch, at most: the first analyses must come early in training."""


@dataclass(frozen=True)
class Configuration:
    """The settings of a network and its training, but for the seed.

    Attributes:
        kind: Kind of the network.
        width: Hidden units, channels of the first stage, or features of a token.
        depth: Hidden layers, residual blocks of a stage, or transformer blocks.
        optimizer: SGD with momentum 0.9, or AdamW with PyTorch's weight decay of 0.01; constant learning rate.
        rate: Learning rate.
        data: Name of scikit-learn's data set; the GPT's text is generated.
        activation: Activation of an MLP.
    """

    kind: Kind
    width: int
    depth: int
    optimizer: OptimizerName
    rate: float
    data: str = "digits"
    activation: Literal["ReLU", "Tanh", "GELU"] = "ReLU"

    @property
    def architecture(self) -> str:
        """The kind by the names of the reference table."""
        return {"MLP": "perceptron", "ResNet": "convolution"}.get(self.kind, "attention")

    @property
    def name(self) -> str:
        """The settings as the name of a folder."""
        plain = (self.kind, self.width, self.depth, self.optimizer, self.rate, self.data, self.activation)
        return "-".join(map(str, plain))

    @property
    def words(self) -> str:
        """The settings in words."""
        activation = f", {self.activation}" if self.kind == "MLP" else ""
        return f"{self.kind} {self.width}×{self.depth}{activation}, {self.data}, {self.optimizer} {self.rate:g}"


@dataclass(frozen=True)
class Size:
    """How much is trained and analyzed.

    Attributes:
        epochs: Epochs after which networks are analyzed, counted from 0; the last one ends training.
        samples: Samples of an analysis, at most; of text, sequences: an eighth.
        steps: Lanczos steps.
        batch: Samples of a training batch; of text, an eighth.
    """

    epochs: tuple[int, ...] = (0, 3, 15, 63)
    samples: int = 256
    steps: int = 30
    batch: int = 64


QUICK = Size(epochs=(0, 1), samples=32, steps=6, batch=16)


def _mlp(width: int, depth: int, optimizer: OptimizerName, *more: Any) -> Configuration:
    return Configuration("MLP", width, depth, optimizer, 0.05 if optimizer == "SGD" else 3e-3, *more)


def _resnet(width: int, depth: int, optimizer: OptimizerName) -> Configuration:
    return Configuration("ResNet", width, depth, optimizer, 0.05 if optimizer == "SGD" else 3e-3)


def _vit(width: int, depth: int, optimizer: OptimizerName, rate: float) -> Configuration:
    return Configuration("ViT", width, depth, optimizer, rate)


def _gpt(width: int, depth: int, optimizer: OptimizerName, rate: float) -> Configuration:
    return Configuration("GPT", width, depth, optimizer, rate, "text")


CONFIGURATIONS: tuple[Configuration, ...] = (
    _mlp(16, 1, "SGD"),
    _mlp(32, 2, "AdamW"),
    _mlp(32, 2, "SGD", "digits", "Tanh"),
    _mlp(64, 1, "AdamW", "digits", "GELU"),
    _mlp(64, 2, "SGD"),
    _mlp(96, 2, "AdamW", "digits", "Tanh"),
    _mlp(128, 2, "AdamW"),
    _mlp(128, 3, "SGD", "digits", "GELU"),
    _mlp(256, 2, "SGD"),
    _mlp(256, 3, "AdamW"),
    _mlp(384, 3, "SGD"),
    _mlp(16, 2, "SGD", "iris", "Tanh"),
    _mlp(32, 2, "AdamW", "iris"),
    _mlp(24, 1, "AdamW", "wine"),
    _mlp(32, 2, "SGD", "wine"),
    _mlp(64, 2, "AdamW", "wine", "Tanh"),
    _mlp(16, 1, "AdamW", "breast_cancer"),
    _mlp(32, 2, "AdamW", "breast_cancer", "Tanh"),
    _mlp(128, 2, "SGD", "breast_cancer"),
    _mlp(32, 2, "AdamW", "diabetes"),
    _mlp(96, 2, "SGD", "diabetes", "Tanh"),
    _resnet(4, 1, "SGD"),
    _resnet(4, 1, "AdamW"),
    _resnet(4, 2, "AdamW"),
    _resnet(6, 1, "SGD"),
    _resnet(8, 1, "SGD"),
    _resnet(8, 1, "AdamW"),
    _resnet(8, 2, "SGD"),
    _resnet(12, 1, "SGD"),
    _resnet(12, 1, "AdamW"),
    _resnet(12, 2, "AdamW"),
    _resnet(16, 1, "SGD"),
    _resnet(16, 2, "AdamW"),
    _resnet(24, 1, "SGD"),
    _resnet(24, 1, "AdamW"),
    _vit(8, 1, "AdamW", 3e-3),
    _vit(8, 2, "AdamW", 3e-3),
    _vit(12, 2, "SGD", 0.05),
    _vit(16, 2, "AdamW", 3e-3),
    _vit(24, 2, "SGD", 0.05),
    _vit(32, 2, "AdamW", 1e-3),
    _vit(40, 3, "AdamW", 1e-3),
    _gpt(8, 1, "AdamW", 1e-2),
    _gpt(8, 2, "AdamW", 1e-2),
    _gpt(16, 1, "AdamW", 1e-2),
    _gpt(16, 2, "AdamW", 3e-3),
    _gpt(24, 2, "AdamW", 3e-3),
    _gpt(32, 2, "AdamW", 3e-3),
    _gpt(32, 2, "SGD", 0.1),
    _gpt(48, 2, "AdamW", 3e-3),
)


class Residual(nn.Module):
    """Two 3×3 convolutions with batch normalization beside a shortcut; more channels at half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return activations, shape (images, outputs, height, width)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(width: int, depth: int) -> nn.Module:
    """Return a residual network with two stages for 8×8 images, given the channels and blocks of the first stage."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(Residual(width, width) for _ in range(depth)),
        Residual(width, 2 * width),
        *(Residual(2 * width, 2 * width) for _ in range(depth - 1)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10)),
    )


def mlp(inputs: int, outputs: int, configuration: Configuration) -> nn.Module:
    """Return a perceptron."""
    sizes = [inputs, *[configuration.width] * configuration.depth]
    hidden = [
        layer
        for size in sizes[:-1]
        for layer in (nn.Linear(size, configuration.width), getattr(nn, configuration.activation)())
    ]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


@cache
def data(configuration_data: str, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return inputs and targets: labels, or values to regress on, of mean 0 and variance 1, shape (samples, 1)."""
    generator = torch.Generator().manual_seed(0)
    if configuration_data == "text":
        return text(generator)
    if configuration_data == "digits":
        return large_digits(generator) if kind == "ViT" else small_digits(generator)
    inputs, targets = getattr(datasets, f"load_{configuration_data}")(return_X_y=True)
    inputs = _standardized(torch.as_tensor(inputs, dtype=torch.float32))
    if configuration_data == "diabetes":
        return inputs, _standardized(torch.as_tensor(targets, dtype=torch.float32)[:, None])
    return inputs, torch.as_tensor(targets)


def _standardized(values: Tensor) -> Tensor:
    return (values - values.mean(dim=0)) / values.std(dim=0)


def network(configuration: Configuration) -> nn.Module:
    """Return the network of a configuration with random weights."""
    if configuration.kind == "ResNet":
        return resnet(configuration.width, configuration.depth)
    heads = 2 if configuration.width <= 24 else 4
    if configuration.kind == "ViT":
        return ViT(configuration.width, configuration.depth, heads, patch=8)
    if configuration.kind == "GPT":
        return GPT(len(CHARACTERS), CONTEXT, configuration.width, configuration.depth, heads)
    inputs, targets = data(configuration.data, "MLP")
    return mlp(inputs.shape[1], 1 if targets.is_floating_point() else int(targets.max()) + 1, configuration)


class Learner(pl.LightningModule):
    """A network that learns by cross-entropy, or by the mean squared error."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__()
        self.configuration = configuration
        self.network = network(configuration)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the mean loss."""
        inputs, targets = batch
        outputs = self.network(inputs)
        if targets.is_floating_point():
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs, targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the configuration."""
        rate = self.configuration.rate
        if self.configuration.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), rate, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), rate)


def train(configuration: Configuration, seed: int, size: Size) -> SpectrumHistory:
    """Train, and return the records, the first one before the first step."""
    part = 8 if configuration.kind == "GPT" else 1  # every character of a sequence is a sample
    pl.seed_everything(seed, verbose=False)
    callback = HessianSpectrumCallback(
        epochs=size.epochs,
        at_start=True,
        num_samples=size.samples // part,
        steps=size.steps,
        progress=False,
        on_error="raise",
    )
    samples = TensorDataset(*data(configuration.data, configuration.kind))
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = silent_trainer(
            Path(folder),
            max_epochs=size.epochs[-1] + 1,
            limit_train_batches=BATCHES,
            accelerator="cpu",
            callbacks=[callback],
        )
        trainer.fit(Learner(configuration), DataLoader(samples, batch_size=size.batch // part, shuffle=True))
    return callback.history
