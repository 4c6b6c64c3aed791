"""`LoggerOutput`, the base class of outputs to loggers, and the figures, tables and texts that they share."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra.analysis_lines import time_title
from lightning_hesd.spectra.assessment import CAVEAT, TITLE
from lightning_hesd.spectra.indicators import LayerIndicators
from lightning_hesd.training.history import SpectrumHistory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.spectra.assessment import Assessment
    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.history import SpectrumRecord

LAYER_COLUMNS = ("layer", *(field.name for field in fields(LayerIndicators)))
"""Columns of `layer_rows`."""


class LoggerOutput:
    """Writes records to a logger, beyond scalars; a subclass writes what its logger can show."""

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        raise NotImplementedError

    def write_failure(self, history: SpectrumHistory, step: int) -> None:
        """Write that the last analysis failed: the last record has no spectrum."""

    def rewrite(self, history: SpectrumHistory, step: int) -> None:
        """Write again what shows the metrics of the last record, which has a spectrum."""

    def write_selection(self, event: SelectionEvent, step: int) -> None:
        """Write a checkpoint rule's decision after the latest record at `step` of the logger's axis."""

    def finish(self, history: SpectrumHistory) -> None:
        """Write the whole history, which has a spectrum, once: at the end of training, or when it has failed."""


def figures(history: SpectrumHistory) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Draw the figures of the last record, one after the other.

    Yields:
        Suffix of the callback's name for the tag, and the figure as an image, shape (height, width, 4).
    """
    from lightning_hesd import plotting  # noqa: PLC0415 - Matplotlib is slow to import

    record = history[-1]
    when = time_title(record)
    for suffix, spectrum in record.spectra.items():
        yield f"{suffix}/density_figure", _pixels(plotting.plot_density, spectrum, _framed_axes(), title=when)
        if spectrum.losses_along.size:
            yield f"{suffix}/losses_along_figure", _pixels(plotting.plot_losses_along, spectrum, title=when)
    if record.spectrum and record.ggn and record.residual:
        parts = record.spectrum, record.ggn, record.residual
        yield "/decomposition_figure", _pixels(plotting.plot_decomposition, *parts)
    if record.layers:
        yield "/layers_figure", _pixels(plotting.plot_layers, history)


def _framed_axes() -> Axes:
    """Return the axes of a new figure for a density, with room for its labels.

    Matplotlib's search for a layout would take a third of the time of a figure.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - Matplotlib is slow to import

    return Figure((4.6, 3.5), dpi=160).add_axes((0.15, 0.135, 0.81, 0.725))


def _pixels(draw: Callable[..., Axes], *arguments: object, **options: object) -> NDArray[np.uint8]:
    """Draw a figure, return it as an image, and free it."""
    from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415 - Matplotlib is slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    from lightning_hesd.plotting import offscreen_figure  # noqa: PLC0415

    figure = offscreen_figure(draw, *arguments, **options)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    image = np.array(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    # Figures and their artists refer to each other: a megabyte each, until the garbage collector runs.
    figure.clear()
    FigureCanvasBase(figure)
    return image


def layer_rows(record: SpectrumRecord) -> list[tuple[str | float, ...]]:
    """Return the indicators of the layers of a record, one row per layer."""
    return [(name, *astuple(found)) for name, found in record.layer_indicators.items()]


def layer_table(record: SpectrumRecord) -> str:
    """Return the indicators of the layers of a record as a table in Markdown."""
    rows = [[str(name), *(f"{value:.3g}" for value in values)] for name, *values in layer_rows(record)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (LAYER_COLUMNS, ["---"] * len(LAYER_COLUMNS), *rows))


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def verdict_text(assessment: Assessment, when: str) -> str:
    """Return what the criteria for generalization do, and the reasons, in Markdown."""
    reasons = "\n".join(f"- {reason}" for reason in assessment.reasons)
    return f"**{TITLE}: {assessment.words}** ({when})\n\n{reasons}\n\n{CAVEAT}"


@contextlib.contextmanager
def saved(history: SpectrumHistory) -> Iterator[Path]:
    """Write a history to a temporary folder for upload.

    The folder of the run may have files of other runs in it, or lack files that could not be written.

    Yields:
        The folder, which `SpectrumHistory.load` reads.
    """
    copy = SpectrumHistory()  # the history itself would remember the folder
    copy.extend(history)
    copy.about = history.about
    with tempfile.TemporaryDirectory() as folder:
        copy.save(folder)
        yield Path(folder)
