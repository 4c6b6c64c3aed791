"""Small LightningModules, datasets and short runs: the material of the Lightning tests.

Everything is reproducible from seeds. Batches are `(x, y, position)`, so that a test can see which samples were read.
"""

import contextlib
import functools
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hesd import HessianSpectrumCallback

SIZE = 40
"""Number of samples of a dataset unless a test says otherwise."""


def seed(value: int = 0) -> None:
    """Seed the global generators."""
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the legacy generator is one of those to be left alone
    torch.manual_seed(value)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return images in [0, 1], shape (1797, 64), and their classes."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def samples(positions: Any) -> list[Tensor]:
    """Return the batch of the digits at these positions, without augmentation."""
    x, y = digits()
    return [x[positions], y[positions], torch.as_tensor(positions)]


class Digits(Dataset[tuple[Tensor, Tensor, int]]):
    """The first digits as (image, class, position); `read` lists the positions read so far."""

    def __init__(self, size: int = SIZE, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.size = size
        self.augment = augment
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        if not 0 <= position < self.size:
            raise IndexError(position)
        self.read.append(position)
        x, y = digits()
        image = x[position].clone()
        return image if self.augment is None else self.augment(image), y[position], position


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: x + 0.5 * torch.randn(64),
    "numpy": lambda x: x + torch.tensor(np.random.normal(size=64), dtype=torch.float32),  # noqa: NPY002
    "python": lambda x: x * random.random(),
}
"""Augmentations, from the global generator of each library."""


def noise_of_all(x: Tensor) -> Tensor:
    """Augment from each of the global generators."""
    return functools.reduce(lambda noisy, noise: noise(noisy), NOISES.values(), x)


def loader(dataset: Any = None, **kwargs: Any) -> DataLoader[Any]:
    """Return a DataLoader, of batches of 8 unless batches are made otherwise."""
    if "batch_sampler" not in kwargs:
        kwargs.setdefault("batch_size", 8)
    return DataLoader(Digits() if dataset is None else dataset, **kwargs)


class Classifier(pl.LightningModule):
    """A two-layer perceptron, initialized the same every time, that logs and has an LR scheduler."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.net = nn.Sequential(nn.Linear(64, 6), *extra, nn.Tanh(), nn.Linear(6, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = plain_loss(self, batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def plain_loss(module: pl.LightningModule, batch: Any) -> Tensor:
    """Return the loss of a batch (x, y, ...) without the training_step."""
    return F.cross_entropy(module(batch[0]), batch[1])


class Validated(Classifier):
    """Logs the loss on validation data."""

    def val_dataloader(self) -> Any:
        return loader(Digits(16))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", plain_loss(self, batch), batch_size=len(batch[1]))


class DataModule(pl.LightningDataModule):
    """A datamodule around a function that makes the training dataloader."""

    def __init__(self, make_loader: Callable[[], Any] = loader) -> None:
        super().__init__()
        self.make_loader = make_loader

    def train_dataloader(self) -> Any:
        return self.make_loader()


class Recorder(pl.Callback):
    """Keeps what training saw: batches as they arrived, and the modes of all submodules then."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.modes: list[list[bool]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append([part.clone() if isinstance(part, Tensor) else part for part in batch])
        self.modes.append([module.training for module in pl_module.modules()])


class Copies(pl.Callback):
    """Keeps a copy of the network after every step."""

    def __init__(self) -> None:
        self.networks: dict[int, Classifier] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.networks[trainer.global_step] = Classifier()
        self.networks[trainer.global_step].load_state_dict(pl_module.state_dict())


class SeenByLoss:
    """A `loss_fn` that keeps copies of the batches of each analysis, without those of its comparison in float64."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, module: pl.LightningModule, batch: Any) -> Tensor:
        if torch.get_default_dtype() == torch.float32:
            self.keep(batch)
        return plain_loss(module, batch)

    def keep(self, batch: Any) -> None:
        """Keep a copy."""
        self.batches.append([part.clone() for part in batch])


def callback(*args: Any, **kwargs: Any) -> HessianSpectrumCallback:
    """Return a callback with short analyses, whose failures fail the test unless it says otherwise."""
    return HessianSpectrumCallback(*args, **{"steps": 3, "num_samples": 16, "on_error": "raise", **kwargs})


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that neither shows nor logs anything."""


def make_trainer(tmp_path: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """Return a quiet Trainer that writes below `tmp_path` only."""
    settings = {**QUIET, "devices": 1, "enable_checkpointing": False, "log_every_n_steps": 1, "max_epochs": 2}
    if kwargs.get("barebones"):  # refuses to be told what it does anyway
        settings = {key: settings[key] for key in ("accelerator", "devices", "max_epochs")}
    return pl.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**settings, **kwargs})


def fit(
    tmp_path: Path,
    *callbacks: pl.Callback,
    module: pl.LightningModule | None = None,
    data: Any = None,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> pl.Trainer:
    """Train with fixed seeds, and return the Trainer."""
    trainer = make_trainer(tmp_path, *callbacks, **kwargs)
    seed(7)
    module = Classifier() if module is None else module
    data = loader(shuffle=True) if data is None else data
    sources = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}
    trainer.fit(module, ckpt_path=ckpt_path, **sources)
    return trainer


@contextlib.contextmanager
def own_warnings() -> Iterator[list[str]]:
    """Let the package warn, and collect its warnings once the block has been left."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "lightning_hesd: ")
        yield said
    said += [text for w in caught if (text := str(w.message)).startswith("lightning_hesd: ")]


def pickled(original: Any) -> Any:
    """Return a copy that has been pickled."""
    return pickle.loads(pickle.dumps(original))  # noqa: S301 - its own


def freeze(value: Any) -> Any:
    """Turn any nested value into something that `==` compares bit by bit."""
    if isinstance(value, Tensor | np.ndarray):
        # NumPy knows no bfloat16, hence the bytes.
        raw = value.detach().reshape(-1).view(torch.uint8).numpy() if isinstance(value, Tensor) else value
        return str(value.dtype), tuple(value.shape), raw.tobytes()
    if isinstance(value, dict):
        return [(key, freeze(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [freeze(item) for item in value]
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, torch.Generator):
        return freeze(value.get_state())
    if isinstance(value, np.random.Generator):
        return freeze(value.bit_generator.state)
    return _freeze_object(value)


def _freeze_object(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "__slots__"):
        return [(name, freeze(getattr(value, name))) for name in value.__slots__]
    return freeze(vars(value)) if hasattr(value, "__dict__") else value


def global_generators() -> Any:
    """Return the states of the global random number generators."""
    return freeze([random.getstate(), np.random.get_state(), torch.get_rng_state()])  # noqa: NPY002
