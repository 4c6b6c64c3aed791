"""Trainer arguments and data that the modules of several libraries share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Trainer on the CPU without output."""


def noisy_sines(count: int, length: int) -> NDArray[np.float64]:
    """Return sines of different phases with noise, shape (count, length)."""
    phases = np.arange(count)[:, None]
    noise = np.random.default_rng(0).standard_normal((count, length))
    return np.asarray(np.sin(np.arange(length) / 8 + phases) + 0.1 * noise)
