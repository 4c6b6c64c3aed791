"""Text for the terminal: the table of all analyses at the end of a run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_hesd.spectra.analysis_lines import WIDTH, fitted, time_title, type_text
from lightning_hesd.spectra.analyzed_state import analyzed_states
from lightning_hesd.spectra.assessment import CAVEAT, TITLE
from lightning_hesd.spectra.findings import findings
from lightning_hesd.spectra.record import START_EPOCH
from lightning_hesd.spectra.rules import rule_short_title, rule_title
from lightning_hesd.spectra.run_comparison import comparison_lines
from lightning_hesd.spectra.scalars import RECORD_SCALARS, SPECTRUM_SCALARS, as_factor, shown_in
from lightning_hesd.spectra.selection import LOSS_SHARE, candidates_of, loss_tolerance, picks
from lightning_hesd.spectra.validation import first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lightning_hesd.spectra.findings import Finding
    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.selection import Candidate
    from lightning_hesd.spectra.spectrum import Spectrum

MAX_ROWS = 20
"""Longer tables show this many records: the picks, the first, the last, and others evenly spaced between these."""

MAX_FINDINGS = 4
"""The table shows this many findings, those that matter most."""

STATED = {"failed", "unverified"}
"""Findings that notes of their own state, with every reason."""

GAP = "..."
SPARED = ("candidate", "s", "loss", "λ_max")
"""Columns that a narrow terminal does without, in this order."""

TEXT_COLUMNS = ("checkpoint", "type", "criteria", "candidate", "pick")


class Kept(NamedTuple):
    """The pick of a checkpoint callback at the end of a run, and the optimizer steps of its candidates."""

    pick: Candidate
    candidates: Collection[int]


@dataclass(frozen=True)
class Summary:
    """The table of a run.

    Attributes:
        title: Number and duration of the analyses.
        header: Names of the columns.
        rows: Texts, one for each column; a row with `GAP` in the first column stands for rows left out.
        notes: Lines below the table.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def within(self, width: int) -> Summary:
        """Return the table without the columns that matter least, as many as make it fit into a terminal."""
        found = self
        for name in (name for name in SPARED if name in self.header):
            if sum(2 + max(map(len, column)) for column in zip(found.header, *found.rows, strict=True)) < width:
                break
            place = found.header.index(name)
            rows = tuple((*row[:place], *row[place + 1 :]) for row in found.rows)
            found = replace(found, header=(*found.header[:place], *found.header[place + 1 :]), rows=rows)
        return found

    def __str__(self) -> str:
        """Return title, table and notes as plain text."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = [str.ljust if name in TEXT_COLUMNS else str.rjust for name in self.header]
        table = ["  ".join(a(t, w) for a, t, w in zip(align, line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *table, *self.notes])


def summarize(
    history: Sequence[SpectrumRecord],
    name: str,
    *,
    seconds: float,
    overhead: float | None,
    kept: Mapping[str, Kept],
) -> Summary | None:
    """Return the summary of a run; None if nothing was analyzed.

    Args:
        history: The records.
        name: Name of the callback.
        seconds: Duration of all analyses.
        overhead: The same over the training time; None: unknown.
        kept: Decision of each checkpoint callback, by the name of its rule.
    """
    if not history:
        return None
    epochs = [record.epoch for record in history]
    by_step = len(set(epochs)) < len(epochs)
    others = {rule: record for rule, record in picks(history, fallback=False).items() if rule not in kept}
    equal = [record.global_step for record in candidates_of(history, fallback=False)]
    chosen = {rule: found.pick.global_step for rule, found in kept.items()}
    chosen |= {rule: record.global_step for rule, record in others.items()}
    candidates = {rule: found.candidates for rule, found in kept.items()} | dict.fromkeys(others, equal)
    columns = _columns(history, chosen, candidates, by_step=by_step)
    tolerance = loss_tolerance(analyzed_states(history))
    of_drop = f"(MP, loss within {tolerance:.3g}, {LOSS_SHARE:.0%} of its drop, of the lowest)"
    marked = [place for place, record in enumerate(history) if record.global_step in chosen.values()]
    notes = [
        *(
            f"{rule_title(rule)} would pick {time_title(record, by_step=by_step)} {of_drop}"
            for rule, record in others.items()
        ),
        *_failures(history, by_step=by_step),
        *_doubts(history, columns["type"]),
        *([f"{TITLE} ({CAVEAT})"] if "criteria" in columns else []),
        *_finding_lines(findings(history, overhead=overhead)),
        *comparison_lines(history, WIDTH),
    ]
    rows = _shortened(list(zip(*columns.values(), strict=True)), marked)
    return Summary(_title(history, name, seconds, overhead), tuple(columns), tuple(rows), tuple(notes))


def _failures(history: Sequence[SpectrumRecord], *, by_step: bool) -> list[str]:
    """Return lines about failed analyses, one for each reason."""
    failed: dict[str, list[str]] = {}
    for record in history:
        if record.error is not None:
            failed.setdefault(first_line(record.error), []).append(time_title(record, by_step=by_step))
    return [
        f"{first}{f' and {len(others)} more' if others else ''} failed: {words}"
        for words, (first, *others) in failed.items()
    ]


def _doubts(history: Sequence[SpectrumRecord], types: Sequence[str]) -> list[str]:
    """Return lines that explain question marks behind types, and why intervals are not verified."""
    unverified = [r.spectrum for r in history if r.spectrum is not None and r.spectrum.verified != "yes"]
    notes = ["?: the interval contains both types, or is not verified"] if any("?" in cell for cell in types) else []
    for words in dict.fromkeys(spectrum.verification for spectrum in unverified):
        count = sum(spectrum.verification == words for spectrum in unverified)
        notes.append(f"not verified ({count} of {len(history)} analyses): {words}")
    return notes


def _finding_lines(found: Sequence[Finding]) -> list[str]:
    """Return two lines for each finding: the evidence, and the confidence with the next step."""
    found = [finding for finding in found if finding.key not in STATED]
    lines = ["findings, the most important first:"] if found else []
    for finding in found[:MAX_FINDINGS]:
        lines += [fitted("- ", finding.evidence), fitted("  ", f"{finding.confidence}; next: {finding.action}")]
    left = len(found) - MAX_FINDINGS
    return [*lines, f"- and {left} more, in `callback.findings`"] if left > 0 else lines


def _title(history: Sequence[SpectrumRecord], name: str, seconds: float, overhead: float | None) -> str:
    parts = [f"{len(history)} analys{'is' if len(history) == 1 else 'es'}"]
    if failures := sum(record.error is not None for record in history):
        parts.append(f"{failures} failed")
    parts.append(f"{seconds:.1f} s")
    if overhead is not None:
        parts[-1] += f", {as_factor(overhead)} the training time"
    return f"{name}: {', '.join(parts)}"


def _columns(
    history: Sequence[SpectrumRecord],
    chosen: Mapping[str, int],
    candidates: Mapping[str, Collection[int]],
    *,
    by_step: bool,
) -> dict[str, list[str]]:
    columns = {"epoch": ["start" if record.epoch == START_EPOCH else str(record.epoch) for record in history]}
    if by_step:
        columns["step"] = [str(record.global_step) for record in history]
    criterion = zip(*(criterion_cells(record.spectrum) for record in history), strict=True)
    columns |= dict(zip((SPECTRUM_SCALARS["c_t"].title, "[interval]", "type"), map(list, criterion), strict=True))
    for scalar in shown_in("summary", SPECTRUM_SCALARS):
        columns[scalar.title] = [_cell(scalar.value(r.spectrum) if r.spectrum else None) for r in history]
    for scalar in shown_in("summary", RECORD_SCALARS):
        columns[scalar.title] = [_cell(scalar.value(r)) for r in history]
    columns["s"] = [_seconds(record) for record in history]
    if any(record.assessment for record in history):
        columns["criteria"] = [record.assessment.words if record.assessment else "" for record in history]
    if chosen:
        columns["candidate"] = [
            ", ".join(rule_short_title(rule) for rule, steps in candidates.items() if record.global_step in steps)
            for record in history
        ]
        columns["pick"] = [
            ", ".join(rule_short_title(rule) for rule, step in chosen.items() if step == record.global_step)
            for record in history
        ]
    return columns


def criterion_cells(spectrum: Spectrum | None) -> tuple[str, str, str]:
    """Return C_t, its interval and the type."""
    if spectrum is None:
        return "failed", "", ""
    if math.isnan(spectrum.c_t):
        return "undefined", "", ""
    low, high = spectrum.c_t_interval
    return f"{spectrum.c_t:.4g}", f"[{low:.3g}, {high:.3g}]", type_text(spectrum)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _seconds(record: SpectrumRecord) -> str:
    """Return the duration of all spectra of a record; layers are computed together, in the time of the last."""
    whole = sum(spectrum.seconds for spectrum in record.spectra.values())
    layers = max((spectrum.seconds for spectrum in (record.layers or {}).values()), default=0.0)
    return f"{whole + layers:.1f}" if record.spectra or record.layers else ""


def _shortened(rows: Sequence[tuple[str, ...]], marked: Sequence[int]) -> list[tuple[str, ...]]:
    """Return about `MAX_ROWS` rows at most, with all marked rows, and a gap for each run of rows left out."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    spaced = np.linspace(0, len(rows) - 1, max(2, MAX_ROWS - len(marked))).round().astype(int)
    shown = sorted({*spaced.tolist(), *marked})
    found = [rows[0]]
    for before, place in itertools.pairwise(shown):
        if place > before + 1:
            found.append((GAP, *[""] * (len(rows[0]) - 1)))
        found.append(rows[place])
    return found
