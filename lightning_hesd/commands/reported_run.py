"""A run of a report, and the words that its parts share."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.training.history import SpectrumHistory

MANY = 6
"""Up to this many runs stand side by side; more have a row each."""


@dataclass(frozen=True)
class ReportedRun:
    """A run of the report.

    Attributes:
        title: Its name in the report.
        folder: Its log directory.
        history: Its records.
        payload: Its data for the figures, as `run_payload` returns them.
        changed: When its files changed last; None: unknown.
    """

    title: str
    folder: str
    history: SpectrumHistory
    payload: Mapping[str, Any]
    changed: datetime | None = None


def place(record: SpectrumRecord) -> str:
    """Return the time of a record in the run."""
    return "the start" if record.epoch == START_EPOCH else f"epoch {record.epoch}"


def date(when: datetime) -> str:
    """Return a date in words."""
    return f"{when.day} {when:%B %Y}"


def plural(count: int, one: str, several: str) -> str:
    """Return a number with its noun."""
    return f"{count} {one if count == 1 else several}"


def paragraph(text: str) -> str:
    """Return a text as a paragraph of HTML."""
    return f"<p>{typeset(text)}</p>"


def html_table(columns: Iterable[str], rows: Iterable[str], more: str = "") -> str:
    """Return a table of HTML, given as HTML: with the titles of its columns, if any, beside the first, and rows.

    `more` are further classes for its style.
    """
    titles = "".join(f'<th scope="col">{column}</th>' for column in columns)
    head = f"<thead><tr><td></td>{titles}</tr></thead>" if titles else ""
    lines = "\n".join(rows)
    return f'<div class="run-facts{more}"><table>\n{head}\n<tbody>\n{lines}\n</tbody></table></div>'


def html_row(title: str, cells: Iterable[str]) -> str:
    """Return a row of `html_table`."""
    return f'<tr><th scope="row">{title}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def typeset(text: str) -> str:
    """Return a text as HTML, with the indices of its symbols as subscripts."""
    return re.sub(r"\b(C|λ|r|K|Δr|ΔK)_(\w+)", r"\1<sub>\2</sub>", html.escape(text))
