"""The digits as pixels, and as features of an extractor that was pre-trained on another task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.sample_study.settings import PIXELS
from lightning_hesd.spectra.files import read_archive, save_archive

if TYPE_CHECKING:
    from pathlib import Path

    from examples.sample_study.settings import Setup


def load(inputs: str, setup: Setup, out: Path) -> tuple[Tensor, Tensor]:
    """Return all samples, scaled into [0, 1], shape (1797, 64), and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32)
    return x if inputs == PIXELS else features(x, setup, out)[0], torch.tensor(classes)


def features(pixels: Tensor, setup: Setup, out: Path) -> tuple[Tensor, float]:
    """Return features in [0, 1], as many as pixels, and the extractor's accuracy on its task; trained once.

    The task is to predict by how many right angles an image is rotated: on the same images, but without their classes.
    """
    path = out / f"features-e{setup.extractor_epochs}.npz"
    if not path.is_file():
        extractor, accuracy = _trained_extractor(pixels.reshape(-1, 1, 8, 8), setup)
        with torch.no_grad():
            found = extractor(pixels.reshape(-1, 1, 8, 8))
        save_archive(path, {"accuracy": accuracy}, {"features": (found / found.max()).double().numpy()})
    header, arrays = read_archive(path, "an archive of features")
    return torch.tensor(arrays["features"], dtype=torch.float32), header["accuracy"]


def _trained_extractor(images: Tensor, setup: Setup) -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    extractor = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(32, 16, 3, padding=1, stride=2), nn.ReLU()),
        nn.Flatten(),
    )
    network = nn.Sequential(extractor, nn.Linear(64, 4))
    x = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    y = torch.arange(4).repeat_interleave(len(images))
    fit(network, x, y, setup.extractor_epochs, setup)
    with torch.no_grad():
        return extractor, float((network(x).argmax(1) == y).float().mean())


def fit(network: nn.Module, x: Tensor, y: Tensor, epochs: int, setup: Setup) -> None:
    """Train as in the paper: Adam, constant learning rate, cross-entropy; the global seed orders the batches."""
    optimizer = torch.optim.Adam(network.parameters(), lr=setup.learning_rate, fused=True)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x)), setup.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x[batch]), y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
