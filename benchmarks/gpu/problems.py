"""Small networks whose Hessian can be written down, and the Hessian itself, in float64."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Batch = tuple[Tensor, Tensor]

CLASSES = 5


@dataclass(frozen=True)
class Problem:
    """A network in evaluation mode, and two batches of different sizes.

    Attributes:
        name: Its name in the table.
        module: The network.
        batches: Inputs and labels.
    """

    name: str
    module: nn.Module
    batches: list[Batch]

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Problem:
        """Return a copy on a device, with floating-point values of a type."""
        batches = [(x.to(device, dtype if x.is_floating_point() else None), y.to(device)) for x, y in self.batches]
        return Problem(self.name, copy.deepcopy(self.module).to(device, dtype), batches)

    @property
    def dimension(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.module.parameters())


def loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


class Attention(nn.Module):
    """Embedded tokens, causal attention by PyTorch's fused function, a perceptron, and a head on the mean."""

    def __init__(self, width: int, heads: int, tokens: int = 7) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(tokens, width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (samples, classes), of tokens, shape (samples, tokens)."""
        x = self.embed(x)
        query, key, value = self.attend(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = self.norm(x + F.gelu(self.project(attended.transpose(1, 2).flatten(2))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM, whose cuDNN kernel has no second derivative, and a head on its last output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (samples, classes), of series, shape (samples, times, 4)."""
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * width, CLASSES),
    )


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))


def _images(samples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=generator)


MAKERS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int, torch.Generator], Tensor], int, int]] = {
    "MLP": (_perceptron, lambda samples, g: torch.randn(samples, 16, generator=g), 24, 6),
    "convolutions and batch norm": (_convolutions, _images, 8, 2),
    "attention": (
        lambda width: Attention(width, heads=2),
        lambda samples, g: torch.randint(7, (samples, 12), generator=g),
        16,
        4,
    ),
    "LSTM": (Recurrent, lambda samples, g: torch.randn(samples, 6, 4, generator=g), 10, 3),
}
"""Network as a function of its width, inputs as a function of the number of samples, width, and width if small."""


def make(name: str, *, is_small: bool) -> Problem:
    """Return a problem on the CPU, in float32, the same every time."""
    network, inputs, *widths = MAKERS[name]
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = network(widths[is_small])
        for p in module.parameters():  # far from zero, so that the spectrum has both ends
            nn.init.normal_(p, std=0.6 if p.ndim > 1 else 0.3)
    samples = (24, 40)
    batches = [(inputs(n, generator), torch.randint(CLASSES, (n,), generator=generator)) for n in samples]
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None  # noqa: S101 - for the type checker
            m.running_mean.normal_(generator=generator)
    return Problem(name, module.eval(), batches)


@contextlib.contextmanager
def cudnn_setting(name: str, *, value: bool) -> Iterator[None]:
    """Give a setting of cuDNN a value in this context; `torch.backends.cudnn.flags` would set all of them."""
    before = getattr(torch.backends.cudnn, name)
    setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, name, before)


def dense_hessian(problem: Problem) -> Tensor:
    """Return the Hessian of the mean loss over all samples, shape (n, n), row by row; in the dtype of the module."""
    parameters = list(problem.module.parameters())
    total = sum(len(x) for x, _ in problem.batches)
    with sdpa_kernel(SDPBackend.MATH), cudnn_setting("enabled", value=False):
        mean: Any = sum(loss(problem.module, batch) * len(batch[0]) / total for batch in problem.batches)
        gradients = torch.autograd.grad(mean, parameters, create_graph=True)
        rows = []
        for element in torch.cat([g.flatten() for g in gradients]):
            row = torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in row]))
    hessian = torch.stack(rows)
    return (hessian + hessian.T) / 2
