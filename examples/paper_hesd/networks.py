"""ResNet20 and ViT small at any size; the defaults are small, for 8x8 images."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from examples.digits import ResidualBlock

if TYPE_CHECKING:
    from examples.paper_hesd.settings import Network, Setup


def build(name: Network, image: Tensor, classes: int, setup: Setup) -> nn.Module:
    """Return a network for images of the shape (channels, height, width) of `image`."""
    channels, height, width = image.shape
    if name == "resnet":
        return resnet(channels, classes, setup.resnet_width, setup.resnet_blocks)
    tokens = (height // setup.vit_patch) * (width // setup.vit_patch)
    sizes = {"width": setup.vit_width, "depth": setup.vit_depth, "heads": setup.vit_heads, "patch": setup.vit_patch}
    return ViT(channels, tokens, classes, **sizes)


def resnet(channels: int, classes: int, width: int, blocks: int) -> nn.Module:
    """Return three stages of residual blocks, each of twice the channels and half the resolution of the one before."""
    widths = [width, *(stage * width for stage in (1, 2, 4) for _ in range(blocks))]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(ResidualBlock(inputs, outputs, outputs // inputs) for inputs, outputs in itertools.pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class PatchEmbedding(nn.Module):
    """The input layer, patches and their positions; the only layer that depends on the size of the images."""

    def __init__(self, channels: int, tokens: int, width: int, patch: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.project(images).flatten(2).transpose(1, 2) + self.position
        return tokens


class ViT(nn.Module):
    """A vision transformer whose classifier reads all tokens: with few images this learns faster than their mean."""

    def __init__(
        self, channels: int, tokens: int, classes: int, *, width: int, depth: int, heads: int, patch: int
    ) -> None:
        super().__init__()
        self.embed = PatchEmbedding(channels, tokens, width, patch)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(tokens * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(images)).flatten(1))
        return logits

    def adopt(self, weights: dict[str, Tensor], *, freeze: bool) -> None:
        """Load the weights of another ViT, except input layer and classifier, and freeze them or not."""
        self.blocks.load_state_dict(
            {name.removeprefix("blocks."): w for name, w in weights.items() if name.startswith("blocks.")}
        )
        self.blocks.requires_grad_(not freeze)
