"""The words of the report around its figures, as HTML: a summary, how the results were made, and a glossary."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.digits import certain, interval, number
from lightning_hesd.spectra.glossary import GLOSSARY
from lightning_hesd.training.history import START_EPOCH
from lightning_hesd.training.run_facts import version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.history import SpectrumHistory

MOST_FINDINGS = 4
"""The summary has this many findings of a run, those that matter most; the card of findings has all."""

TYPES = {"MP": "mainly positive (MP)", "MN": "mainly negative (MN)"}


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


def summary_html(runs: Sequence[ReportedRun], left_out: Sequence[str] = ()) -> str:
    """Return what the page begins with: the runs in words, and a table of how their results were made.

    Args:
        runs: The runs.
        left_out: Messages about runs that could not be read.
    """
    made = datetime.now(timezone.utc)
    titles = listed([run.title for run in runs])
    version = version_of("lightning_hesd") or "of unknown version"
    lead = f"{_plural(len(runs), 'run', 'runs')}: {titles}. Report of {date(made)} by lightning_hesd {version}."
    lead += "".join(f" Left out: {message}" for message in left_out)
    sections = "\n".join(_section(run) for run in runs)
    return (
        f'<header class="page" id="summary">\n<h1>HESD report</h1>\n{_paragraph(lead)}\n<div class="summaries">\n'
        f"{sections}\n</div>\n<h2>How the results were made</h2>\n{_facts(runs)}\n</header>"
    )


def glossary_html() -> str:
    """Return the glossary."""
    terms = "\n".join(f"<dt>{_typeset(term)}</dt><dd>{_typeset(text)}</dd>" for term, text in GLOSSARY.items())
    return f'<footer class="page" id="glossary">\n<h2>Glossary</h2>\n<dl>\n{terms}\n</dl>\n</footer>'


# The summary of a run -------------------------------------------------------------------------------------------------


def _section(run: ReportedRun) -> str:
    parts = [_paragraph(sentence) for sentence in sentences(run.history)]
    parts += [_findings(run.history), *(_pick(rule, run.history) for rule in _shown_rules(run.payload["rules"]))]
    return f'<section class="card">\n<h2>{html.escape(run.title)}</h2>\n{"".join(parts)}\n</section>'


def sentences(history: Sequence[SpectrumRecord]) -> list[str]:
    """Return what the records of a run say, in sentences: how many there are, and the first and the last C_t."""
    first, last = history[0], history[-1]
    span = f"from {place(first)} to {place(last)}" if len(history) > 1 else f"at {place(first)}"
    found = [f"{_plural(len(history), 'analysis', 'analyses')} {span}."]
    if failed := [record for record in history if record.error is not None]:
        latest = next(iter((failed[-1].error or "").splitlines()), "")
        found.append(f"{len(failed)} of them failed, the last with: {latest}")
    analyzed = [record for record in history if record.spectrum is not None]
    if not analyzed:
        return found
    found.append(f"At {place(analyzed[-1])} {_spectrum_in_words(analyzed[-1])}")
    if len(analyzed) > 1 and (before := _extremes(analyzed[0])):
        found.append(f"At {place(analyzed[0])} {before}.")
    if (assessment := analyzed[-1].assessment) is not None:
        found.append(f"Criteria for generalization: {assessment.words}.")
    return found


def _extremes(record: SpectrumRecord) -> str:
    """Return C_t and λ_max in words; empty where they are undefined."""
    spectrum = record.spectrum
    if spectrum is None or math.isnan(spectrum.c_t):
        return ""
    return f"C_t = {certain(spectrum.c_t, *spectrum.c_t_interval)} and λ_max = {_lambda_max(spectrum)}"


def _lambda_max(spectrum: Spectrum) -> str:
    value, error = spectrum.lambda_max, spectrum.lambda_max_error
    return certain(value, value - error, value + error)


def _spectrum_in_words(record: SpectrumRecord) -> str:
    spectrum = record.spectrum
    if spectrum is None or spectrum.hesd_type is None:
        return f"C_t is undefined: {(spectrum and spectrum.reason) or 'no curvature'}."
    ends = spectrum.c_t_interval
    doubt = "" if spectrum.type_certain else ", which is not certain"
    words = (
        f"C_t = {certain(spectrum.c_t, *ends)} {interval(*ends)} (confidence {spectrum.confidence:g}): the spectrum is "
        f"{TYPES[spectrum.hesd_type]}{doubt}. λ_max = {_lambda_max(spectrum)}, loss = {number(spectrum.loss, 3)}."
    )
    return words if spectrum.verified == "yes" else f"{words} Not verified: {spectrum.verification}."


def _findings(history: SpectrumHistory) -> str:
    found = history.findings
    if not found:
        return _paragraph("No findings.")
    rest = len(found) - MOST_FINDINGS
    items = [
        f"<li><strong>{_typeset(each.title)}</strong> ({each.confidence}): {_typeset(each.evidence)} "
        f"Next: {_typeset(each.action)}</li>"
        for each in found[:MOST_FINDINGS]
    ]
    more = [f"<li>{rest} more below.</li>"] if rest > 0 else []
    return f"<p>Findings, the most important first:</p><ol>{''.join([*items, *more])}</ol>"


def _shown_rules(rules: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the rules that kept checkpoints; if none did, all."""
    return [rule for rule in rules if rule["used"]] or rules


