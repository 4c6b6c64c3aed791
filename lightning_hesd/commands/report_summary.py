"""The words of the report around its figures, as HTML: a summary and a glossary."""

from __future__ import annotations

import html
import math
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from lightning_hesd.commands.report_facts import facts_html
from lightning_hesd.commands.reported_run import (
    MANY,
    ReportedRun,
    date,
    html_row,
    html_table,
    paragraph,
    place,
    plural,
    typeset,
)
from lightning_hesd.spectra.analysis_lines import listed, type_text
from lightning_hesd.spectra.digits import certain, interval, number
from lightning_hesd.spectra.glossary import GLOSSARY
from lightning_hesd.spectra.validation import first_line
from lightning_hesd.training.run_facts import version_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.history import SpectrumHistory

MOST_FINDINGS = 4
"""The summary has this many findings of a run, those that matter most; the card of findings has all."""

TYPES = {"MP": "mainly positive (MP)", "MN": "mainly negative (MN)"}


def summary_html(runs: Sequence[ReportedRun], left_out: Sequence[str] = ()) -> str:
    """Return what the page begins with: the runs in words, and a table of how their results were made.

    Args:
        runs: The runs.
        left_out: Messages about runs that could not be read.
    """
    made = datetime.now(timezone.utc)
    count = plural(len(runs), "run", "runs")
    titles = f"{count}: {listed([run.title for run in runs])}" if len(runs) <= MANY else count
    version = version_of("lightning_hesd") or "of unknown version"
    lead = f"{titles}. Report of {date(made)} by lightning_hesd {version}."
    lead += "".join(f" Left out: {message}" for message in left_out)
    sections = "\n".join(_section(run) for run in runs)
    cards = f'<div class="summaries">\n{sections}\n</div>'
    if len(runs) > MANY:
        cards = f"{_overview(runs)}\n<details>\n<summary>Each run in words</summary>\n{cards}\n</details>"
    return (
        f'<header class="page" id="summary">\n<h1>HESD report</h1>\n{paragraph(lead)}\n{cards}\n'
        f"<h2>How the results were made</h2>\n{facts_html(runs)}\n</header>"
    )


def _overview(runs: Sequence[ReportedRun]) -> str:
    """Return a table with a row for each run: its last spectrum, its findings, and its picks."""
    names = ("analyses", "last spectrum", "C_t", "type", "λ_max", "loss", "findings", "picks")
    rows = []
    for run in runs:
        record = next((record for record in reversed(run.history) if record.spectrum is not None), None)
        found = "; ".join(finding.title for finding in run.history.findings) or "none"
        rules = [rule for rule in _shown_rules(run.payload["rules"]) if rule["pick"]]
        picks = "; ".join(f"{rule['title']}: epoch {rule['pick']['epoch']}" for rule in rules) or "none"
        cells = [str(len(run.history)), *_last_spectrum(record), found, picks]
        rows.append(html_row(html.escape(run.title), map(typeset, cells)))
    return html_table(map(typeset, names), rows, " overview")


def _last_spectrum(record: SpectrumRecord | None) -> list[str]:
    """Return the cells of a record: its time, C_t with its interval, type, λ_max and loss."""
    if record is None or (spectrum := record.spectrum) is None:
        return ["all analyses failed", *[""] * 4]
    c_t, kind = "undefined", ""
    if not math.isnan(spectrum.c_t):
        ends = spectrum.c_t_interval
        c_t, kind = f"{certain(spectrum.c_t, *ends)} {interval(*ends)}", type_text(spectrum)
    return [place(record), c_t, kind, _lambda_max(spectrum), number(spectrum.loss, 3)]


def glossary_html() -> str:
    """Return the glossary."""
    terms = "\n".join(f"<dt>{typeset(term)}</dt><dd>{typeset(text)}</dd>" for term, text in GLOSSARY.items())
    return f'<footer class="page" id="glossary">\n<h2>Glossary</h2>\n<dl>\n{terms}\n</dl>\n</footer>'


# The summary of a run -------------------------------------------------------------------------------------------------


def _section(run: ReportedRun) -> str:
    parts = [paragraph(sentence) for sentence in sentences(run.history)]
    parts += [_findings(run.history), *(_pick(rule, run.history) for rule in _shown_rules(run.payload["rules"]))]
    return f'<section class="card">\n<h2>{html.escape(run.title)}</h2>\n{"".join(parts)}\n</section>'


def sentences(history: Sequence[SpectrumRecord]) -> list[str]:
    """Return what the records of a run say, in sentences: how many there are, and the first and the last C_t."""
    first, last = history[0], history[-1]
    span = f"from {place(first)} to {place(last)}" if len(history) > 1 else f"at {place(first)}"
    found = [f"{plural(len(history), 'analysis', 'analyses')} {span}."]
    if failed := [record for record in history if record.error is not None]:
        found.append(f"{len(failed)} of them failed, the last with: {first_line(failed[-1].error)}")
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
        return paragraph("No findings.")
    rest = len(found) - MOST_FINDINGS
    items = [
        f"<li><strong>{typeset(each.title)}</strong> ({each.confidence}): {typeset(each.evidence)} "
        f"Next: {typeset(each.action)}</li>"
        for each in found[:MOST_FINDINGS]
    ]
    more = [f"<li>{rest} more below.</li>"] if rest > 0 else []
    return f"<p>Findings, the most important first:</p><ol>{''.join([*items, *more])}</ol>"


def _shown_rules(rules: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the rules that kept checkpoints; if none did, all."""
    return [rule for rule in rules if rule["used"]] or rules


def _pick(rule: Mapping[str, Any], history: Sequence[SpectrumRecord]) -> str:
    title, pick = rule["title"], rule["pick"]
    name = f"<strong>{typeset(title[:1].upper() + title[1:])}</strong>"
    if pick is None:
        return f"<p>{name} picks nothing: {typeset(rule['why'])}</p>"
    record = next((record for record in history if record.global_step == pick["global_step"]), None)
    value = f", where {typeset(_extremes(record))}" if record is not None and _extremes(record) else ""
    verb = "picks" if rule["used"] else "would pick"
    kept = "" if rule["used"] else " No checkpoint was kept by this rule."
    path = f" Checkpoint: <code>{html.escape(pick['path'])}</code>" if pick["path"] else kept
    return f"<p>{name} {verb} epoch {pick['epoch']} (step {pick['global_step']}){value}.{path}</p>"
