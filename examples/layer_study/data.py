"""Small data sets, five of scikit-learn and two synthetic: training and test part, standardized."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn import datasets as bundled
from sklearn.model_selection import train_test_split
from torch import Tensor

NAMES = ("digits", "wine", "breast_cancer", "iris", "moons", "diabetes", "friedman")
REGRESSION = ("diabetes", "friedman")
FLIPPED = 0.1
"""Share of wrong labels of the moons, in both parts: no network can be without errors."""

MADE = 700
"""Number of samples of synthetic data, for training and test together."""


class Data(NamedTuple):
    """Inputs of shape (samples, features); targets are classes, or numbers of shape (samples, 1)."""

    x_train: Tensor
    x_test: Tensor
    y_train: Tensor
    y_test: Tensor
    outputs: int  # of the network


def load(name: str, seed: int, train_size: int) -> Data:
    """Return a data set, split by the seed; synthetic data are also drawn with it."""
    x, y = _moons(seed) if name == "moons" else _friedman(seed) if name == "friedman" else _bundled(name)
    regression = name in REGRESSION
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, train_size=min(train_size, len(x) // 2), random_state=seed, stratify=None if regression else y
    )
    inputs = _standardized(x_train, x_test)
    if regression:
        return Data(*inputs, *_standardized(y_train[:, None], y_test[:, None]), 1)
    return Data(*inputs, torch.tensor(y_train), torch.tensor(y_test), int(y.max()) + 1)


def _bundled(name: str) -> Any:
    return getattr(bundled, f"load_{name}")(return_X_y=True)


def _moons(seed: int) -> Any:
    x, y = bundled.make_moons(MADE, noise=0.25, random_state=seed)
    flipped = np.random.default_rng(seed).random(MADE) < FLIPPED
    return x, np.where(flipped, 1 - y, y)


def _friedman(seed: int) -> Any:
    return bundled.make_friedman1(MADE, n_features=10, noise=2.0, random_state=seed)


def _standardized(train: Any, test: Any) -> tuple[Tensor, Tensor]:
    """Shift and scale both parts so that each feature of the training part has mean 0 and variance 1 (or is 0)."""
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    first, second = (torch.tensor((part - mean) / scale, dtype=torch.float32) for part in (train, test))
    return first, second