def _pick(rule: Mapping[str, Any], history: Sequence[SpectrumRecord]) -> str:
    title, pick = rule["title"], rule["pick"]
    name = f"<strong>{_typeset(title[:1].upper() + title[1:])}</strong>"
    if pick is None:
        return f"<p>{name} picks nothing: {_typeset(rule['why'])}</p>"
    record = next((record for record in history if record.global_step == pick["global_step"]), None)
    value = f", where {_typeset(_extremes(record))}" if record is not None and _extremes(record) else ""
    verb = "picks" if rule["used"] else "would pick"
    kept = "" if rule["used"] else " No checkpoint was kept by this rule."
    path = f" Checkpoint: <code>{html.escape(pick['path'])}</code>" if pick["path"] else kept
    return f"<p>{name} {verb} epoch {pick['epoch']} (step {pick['global_step']}){value}.{path}</p>"


# How it was made ------------------------------------------------------------------------------------------------------


def _facts(runs: Sequence[ReportedRun]) -> str:
    """Return a table with a row for each fact and a column for each run; equal values of all runs share a cell."""
    rows = []
    for name, of in FACTS.items():
        values = [of(run) for run in runs]
        if not any(values):
            continue
        shared = len(set(values)) == 1 and len(runs) > 1
        cells = [f'<td colspan="{len(runs)}">{values[0]}</td>'] if shared else [f"<td>{value}</td>" for value in values]
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    titles = "".join(f'<th scope="col">{html.escape(run.title)}</th>' for run in runs)
    body = "\n".join(rows)
    head = f"<thead><tr><td></td>{titles}</tr></thead>"
    return f'<div class="run-facts"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


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
        return "unknown: an earlier release wrote the files"
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
"""The rows of the table, as HTML."""


# Words ----------------------------------------------------------------------------------------------------------------


def place(record: SpectrumRecord) -> str:
    """Return the time of a record in the run."""
    return "the start" if record.epoch == START_EPOCH else f"epoch {record.epoch}"


def date(when: datetime) -> str:
    """Return a date in words."""
    return f"{when.day} {when:%B %Y}"


def listed(names: Sequence[str]) -> str:
    """Return names with commas, and "and" before the last."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _plural(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _paragraph(text: str) -> str:
    return f"<p>{_typeset(text)}</p>"


def _typeset(text: str) -> str:
    """Return a text as HTML, with the indices of its symbols as subscripts."""
    return re.sub(r"\b(C|λ|r|K|Δr|ΔK)_(\w+)", r"\1<sub>\2</sub>", html.escape(text))
