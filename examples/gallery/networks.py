"""Small networks that learn scikit-learn's 8x8 digits in seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.shared import silent_trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch.callbacks import Callback

TRAIN_SIZE = 1200


class Digits(NamedTuple):
    """Images of shape (samples, 64) and their labels."""

    training: TensorDataset
    held_out: TensorDataset


def digits() -> Digits:
    """Return the training set, and the digits that training does not see."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    return Digits(
        TensorDataset(images[:TRAIN_SIZE], labels[:TRAIN_SIZE]), TensorDataset(images[TRAIN_SIZE:], labels[TRAIN_SIZE:])
    )


def loader(data: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    """Return shuffled batches of 60 samples."""
    return DataLoader(data, batch_size=60, shuffle=True, generator=torch.Generator().manual_seed(0))


class Classifier(pl.LightningModule):
    """A perceptron with two hidden layers of 24 units, trained with Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


class HalfPrecisionLinear(torch.autograd.Function):
    """A linear layer that computes with 16 bits, also backward, as kernels for accelerators do."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        return F.linear(values.bfloat16(), weight.bfloat16(), bias.bfloat16()).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        values, weight = (saved.bfloat16() for saved in ctx.saved_tensors)
        [gradient] = (g.bfloat16() for g in gradients)
        return tuple(g.to(gradients[0].dtype) for g in (gradient @ weight, gradient.T @ values, gradient.sum(0)))


half_precision: Any = HalfPrecisionLinear.apply


class HalfPrecisionClassifier(Classifier):
    """The same, but it computes its layers with 16 bits."""

    def forward(self, images: Tensor) -> Tensor:
        values = images
        for layer in self.net:
            is_linear = isinstance(layer, nn.Linear)
            values = half_precision(values, layer.weight, layer.bias) if is_linear else layer(values)
        return values


class DecayedClassifier(Classifier):
    """A perceptron with one hidden layer, whose weights a strong weight decay holds close to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=30)


def train(module: pl.LightningModule, epochs: int, callbacks: Sequence[Callback] = ()) -> None:
    """Train on the digits, without a log."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = silent_trainer(Path(folder), max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu")
        trainer.fit(module, loader(digits().training))
