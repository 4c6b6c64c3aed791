"""Lightning's Rich progress bar, started and stopped before its own hooks do so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.progress import Progress


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
