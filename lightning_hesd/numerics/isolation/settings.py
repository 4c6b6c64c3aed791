"""Settings of the process that the user's functions may change, and that may influence the numbers of training."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CUDNN: Any = torch.backends.cudnn


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


SETTINGS: list[tuple[str, Callable[[], Any], Callable[[Any], object]]] = [
    ("torch.get_num_threads()", torch.get_num_threads, torch.set_num_threads),
    ("torch.is_anomaly_enabled()", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    ("torch.are_deterministic_algorithms_enabled()", _determinism, _set_determinism),
    ("torch.backends.cudnn.benchmark", lambda: _CUDNN.benchmark, partial(setattr, _CUDNN, "benchmark")),
    ("torch.backends.cudnn.deterministic", lambda: _CUDNN.deterministic, partial(setattr, _CUDNN, "deterministic")),
    ("numpy.geterr()", np.geterr, lambda before: np.seterr(**before)),
    ("os.getcwd()", os.getcwd, os.chdir),
]
"""Each with its name, and functions that read and write it."""


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Restore the settings that have changed, on leaving."""
    before = [read() for _, read, _ in SETTINGS]
    try:
        yield
    finally:
        for (_, read, write), value in zip(SETTINGS, before, strict=True):
            if read() != value:
                write(value)
