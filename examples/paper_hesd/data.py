"""Training, validation and generalization data (digits, or folders of PNG files), and augmentation of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import Tensor
from torch.utils.data import Dataset, Subset, random_split

from examples.digits import digits

if TYPE_CHECKING:
    from typing import Literal

    from examples.paper_hesd.settings import Setup

Images = Dataset[Any]  # of (image, label)

VALIDATION_SHARE = 0.1
"""Share of a training folder for validation. Of the 1200 training digits, the last 300 are for validation."""

ROTATION, SHEAR, SHIFT, BRIGHTNESS, CONTRAST = math.radians(15), 0.15, 0.15, 0.15, 0.3
"""Largest amounts of each operation of `rand_augment`; shifts in halves of the image, brightness in units of white."""


class Data(NamedTuple):
    """The data of one task; validation data are from the training distribution."""

    train: Images
    validation: Images
    generalization: Images
    classes: int
    distinct: int  # number of generalization images that are not variations of each other


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """PNG files in one folder per class, such as those of CIFAR-10 and CINIC-10, read on demand."""

    def __init__(self, folder: str | Path) -> None:
        self.classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted(Path(folder, name).glob("*.png"))
        ]
        if not self.files:
            msg = f"{folder} has no class folders with PNG files."
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        pixels = torch.tensor(imread(path), dtype=torch.float32)  # from 0 to 1
        if pixels.ndim == 2:
            return pixels[None], label
        return pixels[:, :, :3].permute(2, 0, 1), label  # without transparency


class Colored(Dataset[tuple[Tensor, int]]):
    """The task of pre-training: every image is rotated by 90 degrees and has one of three colors, part of its class.

    It has three times the input channels and classes, so fine-tuning needs a new input layer and classifier.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # all of ours have a length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        color = index % 3
        channels = [image if channel == color else torch.zeros_like(image) for channel in range(3)]
        return torch.cat(channels).rot90(1, (1, 2)), 3 * int(label) + color


def load(setup: Setup, task: Literal["digits", "colored"]) -> Data:
    """Return the data of a task, the same at every call."""
    data = _folders(setup) if setup.train_folder else _digits(setup)
    if task == "digits":
        return data
    train, validation, generalization = (Colored(part) for part in data[:3])
    return Data(train, validation, generalization, 3 * data.classes, data.distinct)


def _digits(setup: Setup) -> Data:
    learning, generalization = digits()
    distinct = len(generalization) // 3  # the data have each held-out digit in three variations
    size = min(setup.train_size, 900)
    return Data(Subset(learning, range(size)), Subset(learning, range(900, 1200)), generalization, 10, distinct)


def _folders(setup: Setup) -> Data:
    learning, generalization = ImageFolder(str(setup.train_folder)), ImageFolder(str(setup.gen_folder))
    if learning.classes != generalization.classes:
        msg = f"the folders have different classes: {learning.classes} and {generalization.classes}."
        raise ValueError(msg)
    held_out = max(1, round(VALIDATION_SHARE * len(learning)))
    generator = torch.Generator().manual_seed(0)
    train, validation = random_split(learning, [len(learning) - held_out, held_out], generator)
    size = min(setup.train_size, len(train))
    return Data(Subset(train, range(size)), validation, generalization, len(learning.classes), len(generalization))


def rand_augment(images: Tensor, operations: int = 2) -> Tensor:
    """Apply random operations of random amounts to every image, as in RandAugment (arXiv:1909.13719).

    The operations are those that suit small gray images: rotation, shear and shift along both axes, brightness,
    contrast.
    """
    for _ in range(operations):
        images = _augment_once(images)
    return images


def _augment_once(images: Tensor) -> Tensor:
    count = len(images)
    amount = torch.rand(count, device=images.device).mul(2).sub(1)
    chosen = F.one_hot(torch.randint(7, (count,), device=images.device), 7) * amount[:, None]
    rotation, shear_x, shear_y, shift_x, shift_y, brightness, contrast = chosen.T  # all but one are 0
    angle = ROTATION * rotation
    rows = [angle.cos(), SHEAR * shear_x - angle.sin(), SHIFT * shift_x]
    rows += [SHEAR * shear_y + angle.sin(), angle.cos(), SHIFT * shift_y]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    gain, offset = (1 + CONTRAST * contrast), BRIGHTNESS * brightness
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    augmented: Tensor = mean + (moved - mean) * gain.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)
    return augmented
