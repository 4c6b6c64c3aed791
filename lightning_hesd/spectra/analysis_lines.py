"""Text for the terminal: a line for each analysis."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lightning_hesd.spectra.assessment import SHORT_CAVEAT
from lightning_hesd.spectra.record import START_EPOCH
from lightning_hesd.spectra.validation import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.selection import Candidate
    from lightning_hesd.spectra.spectrum import Spectrum

WIDTH = 80
"""Columns of a terminal, which the lines of analyses and findings keep to."""


def analysis_lines(record: SpectrumRecord, name: str, *, by_step: bool = False) -> list[str]:
    """Return the main results of an analysis, a line for each spectrum, with its step if epochs have several."""
    start = f"{name}: {time_title(record, by_step=by_step)}, "
    lines = [
        result_line(f"{start}{suffix.removeprefix('_')} " if suffix else start, spectrum)
        for suffix, spectrum in record.spectra.items()
    ]
    if record.assessment is not None:
        lines.append(f"{start}criteria {record.assessment.words} ({SHORT_CAVEAT})")
    if record.error is not None:
        lines.append(fitted(start, f"failed: {first_line(record.error)}"))
    return lines


def result_line(start: str, spectrum: Spectrum) -> str:
    """Return a line of at most `WIDTH` columns with the main results; what does not fit is left out."""
    first, *others = _results(spectrum)
    line = fitted(start, first)
    for part in others:
        if len(line) + len(part) + 2 <= WIDTH:
            line += f", {part}"
    return line


def _results(spectrum: Spectrum) -> list[str]:
    """Return the results of a spectrum in words, the most important first."""
    if spectrum.reason is not None:
        return [f"no C_t: {spectrum.reason}"]
    low, high = spectrum.c_t_interval
    parts = [f"C_t = {spectrum.c_t:.3g} [{low:.3g}, {high:.3g}], {type_text(spectrum)}"]
    if spectrum.c_t_sampling_error is not None:
        parts.append(f"±{spectrum.c_t_sampling_error:.2g} by sampling")
    if spectrum.verified != "yes":
        parts.append("not verified")
    return [*parts, f"λ_max {spectrum.lambda_max:.3g}", f"loss {spectrum.loss:.3g}", f"{spectrum.seconds:.1f} s"]


def type_text(spectrum: Spectrum) -> str:
    """Return the type of a spectrum, with a question mark if it is not certain."""
    return f"{spectrum.hesd_type}{'' if spectrum.type_certain else '?'}"


def listed(parts: Sequence[str], word: str = "and") -> str:
    """Return one or several texts with commas, and a word before the last."""
    *others, last = parts
    return f"{', '.join(others)} {word} {last}" if others else last


def fitted(start: str, text: str) -> str:
    """Return a line of at most `WIDTH` columns; text beyond is left out at a space."""
    return start + textwrap.shorten(text, WIDTH - len(start), placeholder=" ...")


def time_title(place: SpectrumRecord | Candidate, *, by_step: bool = False) -> str:
    """Return the epoch of an analysis, with its step if epochs have several."""
    if place.epoch == START_EPOCH:
        return "start"
    return f"epoch {place.epoch}, step {place.global_step}" if by_step else f"epoch {place.epoch}"
