"""How the results of a report were made: versions, times, numbers of samples and options of its runs, as HTML."""

from __future__ import annotations

import html
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from lightning_hesd.commands.reported_run import MANY, ReportedRun, date, html_row, html_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum


def facts_html(runs: Sequence[ReportedRun]) -> str:
    """Return tables of the facts: of a few runs in columns, of many what they have in common and what differs."""
    known = {name: values for name, of in FACTS.items() if any(values := [of(run) for run in runs])}
    if len(runs) <= MANY:
        rows = [(_shared if len(set(values)) == 1 else html_row)(name, values) for name, values in known.items()]
        return html_table([html.escape(run.title) for run in runs], rows)
    common = {name: values[:1] for name, values in known.items() if len(set(values)) == 1}
    other = {name: values for name, values in known.items() if name not in common}
    rows = [html_row(html.escape(run.title), values) for run, *values in zip(runs, *other.values(), strict=True)]
    shared = html_table((), map(html_row, common, common.values())) if common else ""
    details = html_table(other, rows)
    return f"{shared}\n<details>\n<summary>Facts of each run</summary>\n{details}\n</details>"


def _shared(name: str, values: Sequence[str]) -> str:
    """Return the row of a fact that is the same for all runs, in one cell."""
    return f'<tr><th scope="row">{name}</th><td colspan="{len(values)}">{values[0]}</td></tr>'


def _when(run: ReportedRun) -> str:
    started, written = (_time(run.history.about.get(key)) for key in ("started", "written"))
    if started is not None and written is not None:
        return f"{date(started)}, {started:%H:%M}, to {date(written)}, {written:%H:%M} UTC"
    return "" if run.changed is None else f"unknown; files of {date(run.changed)}, {run.changed:%H:%M} UTC"


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).astimezone(timezone.utc)
    except ValueError:
        return None


def _versions(run: ReportedRun) -> str:
    return html.escape(", ".join(f"{name} {version}" for name, version in _named(run, "versions").items())) or "unknown"


def _device(run: ReportedRun) -> str:
    return html.escape(str(run.history.about.get("device", "")))


def _options(run: ReportedRun) -> str:
    if not run.history.about:
        return "unknown"
    options = [html.escape(f"{name} = {value}") for name, value in _named(run, "options").items()]
    return "<br>".join(options) or "all at their defaults"


def _named(run: ReportedRun, key: str) -> dict[str, Any]:
    found = run.history.about.get(key)
    return found if isinstance(found, dict) else {}


def _of_spectra(of: Callable[[Spectrum], object]) -> Callable[[ReportedRun], str]:
    """Return the function that gives the values of all spectra on training data: the least and the largest."""

    def words(run: ReportedRun) -> str:
        values: list[Any] = [of(record.spectrum) for record in run.history if record.spectrum is not None]
        if not values:
            return ""
        low, high = min(values), max(values)
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    return words


def _seconds(history: Sequence[SpectrumRecord]) -> str:
    seconds = sum(spectrum.seconds for record in history for spectrum in record.spectra.values())
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


FACTS: dict[str, Callable[[ReportedRun], str]] = {
    "folder": lambda run: f"<code>{html.escape(run.folder)}</code>",
    "time": _when,
    "versions": _versions,
    "device": _device,
    "analyses": lambda run: f"{len(run.history)}, {_seconds(run.history)}",
    "samples": _of_spectra(lambda spectrum: spectrum.num_samples),
    "parameters": _of_spectra(lambda spectrum: spectrum.dimension),
    "Lanczos steps": _of_spectra(lambda spectrum: max(spectrum.steps_per_probe, default=0)),
    "start vectors": _of_spectra(lambda spectrum: len(spectrum.steps_per_probe)),
    "confidence of intervals": _of_spectra(lambda spectrum: spectrum.confidence),
    "options other than the defaults": _options,
}
"""The facts of a run, as HTML."""
