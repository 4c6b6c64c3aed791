"""Warnings and information, from rank zero only, and the start and end of Lightning's Rich progress bar."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.progress import Progress


def warn(message: str) -> None:
    """Warn, on rank zero only."""
    rank_zero_warn(f"lightning_hesd: {message}", category=RuntimeWarning)


def inform(message: str) -> None:
    """Inform, on rank zero only."""
    rank_zero_info(message)


def silence_several_checkpoints() -> None:
    """Silence Lightning's warning that of several checkpoint callbacks, `ckpt_path="best"` means the first one.

    Python can silence a warning in a process, not in a Trainer.
    """
    warnings.filterwarnings("ignore", message=".*is called with Trainer configured with multiple `ModelCheckpoint`")


def start_rich_progress(bar: RichProgressBar, trainer: pl.Trainer) -> Progress:
    """Return the live display of an enabled Rich progress bar, started if it does not run yet, as before training.

    The bar's own hook finds it running later, and does nothing.
    """
    bar._init_progress(trainer)  # noqa: SLF001
    assert bar.progress is not None  # noqa: S101 - for the type checker; an enabled bar has it now
    return bar.progress


def stop_rich_progress(bar: RichProgressBar) -> None:
    """End the live display of a Rich progress bar, if it runs; its own hook does nothing then."""
    if not bar._progress_stopped:  # noqa: SLF001
        bar._stop_progress()  # noqa: SLF001
