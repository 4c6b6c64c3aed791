"""What a check finds, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Status = Literal["passed", "failed", "needs CUDA", "for information"]


@dataclass(frozen=True)
class Setting:
    """Where checks run, and how large they are.

    Attributes:
        device: The device.
        is_small: Whether the problems are tiny, to test the program on a CPU.
    """

    device: torch.device
    is_small: bool

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU of NVIDIA's, or of AMD's, which PyTorch calls "cuda", too."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        title: What is claimed.
        status: Whether it holds; "needs CUDA" where this device cannot tell.
        figures: The measurements behind it.
    """

    title: str
    status: Status
    figures: str


Check = Callable[[Setting], Iterator[Finding]]
"""A check yields its findings one by one, so that those before a failure are kept."""


def judged(title: str, holds: bool, figures: str) -> Finding:  # noqa: FBT001 - the verdict itself
    """Return the finding of a claim that holds or does not."""
    return Finding(title, "passed" if holds else "failed", figures)


def on_cuda_only(setting: Setting, title: str, holds: bool, figures: str) -> Finding:  # noqa: FBT001
    """Return the finding of a claim that other devices cannot judge: there the figures are for information."""
    return judged(title, holds, figures) if setting.is_cuda else Finding(title, "needs CUDA", figures)
