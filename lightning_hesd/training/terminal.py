"""Text on the terminal, printed so that the Trainer's progress bars stay intact."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_hesd.spectra.summary import GAP, TEXT_COLUMNS
from lightning_hesd.training.compat import messages
from lightning_hesd.training.compat.namespaces import lightning_types

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl
    from rich.console import Console
    from rich.table import Table

    from lightning_hesd.spectra.summary import Summary


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
        bar: Any = trainer.progress_bar_callback
        if isinstance(bar, lightning_types("callbacks.RichProgressBar")):
            messages.stop_rich_progress(bar)
        with _clear_of_bars(trainer):
            console = _rich_terminal()
            if console is None:
                _print(f"\n{summary}")
            else:
                _print_rich(console, summary)
    except Exception as error:  # noqa: BLE001 - no failure to print ends the run
        messages.warn(f"cannot print the summary. {error!r}")


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
    from rich.text import Text  # noqa: PLC0415 - optional

    console.print()
    console.print(Text(summary.title, style="bold"))
    console.print(_rich_table(summary))
    for note in summary.notes:
        console.print(Text(note), soft_wrap=True)  # so that paths can be copied


def _rich_table(summary: Summary) -> Table:
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
    return table
