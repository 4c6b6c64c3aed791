"""What a notebook shows where a spectrum or a history is the last value of a cell."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from lightning_hesd.plotting.density import plot_density
from lightning_hesd.plotting.style import offscreen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.spectra.summary import Summary


def spectrum_html(spectrum: Spectrum) -> str:
    """Return the main findings as a line of HTML, above a small figure of the density."""
    line = f"<div>{html.escape(str(spectrum))}</div>"
    if spectrum.verified == "no":
        return line
    with offscreen():
        figure: Figure = plot_density(spectrum).get_figure(root=True)  # type: ignore[assignment]
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    data = base64.b64encode(image.getvalue()).decode()
    return f"{line}\n<img style='max-width: 24em' alt='Density of the eigenvalues' src='data:image/png;base64,{data}'>"


def summary_html(summary: Summary) -> str:
    """Return the table of a run as HTML, with its title above and its notes below."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in summary.header)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in summary.rows)
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in summary.notes)
    title = html.escape(summary.title)
    return f"<div>{title}</div><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{notes}"
