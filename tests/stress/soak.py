"""A long run with an analysis in every epoch: what grows, and how much."""

import ctypes
import gc
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hesd import HessianCheckpoint
from tests.stress.harness import Case, Program, quiet
from tests.training.modules import Digits, callback, fit, loader

LONG = 100
"""Epochs from which on memory and time are judged: the first fifty figures fill the arenas of the allocator."""

MOST_KIB = 48.0
"""Of memory per epoch: the history keeps about 30 KiB of two spectra and what was computed of them, by tracemalloc."""

MOST_SLOWER = 1.5
"""Last quarter over the one before it, in seconds of computing: checkpoints hold the history, which grows."""


class Gauge(pl.Callback):
    """Measures the process and its files at the start of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readings: dict[str, list[float]] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()  # figures are cycles: else it is chance when they go, and what the allocator keeps of them
        ctypes.CDLL(None).malloc_trim(0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        for name, value in {
            # Its own, wherever it is: pages of libraries come and go as the system likes.
            "memory": sum(float(status[name].split()[0]) for name in ("RssAnon", "VmSwap")),
            "open files": float(len(os.listdir("/proc/self/fd"))),  # noqa: PTH208 - no path in there outlives the look
            "threads": float(status["Threads"]),
            "seconds": time.process_time(),
            "spectra": _kib(path for path in files if path.parent.name == "hesd"),
            "events": _kib(path for path in files if "tfevents" in path.name),
            "checkpoint": _kib(path for path in files if path.name == "last.ckpt"),
            "checkpoints": float(sum(path.suffix == ".ckpt" for path in files)),
        }.items():
            self.readings.setdefault(name, []).append(value)

    def slope(self, name: str) -> float:
        """Return the growth per epoch in the second half of the run, from medians, which no single jump moves."""
        values = np.array(self.readings[name])
        quarter = len(values) // 4
        return float(np.median(values[-quarter:]) - np.median(values[-2 * quarter : -quarter])) / quarter


def _kib(paths: Any) -> float:
    return sum(path.stat().st_size for path in paths) / 1024


def soak(folder: Path, *, epochs: int) -> str:
    """Train for that many epochs, and measure."""
    gauge = Gauge(folder)
    observer = callback(
        steps=20,
        on_error="warn",
        generalization_dataloader=loader(Digits(24)),
        checkpoint=HessianCheckpoint(save_last=True, dirpath=folder / "checkpoints"),
    )
    with quiet():
        fit(folder, observer, gauge, logger=TensorBoardLogger(folder), enable_checkpointing=True, max_epochs=epochs)
    assert len(observer.history) == epochs
    assert not [record.error for record in observer.history if record.error]
    seconds = np.diff(gauge.readings["seconds"])
    quarter = len(seconds) // 4
    slower = float(np.median(seconds[-quarter:]) / np.median(seconds[-2 * quarter : -quarter]))
    slope = gauge.slope
    got = (
        f"memory {slope('memory'):+.1f} KiB, open files {slope('open files'):+.2g}, threads {slope('threads'):+.2g} "
        f"per epoch; the last quarter took {slower:.2f} × as long as the one before; an analysis adds "
        f"{slope('spectra'):.1f} KiB of spectra, {slope('events'):.1f} KiB of TensorBoard events and "
        f"{slope('checkpoint'):.1f} KiB to each checkpoint ({gauge.readings['checkpoint'][1]:.0f} KiB with the first)"
    )
    assert slope("open files") <= 0, got
    assert slope("threads") <= 0, got
    if epochs >= LONG:
        assert slope("memory") <= MOST_KIB, got
        assert slower <= MOST_SLOWER, got
    return got


def cases(epochs: int) -> list[Case]:
    expected = "no more files open, no more threads"
    if epochs >= LONG:
        expected += f", memory at most {MOST_KIB:+g} KiB per epoch, the last quarter at most {MOST_SLOWER:g} × as long"
        expected += " as the one before"
    work = partial(soak, epochs=epochs)
    return [Program(f"soak of {epochs} epochs", expected, work, seconds=120 + 10.0 * epochs, measures=True)]
