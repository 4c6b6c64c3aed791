"""Text and bars on the terminal: printed around the Trainer's progress bars, or drawn in their style."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_hesd.spectra.summary import GAP, TEXT_COLUMNS
from lightning_hesd.training.compat import messages
from lightning_hesd.training.compat.namespaces import lightning_types

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
    from rich.console import Console

    from lightning_hesd.numerics.analysis.engine import Report
    from lightning_hesd.spectra.summary import Summary

    BarOpener = Callable[[int, int], "_TqdmBar | _RichBar"]
    """Opens a bar, given how many steps are done, and of how many."""

DELAY = 1.0
"""Seconds before a bar appears, so that short analyses do not flicker."""


def say(trainer: pl.Trainer, *lines: str) -> None:
    """Print lines above the progress bar, on rank zero only."""
    if trainer.is_global_zero:
        with _clear_of_bars(trainer):
            for line in lines:
                _print(line)


def show(trainer: pl.Trainer, make_summary: Callable[[], Summary | None]) -> None:
    """Print a summary, if there is one, below the progress bar, on rank zero only; a failure becomes a warning."""
    if not trainer.is_global_zero:
        return
    try:
        summary = make_summary()
        if summary is None:
            return
        with _below_bars(trainer):
            console = _rich_terminal()
            if console is None:
                _print(f"\n{summary.within(shutil.get_terminal_size().columns)}")
            else:
                _print_rich(console, summary.within(console.width))
    except Exception as error:  # noqa: BLE001 - no failure to print ends the run
        messages.warn(f"cannot print the summary. {error!r}")


def conclude(trainer: pl.Trainer, *lines: str, printed: bool) -> None:
    """Say lines below the progress bars at the end of a run, on rank zero only: printed, or as information."""
    if not trainer.is_global_zero:
        return
    with _below_bars(trainer):
        for line in lines:
            (_print if printed else messages.inform)(line)


def _below_bars(trainer: pl.Trainer) -> AbstractContextManager[object]:
    """Return a context in which no bar is on the screen; the live display of Rich ends before it."""
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, lightning_types("callbacks.RichProgressBar")):
        messages.stop_rich_progress(bar)
    return _clear_of_bars(trainer)


def _clear_of_bars(trainer: pl.Trainer) -> AbstractContextManager[object]:
    """Return a context without bars of TQDM on the screen; the live display of Rich needs none.

    The bar's own `print` would lose text before its first bar and after its last one.
    """
    if isinstance(trainer.progress_bar_callback, lightning_types("callbacks.TQDMProgressBar")):
        shielded: AbstractContextManager[object] = Tqdm.external_write_mode(file=sys.stdout)
        return shielded
    return contextlib.nullcontext()


def _print(text: str) -> None:
    """Print text, with question marks for letters that the terminal's encoding lacks, such as Greek ones."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()


def _rich_terminal() -> Console | None:
    """Return Rich's console if Rich is installed and writes UTF-8 to a terminal; else None."""
    try:
        from rich import get_console  # noqa: PLC0415 - optional
    except ImportError:
        return None
    console = get_console()
    return console if console.is_terminal and console.encoding.startswith("utf") else None


def _print_rich(console: Console, summary: Summary) -> None:
    """Print the summary with a table of Rich, without markup."""
    from rich import box  # noqa: PLC0415 - optional
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    styles = {"MP": "blue", "MN": "red", "failed": "red"}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in summary.header:
        table.add_column(Text(name), justify="left" if name in TEXT_COLUMNS else "right", no_wrap=name != "pick")
    for row in summary.rows:
        style = "dim" if row[0] == GAP else "bold" if "pick" in summary.header and row[-1] else None
        table.add_row(*(Text(cell, style=styles.get(cell.rstrip("?"), "")) for cell in row), style=style)
    console.print()
    console.print(Text(summary.title, style="bold"))
    console.print(table)
    for note in summary.notes:
        console.print(Text(note), soft_wrap=True)  # so that paths can be copied


# The bar of a long analysis -------------------------------------------------------------------------------------------


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
    with contextlib.closing(_LateBar(open_bar, clock)) as bar:
        yield bar.show


class _LateBar:
    """A bar that appears after `DELAY`.

    If it cannot be drawn, a warning says so once, whatever `on_error` is: the analysis goes on without it.
    """

    def __init__(self, open_bar: BarOpener, clock: Callable[[], float]) -> None:
        self._open = open_bar
        self._clock = clock
        self._started = clock()
        self._bar: _TqdmBar | _RichBar | None = None
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


def _bar_opener(trainer: pl.Trainer, description: str) -> BarOpener | None:
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
