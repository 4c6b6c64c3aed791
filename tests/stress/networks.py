"""Modules and data out of the ordinary, around the classifier of `tests.training.modules`."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.modules import Classifier, Digits, loader, plain_loss


class Silent(Classifier):
    """Logs nothing, as a compiled or a barebones run demands."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return plain_loss(self, batch)


class Validated(Classifier):
    """Validates on the digits."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", plain_loss(self, batch))

    def val_dataloader(self) -> Any:
        return loader(Digits(16))


class Around(Silent):
    """A classifier around any network, made reproducibly."""

    def __init__(self, make_net: Callable[[], nn.Module]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.net = make_net()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class MadeLate(Silent):
    """Makes its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Classifier().net


class SteppingInBackward(Silent):
    """Takes a step for each parameter as soon as its gradient is there."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self.step)

    @staticmethod
    def step(p: Tensor) -> None:
        with torch.no_grad():
            p -= 0.1 * p.grad
        p.grad = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(plain_loss(self, batch))

    def configure_optimizers(self) -> None:
        return None


class Graph(Silent):
    """Averages over neighbors by a sparse matrix, which it keeps as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neighbors", (torch.eye(10) + torch.eye(10).roll(1, 0)).to_sparse())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy((self.neighbors @ self.net(batch[0]).T).T, batch[1])


class LowPrecision(Silent):
    """Switches autocast on by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain_loss(self, batch)


class TwoOptimizers(Silent):
    """Optimizes its two layers in turn, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(plain_loss(self, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rows = kind(8, 6, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x.reshape(len(x), 8, 8))[0][:, -1])


class Bag(nn.Module):
    """Embeds the gray levels of the pixels."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.levels = nn.Embedding(17, 4, sparse=sparse)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.levels((x * 16).long()).mean(1)))


def partly_quantized() -> nn.Module:
    """Return a network whose frozen first layer has been quantized."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move
        first = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 6)), {nn.Linear}, torch.qint8)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 10))


class BrokenNow(Digits):
    """Has an item that cannot be read; training, which has two batches, does not come across it."""

    def __getitem__(self, position: int) -> Any:
        if position >= 16:
            msg = f"sample {position} cannot be read"
            raise OSError(msg)
        return super().__getitem__(position)
