"""The problems of the benchmark: a network, briefly trained weights, and samples, each made by code and cached.

Weights are trained, because spectra at random initialization, and the Lanczos steps they need, differ from those of
trained networks.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import networks

if TYPE_CHECKING:
    from collections.abc import Callable

Batch = tuple[Tensor, Tensor]
Size = Literal["full", "quick"]

CACHE = Path(__file__).parent / ".cache"
CONTEXT = 64
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"


@dataclass(frozen=True)
class Problem:
    """One loss to analyze.

    Attributes:
        name: Key of the problem.
        module: The network with its trained weights, in evaluation mode.
        batches: Inputs and labels; all batches have the same number of samples.
    """

    name: str
    module: nn.Module
    batches: list[Batch]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the module."""
        return list(self.module.parameters())

    @property
    def dimension(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.parameters[0].device

    @property
    def samples(self) -> int:
        """The number of samples in all batches: images, or sequences."""
        return sum(len(inputs) for inputs, _ in self.batches)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all labels; a sequence has one for each position.

    Args:
        outputs: Logits, shape (labels, classes).
        labels: Labels, shape (samples,) or (samples, positions).
    """
    return F.cross_entropy(outputs, labels.flatten())


def loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return cross_entropy(module(batch[0]), batch[1])


def small_digits(generator: torch.Generator) -> Batch:
    """Return 1024 of scikit-learn's 8×8 digits."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - the GPT's text needs no scikit-learn

    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    chosen = torch.randperm(len(images), generator=generator)[:1024]
    return images[chosen].float() / 16, labels[chosen]


def large_digits(generator: torch.Generator) -> Batch:
    """Return the same digits as 32×32 images: enlarged, shifted, tinted and noisy."""
    images, labels = small_digits(generator)
    large = F.interpolate(images.view(-1, 1, 8, 8), size=32, mode="bilinear")
    shifts = torch.randint(-1, 2, (len(large), 2), generator=generator).tolist()
    moved = torch.stack([image.roll((down, right), (1, 2)) for image, (down, right) in zip(large, shifts, strict=True)])
    tint = 0.5 + 0.5 * torch.rand(len(large), 3, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(len(large), 3, 32, 32, generator=generator)
    return moved * tint + noise, labels


def text(generator: torch.Generator) -> Batch:
    """Return 512 sequences of characters from random sentences; the labels are the characters that follow."""
    draw = random.Random(int(torch.randint(2**31, (), generator=generator)))
    people = ["the teacher", "an old sailor", "my sister", "nobody", "the quiet neighbour", "a tired clerk"]
    acts = ["reads", "forgets", "paints", "carries", "looks for", "talks about", "sells"]
    things = ["the letter", "a red boat", "seven apples", "the long road", "her garden", "a broken clock"]
    ends = [".\n", " every day.\n", " in the rain.\n", ", as before.\n", ", and {} {} {}.\n"]

    def sentence() -> str:
        parts = [draw.choice(options) for options in (people, acts, things, ends, people, acts, things)]
        return "{} {} {}".format(*parts[:3]) + parts[3].format(*parts[4:])

    written = ""
    while len(written) <= 512 * CONTEXT:
        written += sentence()
    codes = torch.tensor([CHARACTERS.index(character) for character in written[: 512 * CONTEXT + 1]])
    return codes[:-1].view(512, CONTEXT), codes[1:].view(512, CONTEXT)


@dataclass(frozen=True)
class _Recipe:
    title: str
    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Batch]
    samples: int
    training_batch: int
    learning_rate: float = 2e-3


RECIPES = {
    "mlp": _Recipe("MLP", networks.mlp, small_digits, samples=512, training_batch=128),
    "resnet20": _Recipe("ResNet20", networks.resnet20, large_digits, samples=48, training_batch=64),
    "vit": _Recipe("ViT", networks.ViT, large_digits, samples=24, training_batch=32, learning_rate=5e-4),
    "gpt": _Recipe("GPT", lambda: networks.GPT(len(CHARACTERS), CONTEXT), text, samples=16, training_batch=32),
}


def load(name: str, *, pieces: int = 1, size: Size = "full", device: torch.device | None = None) -> Problem:
    """Return a problem with its samples in `pieces` batches, and weights from the cache or trained now.

    Weights are trained on the CPU, so that they are those of the benchmark; `device` is where the problem goes.
    """
    recipe = RECIPES[name]
    samples = recipe.samples if size == "full" else max(8, recipe.samples // 8)
    torch.manual_seed(0)
    module = recipe.build()
    inputs, labels = recipe.data(torch.Generator().manual_seed(0))
    path = cached(name, size, "weights.pt")
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
    else:
        _train(module, inputs, labels, recipe, steps=80 if size == "full" else 5)
        torch.save(module.state_dict(), path)
    chunks = zip(inputs[:samples].chunk(pieces), labels[:samples].chunk(pieces), strict=True)
    batches = [(x.to(device), y.to(device)) for x, y in chunks]
    return Problem(name, module.eval().to(device), batches)


def cached(name: str, size: Size, suffix: str) -> Path:
    """Return the path of a cached value of a problem; it depends on the code that makes the problem."""
    CACHE.mkdir(exist_ok=True)
    code = b"".join(Path(str(file)).read_bytes() for file in (__file__, networks.__file__))
    return CACHE / f"{name}-{size}-{hashlib.sha256(code).hexdigest()[:8]}-{suffix}"


def _train(module: nn.Module, inputs: Tensor, labels: Tensor, recipe: _Recipe, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (recipe.training_batch,), generator=generator)
        optimizer.zero_grad()
        loss(module.train(), (inputs[chosen], labels[chosen])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
