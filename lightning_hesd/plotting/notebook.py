"""What a notebook shows where spectra, a record or a history are the last value of a cell."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from lightning_hesd.plotting.density import plot_density
from lightning_hesd.plotting.style import offscreen_figure
from lightning_hesd.spectra.analysis_lines import type_text
from lightning_hesd.spectra.record import when

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.spectra.summary import Summary


def spectrum_html(spectrum: Spectrum) -> str:
    """Return the main results as a line of HTML, above a small figure of the density."""
    line = _line(str(spectrum))
    if spectrum.verified == "no":
        return line
    image = io.BytesIO()
    offscreen_figure(plot_density, spectrum).savefig(image, format="png", dpi=100)
    data = base64.b64encode(image.getvalue()).decode()
    return f"{line}\n<img style='max-width: 24em' alt='Density of the eigenvalues' src='data:image/png;base64,{data}'>"


def summary_html(summary: Summary) -> str:
    """Return the table of a run as HTML, with its title above and its notes below."""
    notes = "".join(map(_line, summary.notes))
    return f"{_line(summary.title)}{table_html(summary.header, summary.rows)}{notes}"


def table_html(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts as HTML; empty rows are left out."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    cells = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows if row)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def layers_html(layers: Mapping[str, Spectrum]) -> str:
    """Return a table with the main results of each layer as HTML."""
    header = ("layer", "parameters", "C_t", "[interval]", "type", "λ_min", "λ_max", "trace")
    return table_html(header, (_layer_row(name, spectrum) for name, spectrum in layers.items()))


def _layer_row(name: str, spectrum: Spectrum) -> tuple[str, ...]:
    start = name, f"{spectrum.dimension:,}"
    if spectrum.reason is not None:
        return (*start, "undefined", spectrum.reason, "", "", "", "")
    low, high = spectrum.c_t_interval
    values = (spectrum.lambda_min, spectrum.lambda_max, spectrum.trace)
    return (
        *start,
        f"{spectrum.c_t:.3g}",
        f"[{low:.3g}, {high:.3g}]",
        type_text(spectrum),
        *(f"{value:.3g}" for value in values),
    )


def record_html(record: SpectrumRecord) -> str:
    """Return the results of an analysis as HTML: its spectra, the criteria, and the metrics of the network."""
    parts = [_line(f"analysis {when(record.epoch)}, step {record.global_step}")]
    if record.error is not None:
        parts.append(_line(f"failed: {record.error}"))
    if record.spectrum is not None:
        parts.append(spectrum_html(record.spectrum))
    parts += [_line(f"{suffix[1:]}: {spectrum}") for suffix, spectrum in record.spectra.items() if suffix]
    if record.assessment is not None:
        parts.append(record.assessment._repr_html_())
    if record.metrics:
        parts.append(table_html(list(record.metrics), [[f"{value:.4g}" for value in record.metrics.values()]]))
    return "".join(parts)


def _line(text: str) -> str:
    return f"<div>{html.escape(text)}</div>"
