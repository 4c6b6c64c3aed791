"""The folder of results of many checkpoints: spectra, figures, tables, and an index for a later continuation."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_hesd.commands.errors import CommandError
from lightning_hesd.commands.plot import save_figure
from lightning_hesd.plotting import plot_density
from lightning_hesd.spectra.analysis_lines import WIDTH
from lightning_hesd.spectra.assessment import CAVEAT, TITLE
from lightning_hesd.spectra.codec import FIELDS, decode_record, encode_record, load, record_fields, save
from lightning_hesd.spectra.files import atomic_write, damage_named, save_text
from lightning_hesd.spectra.rules import rule_short_title, rule_title
from lightning_hesd.spectra.scalars import RECORD_SCALARS, SPECTRUM_SCALARS, shown_in
from lightning_hesd.spectra.selection import candidates_of, picks, with_first_loss
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.summary import Summary, criterion_cells
from lightning_hesd.spectra.validation import (
    FORMAT_VERSION,
    check_fields,
    check_regular,
    check_version,
    each_named,
    having,
    of,
    one_line,
    parsed,
    text,
    version_in,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lightning_hesd.spectra.codec import Content
    from lightning_hesd.spectra.record import SpectrumRecord

RESULTS = "results.json"
FIELDS_OF_RESULTS = {
    "options": of(dict),
    "checkpoints": each_named(having({"file": of(dict), **record_fields(text, text)})),
}


class Results:
    """The folder of results, with those of earlier calls."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """Open the folder, with the options that the results depend on.

        Raises:
            CommandError: If it holds results of another analysis, or other files.
        """
        self._folder = folder
        self._contents: dict[str, Any] = {"format": FORMAT_VERSION, "options": options, "checkpoints": {}}
        path = folder / RESULTS
        if not path.exists():
            return
        try:
            check_regular(path)
            contents = parsed(path.read_bytes())
            check_version(version_in(contents), "the file")
            check_fields(contents, FIELDS_OF_RESULTS, "the file")
        except ValueError as error:
            msg = f"{path} is damaged ({one_line(error)}): remove it, or choose another --out."
            raise CommandError(msg) from error
        before = contents["options"]
        if differing := sorted(key for key in {*before, *options} if before.get(key) != options.get(key)):
            what = f"`{differing[0]}` was {before.get(differing[0])!r}"
            msg = f"{path} has results of another analysis ({what}): choose another --out."
            raise CommandError(msg)
        self._contents = contents

    def known(self, name: str, path: Path) -> SpectrumRecord | None:
        """Return the record of a checkpoint that was analyzed before, and has not changed since.

        Raises:
            ValueError: If the file of a spectrum is damaged, or spectra do not belong together.
            FileNotFoundError: If the file of a spectrum is missing.
        """
        row = self._contents["checkpoints"].get(name)
        if row is None or row["file"] != _identity(path) or row["error"] is not None:
            return None
        with damage_named(self._folder / RESULTS, "the index of these spectra"):
            return decode_record(row, lambda field, _: load(field, self._file(name, field)))

    def keep(self, name: str, path: Path, record: SpectrumRecord) -> None:
        """Write the spectra and figures of a record, then the record itself."""

        def store(field: str, content: Content) -> str:
            target = self._file(name, field)
            target.parent.mkdir(parents=True, exist_ok=True)
            save(content, target)
            if isinstance(content, Spectrum):
                figure = self._folder / "figures" / f"{target.stem}.png"
                save_figure(figure, plot_density, content, title=name)
            return target.name

        self._contents["checkpoints"][name] = {
            "file": _identity(path),
            **encode_record(record, store),
            "assessment": None if record.assessment is None else asdict(record.assessment),
        }
        self._write()

    def finish(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the table."""
        self._contents["table"] = list(lines)
        self._write()
        with (
            atomic_write(self._folder / "results.csv") as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)

    def _file(self, name: str, field: str) -> Path:
        return self._folder / "spectra" / f"{name}{FIELDS[field]}.npz"

    def _write(self) -> None:
        save_text(self._folder / RESULTS, json.dumps(_finite(self._contents), indent=1))


def _finite(value: Any) -> Any:
    """Return the value with None in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns}


def summary_of(records_by_name: Mapping[str, SpectrumRecord], tolerance: float | None) -> Summary:
    """Return the table for the terminal, of `WIDTH` columns: the files have all columns."""
    records = with_first_loss(list(records_by_name.values()))
    picked = picks(records, tolerance)
    columns: dict[str, list[str]] = {"checkpoint": [*records_by_name]}
    criteria = zip(*(criterion_cells(record.spectrum) for record in records), strict=True)
    columns |= dict(zip((SPECTRUM_SCALARS["c_t"].title, "[interval]", "type"), map(list, criteria), strict=True))
    for key in ("lambda_max", "loss"):
        values = [getattr(record.spectrum, key, None) for record in records]
        columns[SPECTRUM_SCALARS[key].title] = ["" if value is None else f"{value:.3g}" for value in values]
    columns["pick"] = [
        ", ".join(rule_short_title(rule) for rule, pick in picked.items() if pick is record) for record in records
    ]
    room = WIDTH - sum(2 + max(map(len, (name, *cells))) for name, cells in [*columns.items()][1:])
    columns["checkpoint"] = [name if len(name) <= room else f"…{name[1 - room :]}" for name in columns["checkpoint"]]
    title = f"{len(records)} checkpoint{'' if len(records) == 1 else 's'}"
    return Summary(title, tuple(columns), tuple(zip(*columns.values(), strict=True)), tuple(_notes(records, columns)))


def _notes(records: Sequence[SpectrumRecord], columns: Mapping[str, Sequence[str]]) -> list[str]:
    notes = ["?: the interval contains both types, or is not verified"] if "?" in "".join(columns["type"]) else []
    verdicts = [record.assessment.words for record in records if record.assessment is not None]
    if verdicts:
        counts = ", ".join(f"{words} {verdicts.count(words)}×" for words in dict.fromkeys(verdicts))
        notes.append(f"{TITLE}: {counts}\n({CAVEAT})")
    return notes


def table_lines(records_by_name: Mapping[str, SpectrumRecord], tolerance: float | None) -> list[dict[str, Any]]:
    """Return the rows of the table by column: numbers and texts; the tolerance is that of the loss of candidates."""
    records = with_first_loss(list(records_by_name.values()))
    candidates = candidates_of(records, tolerance)  # without MP spectra, the lowest loss
    picked = picks(records, tolerance)
    lines = []
    for name, record in zip(records_by_name, records, strict=True):
        spectrum, assessment = record.spectrum, record.assessment
        lines.append(
            {
                "checkpoint": name,
                "epoch": record.epoch,
                "step": record.global_step,
                **{s.key: spectrum and s.value(spectrum) for s in shown_in("command line", SPECTRUM_SCALARS)},
                "type": spectrum and spectrum.hesd_type,
                **{s.key: s.value(record) for s in shown_in("command line", RECORD_SCALARS)},
                "criteria": assessment and assessment.words,
                "candidate": "yes" if record in candidates else "",
                "picked_by": ", ".join(rule_title(rule) for rule, pick in picked.items() if pick is record),
                "error": record.error,
            }
        )
    return lines
