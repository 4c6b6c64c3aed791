"""Small trainings with planted faults, and healthy ones, for `benchmarks.findings`."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problems import small_digits
from examples.shared import quiet, silent_trainer
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_hesd import SpectrumHistory

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, momentum: float = 0.0) -> Optimizer:
    """Return a function that makes the optimizer of parameters."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adam(lr: float) -> Optimizer:
    """Return a function that makes the optimizer of parameters."""
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def perceptron(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a perceptron with two hidden layers, 3,500 parameters."""
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10))


def smooth() -> nn.Sequential:
    """Return the same with tanh."""
    return perceptron(nn.Tanh)


def convolutional() -> nn.Sequential:
    """Return two convolutions with batch normalization, 3,000 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


@dataclass(frozen=True)
class Case:
    """A training, healthy or with a fault.

    Attributes:
        name: The fault, or network and optimizer.
        key: Finding that the fault should raise; None: a healthy training.
        network: Makes the network.
        optimizer: Makes the optimizer.
        epochs: Number of epochs.
        batch: Samples of a batch; None: all in one.
        analysis: Options of the callback that differ from the usual ones.
        rescaled: Whether the second layer is divided by 30 before the last epoch, and the third one multiplied by it,
            which changes no output; training stops then.
        costly: Whether analyses are taken for long and expensive ones, which these are not.
    """

    name: str
    key: str | None = None
    network: Callable[[], nn.Module] = perceptron
    optimizer: Optimizer = field(default_factory=lambda: adam(3e-3))
    epochs: int = 24
    batch: int | None = 64
    analysis: dict[str, Any] = field(default_factory=dict)
    rescaled: bool = False
    costly: bool = False


class Square(torch.autograd.Function):
    """x², with a second derivative of 3 in place of 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Square."""
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return a derivative with the right value and a wrong derivative."""
        (x,) = ctx.saved_tensors
        return grad * (3 * x - x.detach())


def cross_entropy(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the loss of training."""
    return F.cross_entropy(module(batch[0]), batch[1])


def wrong_second_derivative(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return a loss whose second derivative by autograd is wrong."""
    square: Tensor = Square.apply(module(batch[0]))  # type: ignore[no-untyped-call]
    return F.cross_entropy(module(batch[0]), batch[1]) + square.mean()


def no_gradient(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return a loss whose gradient lacks a part."""
    hidden: Tensor = (module(batch[0]) ** 2).mean().detach()
    return cross_entropy(module, batch) + hidden


def failing(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Raise an error in the second half of training.

    Raises:
        OSError: From the middle of training on.
    """
    if isinstance(module, Classifier) and module.current_epoch >= module.case.epochs // 2:
        msg = "the file of the samples is gone"
        raise OSError(msg)
    return cross_entropy(module, batch)


def concave(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return a loss with strong negative curvature in one layer."""
    layer: Any = dict(module.named_parameters())["network.2.weight"]
    loss: Tensor = cross_entropy(module, batch) - 100 * layer.square().sum()
    return loss


FAULTS = (
    Case("an analysis that raises", "failed", analysis={"loss_fn": failing}),
    Case(
        "a wrong second derivative", "unverified",
        analysis={"loss_fn": wrong_second_derivative, "strategy": "recompute"},
    ),
    Case("a part of the loss without gradient", "unverified", analysis={"loss_fn": no_gradient}),
    Case("three Lanczos steps", "short_run", analysis={"steps": 3}),
    Case("32 samples", "small_sample", analysis={"num_samples": 32}),
    Case("untrained weights", "mainly_negative", optimizer=sgd(1e-6)),
    Case("negative curvature in one layer", "mainly_negative", analysis={"loss_fn": concave}),
    Case(
        "large steps of gradient descent", "edge_of_stability", optimizer=sgd(0.3), epochs=400,
        batch=None,
    ),
    Case("excessive training", "quasi_singular", optimizer=adam(1e-2), epochs=240),
    Case("a layer scaled by 30", "concentrated", rescaled=True),
    Case("a tiny learning rate", "headroom", optimizer=sgd(1e-4, 0.9), epochs=60),
    Case("analyses that cost three trainings", "cost", costly=True),
)  # fmt: skip

HEALTHY = tuple(
    Case(f"{name}, {words}", network=network, optimizer=optimizer)
    for name, network in (("ReLU", perceptron), ("tanh", smooth), ("convolutions", convolutional))
    for words, optimizer in (("SGD with momentum", sgd(0.05, 0.9)), ("Adam", adam(3e-3)))
)


class Classifier(pl.LightningModule):
    """A network that learns digits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.network = case.network()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (images, 10)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the mean loss."""
        return cross_entropy(self, batch)

    def on_train_epoch_start(self) -> None:
        """Scale layers before the last epoch, and stop training, if the case asks for it."""
        if not self.case.rescaled or self.current_epoch < self.case.epochs - 1:
            return
        parameters: dict[str, Any] = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, factor in (("2.weight", 1 / 30), ("2.bias", 1 / 30), ("4.weight", 30)):
                parameters[name].mul_(factor)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the case."""
        return self.case.optimizer(self.parameters())


@dataclass(frozen=True)
class Size:
    """How much is trained and analyzed."""

    seeds: int = 4
    samples: int = 512
    steps: int = 30
    analyses: int = 8
    share: int = 1
    """Divisor of the numbers of epochs."""


QUICK = Size(seeds=1, samples=64, steps=6, analyses=2, share=8)


def train(case: Case, seed: int, size: Size) -> SpectrumHistory:
    """Train, and return the records, the first one before the first step."""
    pl.seed_everything(seed, verbose=False)
    data = TensorDataset(*small_digits(torch.Generator().manual_seed(0)))
    epochs = max(case.epochs // size.share, size.analyses)
    options = {"num_samples": size.samples, "steps": size.steps, "loss_fn": None, **case.analysis}
    callback = HessianSpectrumCallback(
        epochs // size.analyses,
        at_start=True,
        sampling_error=True,
        preconditioner="optimizer",
        progress=False,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder, expected_warnings():
        trainer = silent_trainer(Path(folder), max_epochs=epochs, accelerator="cpu", callbacks=[callback])
        loader = DataLoader(data, batch_size=case.batch or len(data), shuffle=case.batch is not None)
        trainer.fit(Classifier(replace(case, epochs=epochs)), loader)
    return callback.history


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """Suppress the warnings of faults."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
