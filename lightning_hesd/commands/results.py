"""The folder of results of many checkpoints: spectra, figures and tables, and what of these is known already."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_hesd.plotting import plot_density
from lightning_hesd.spectra.files import atomic_write
from lightning_hesd.spectra.rules import rule_title
from lightning_hesd.spectra.scalars import RECORD_SCALARS, SPECTRUM_SCALARS, shown_in
from lightning_hesd.spectra.selection import candidates_of, picks
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.validation import (
    CORRUPT_FILE_ERRORS,
    check_regular,
    each_named,
    having,
    integer,
    number,
    of,
    one_line,
    optional,
    parsed,
    text,
)
from lightning_hesd.training.history import PLAIN_FIELDS, SUFFIXES, SpectrumRecord

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

RESULTS = "results.json"
FORMAT = 1


KNOWN = {
    "file": of(dict),
    "epoch": integer,
    "global_step": integer,
    "error": optional(text),
    "stability_threshold": optional(number),
    "spectra": having(dict.fromkeys(SUFFIXES, of(bool))),
}
"""What must be known of a checkpoint that was analysed before."""


class ResultsError(Exception):
    """The folder cannot be used; the message says why."""


@dataclass(frozen=True)
class Row:
    """A checkpoint and what was found."""

    name: str
    path: Path
    record: SpectrumRecord


class Results:
    """The folder of results: what is known already, and what is added."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """Open it.

        Raises:
            ResultsError: If it holds results of another analysis, or something else.
        """
        self._folder = folder
        self._contents: dict[str, Any] = {"format": FORMAT, "options": options, "checkpoints": {}}
        path = folder / RESULTS
        if not path.exists():
            return
        try:
            check_regular(path)
            contents = parsed(path.read_text(encoding="utf-8"))
            differing = [
                key for key in {*contents["options"], *options} if contents["options"].get(key) != options.get(key)
            ]
            known = contents["format"] == FORMAT and each_named(having(KNOWN))(contents["checkpoints"])
        except CORRUPT_FILE_ERRORS as error:
            msg = f"{path} is damaged ({one_line(error)}): remove it, or choose another --out."
            raise ResultsError(msg) from error
        if not known or differing:
            what = f"`{differing[0]}` was {contents['options'].get(differing[0])!r}" if differing else "another format"
            msg = f"{path} has results of another analysis ({what}): choose another --out."
            raise ResultsError(msg)
        self._contents = contents

    def known(self, name: str, path: Path) -> SpectrumRecord | None:
        """Return the record of a checkpoint that was analysed before, and has not changed since."""
        row = self._contents["checkpoints"].get(name)
        if row is None or row["file"] != _identity(path) or row["error"] is not None:
            return None
        spectra: dict[str, Any] = {
            field: Spectrum.load(self._spectrum(name, suffix)) if row["spectra"][field] else None
            for field, suffix in SUFFIXES.items()
        }
        return SpectrumRecord(**{field: row[field] for field in PLAIN_FIELDS}, **spectra)

    def keep(self, name: str, path: Path, record: SpectrumRecord) -> None:
        """Write the spectra and figures of a record, then the record itself."""
        for suffix, spectrum in record.spectra.items():
            target = self._spectrum(name, suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            spectrum.save(target)
            figure = self._folder / "figures" / f"{name}{suffix}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            draw(spectrum, name, figure)
        self._contents["checkpoints"][name] = {
            "file": _identity(path),
            **{field: getattr(record, field) for field in PLAIN_FIELDS},
            "spectra": {field: suffix in record.spectra for field, suffix in SUFFIXES.items()},
            "assessment": None if record.assessment is None else asdict(record.assessment),
        }
        self._write()

    def finish(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add the table."""
        self._contents["table"] = list(lines)
        self._write()
        with (
            atomic_write(self._folder / "results.csv") as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)

    def _spectrum(self, name: str, suffix: str) -> Path:
        return self._folder / "spectra" / f"{name}{suffix}.npz"

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_without_nan(self._contents), indent=1)
        with atomic_write(self._folder / RESULTS) as partial:
            partial.write_text(text, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """Return the value with null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns}


def picked(rows: Sequence[Row], tolerance: float | None) -> dict[str, str]:
    """Return the names that both rules pick, among the candidates by `tolerance` of the loss."""
    records = [row.record for row in rows]
    return {rule_title(rule): rows[records.index(record)].name for rule, record in picks(records, tolerance).items()}


def candidates(rows: Sequence[Row], tolerance: float | None) -> set[str]:
    """Return the names of the checkpoints among which the rules decide; without MP spectra, of the lowest loss."""
    records = [row.record for row in rows]
    return {rows[records.index(record)].name for record in candidates_of(records, tolerance)}


def table_line(row: Row, picks: Mapping[str, str], candidates: Container[str]) -> dict[str, Any]:
    """Return a line of the table, numbers and texts."""
    record, spectrum, assessment = row.record, row.record.spectrum, row.record.assessment
    return {
        "checkpoint": row.name,
        "epoch": record.epoch,
        "step": record.global_step,
        **{s.key: spectrum and s.value(spectrum) for s in shown_in("command line", SPECTRUM_SCALARS)},
        "type": spectrum and spectrum.hesd_type,
        **{s.key: s.value(record) for s in shown_in("command line", RECORD_SCALARS)},
        "generalization": assessment and assessment.verdict,
        "candidate": "yes" if row.name in candidates else "",
        "picked_by": ", ".join(rule for rule, name in picks.items() if name == row.name),
        "error": record.error,
    }


def draw(spectrum: Spectrum, title: str, target: Path) -> None:
    """Write the density as a PNG."""
    figure = plot_density(spectrum, title=title).get_figure(root=True)
    with atomic_write(target) as partial:
        figure.savefig(partial, format="png")  # type: ignore[union-attr]
