"""A progress bar for the Lanczos steps of a long analysis, in the style of the Trainer's own progress bar."""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_hesd.training.compat import messages
from lightning_hesd.training.compat.namespaces import lightning_types

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    from lightning_hesd.numerics.analysis.engine import Report

DELAY = 1.0
"""Seconds before a bar appears, so that short analyses do not flicker."""


@contextlib.contextmanager
def analysis_bar(
    trainer: pl.Trainer, name: str, *, shown: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[Report | None]:
    """Show a bar during a long analysis, if it is to be shown and the Trainer has a progress bar of TQDM or Rich.

    Yields:
        The function to call after each step; None if there is no bar on this rank.
    """
    open_bar = _bar_opener(trainer, f"{name}: Lanczos steps") if shown and trainer.is_global_zero else None
    if open_bar is None:
        yield None
        return
    bar = _LateBar(open_bar, clock)
    try:
        yield bar.show
    finally:
        bar.close()


class Bar(Protocol):
    """A bar on the screen."""

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done."""

    def close(self) -> None:
        """Remove it from the screen."""


class _LateBar:
    """A bar that appears after `DELAY`.

    If it cannot be drawn, a warning says so once, whatever `on_error` is: the analysis goes on without it.
    """

    def __init__(self, open_bar: Callable[[int, int], Bar], clock: Callable[[], float]) -> None:
        self._open = open_bar
        self._clock = clock
        self._started = clock()
        self._bar: Bar | None = None
        self._broken = False

    def show(self, done: int, total: int) -> None:
        if self._broken or self._clock() - self._started < DELAY:
            return
        with self._harmless():
            if self._bar is None:
                self._bar = self._open(done, total)
            else:
                self._bar.show(done, total)

    def close(self) -> None:
        if self._bar is not None:
            with self._harmless():
                self._bar.close()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - drawing is not the analysis
            if not self._broken:
                self._broken = True
                messages.warn(f"cannot draw the progress of the analysis, which goes on. {error!r}")


# The kinds of bars ----------------------------------------------------------------------------------------------------


def _bar_opener(trainer: pl.Trainer, description: str) -> Callable[[int, int], Bar] | None:
    """Return the function that opens a bar of the Trainer's kind; None if the Trainer has no bar of a known kind."""
    owner: Any = trainer.progress_bar_callback
    if isinstance(owner, lightning_types("callbacks.TQDMProgressBar")) and owner.is_enabled:
        return partial(_TqdmBar, owner, description)
    if isinstance(owner, lightning_types("callbacks.RichProgressBar")) and owner.is_enabled:
        return partial(_RichBar, owner, trainer, description)
    return None


class _TqdmBar:
    """A line below the training bar, in the place of the validation bar."""

    def __init__(self, owner: TQDMProgressBar, description: str, done: int, total: int) -> None:
        self._refresh_rate = owner.refresh_rate
        self._bar = Tqdm(
            desc=description,
            initial=done,
            total=total,
            position=2 * owner.process_position + 1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=owner.BAR_FORMAT,
        )

    def show(self, done: int, total: int) -> None:
        self._bar.n, self._bar.total = done, total
        if done % self._refresh_rate == 0 or done == total:
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _RichBar:
    """A task in the live display of the Trainer's progress bar."""

    def __init__(self, owner: RichProgressBar, trainer: pl.Trainer, description: str, done: int, total: int) -> None:
        from rich.markup import escape  # noqa: PLC0415 - optional: imported only for a bar of Rich

        self._owner = owner
        self._progress = messages.start_rich_progress(owner, trainer)
        self._task = self._progress.add_task(escape(description), total=total, completed=done)

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)
        self._owner.refresh()

    def close(self) -> None:
        # Hidden rather than removed: Lightning finds its own tasks by their position in the list.
        self._progress.update(self._task, visible=False)
        self._progress.refresh()
