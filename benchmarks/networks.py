"""The networks of the benchmark: a perceptron, ResNet20, a ViT and a small GPT, all from logits to loss in one call.

Every network maps its inputs to logits of shape (samples, classes), so that a plain cross-entropy fits all of them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Module:
    """Return a perceptron for 8×8 digits, 26,000 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


class _Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters, as He et al. (2016) use for small images."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.padding = outputs - inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return activations, at half the resolution if there are more channels."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(self.body(x) + shortcut)


def resnet20() -> nn.Module:
    """Return ResNet20 for 32×32 images, 270,000 parameters."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(_Residual(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class _Block(nn.Module):
    """A transformer block with layer normalization first; attention goes through PyTorch's fused kernels."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, shape (samples, tokens, width), after attention and perceptron."""
        samples, tokens, width = x.shape
        split = self.attend(self.before_attention(x)).view(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.project(attended.transpose(1, 2).reshape(samples, tokens, width))
        out: Tensor = x + self.perceptron(self.before_perceptron(x))
        return out


class ViT(nn.Module):
    """A vision transformer for 32×32 images, 2.8 million parameters.

    Its head reads all tokens; this learns faster than their mean.
    """

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        tokens = (32 // patch) ** 2
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, causal=False) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Flatten(), nn.Linear(tokens * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (images, 10)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.blocks(tokens))
        return logits


class GPT(nn.Module):
    """A character-level transformer, 0.8 million parameters; every character of a sequence is a sample."""

    def __init__(self, characters: int, context: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, causal=True) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, text: Tensor) -> Tensor:
        """Return logits of the next characters, shape (sequences · context, characters)."""
        logits: Tensor = self.head(self.blocks(self.embed(text) + self.position)).flatten(0, 1)
        return logits
