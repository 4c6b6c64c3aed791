"""The folder of a history: files of spectra, and an index that names them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.spectra.codec import FIELDS, check_rows, load, save
from lightning_hesd.spectra.files import damage_named
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.spectrum_data import STORED_ARRAYS
from lightning_hesd.spectra.validation import (
    FORMAT_VERSION,
    check_fields,
    check_regular,
    check_version,
    of,
    parsed,
    text,
    version_in,
)
from lightning_hesd.training.folders import exists, fetched, joined, remove, write, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_hesd.spectra.codec import Content

INDEX_NAME = "index.json"


class HistoryFolder:
    """A folder of a run's spectra, on this machine or a remote one, which another run may have used before."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._there = _named_by_index(location)

    def has(self, contents: Mapping[str, Content]) -> bool:
        """Return whether it has these files, by name, with these contents."""
        return all(name in self._there and _is_same(self._there[name], content) for name, content in contents.items())

    def update(
        self, contents: Mapping[str, Content], rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
    ) -> None:
        """Make it a folder of these files, and no others of ours.

        Files of another run that the index names are replaced or deleted. The index goes before them and comes last, so
        that none ever names what is not its own. Contents are by names of files; the index has the rows, and what is
        known about the run.
        """
        there = self._there
        outdated = [name for name, content in there.items() if not _is_same(content, contents.get(name))]
        if outdated:
            remove(self._location, [INDEX_NAME, *outdated])
            for name in outdated:
                del there[name]
        for name, content in contents.items():
            if name not in there:
                write(self._location, name, partial(save, content))
            there[name] = content
        index = {"format": FORMAT_VERSION, "about": about, "records": rows}
        write_text(self._location, INDEX_NAME, json.dumps(index, indent=1))


def _named_by_index(location: str) -> dict[str, Content | None]:
    """Return what the index in a folder names, by the names that such files have; None for what cannot be read."""
    named: dict[str, Content | None] = {}
    if not exists(joined(location, INDEX_NAME)):
        return named
    with fetched(location) as directory:
        try:
            rows, _ = read_index(directory / INDEX_NAME)
        except ValueError:
            return named  # of whatever it is, nothing is known to be ours
        for row in rows:
            record = SpectrumRecord(row["epoch"], row["global_step"], None)
            for field, suffix in FIELDS.items():
                path = directory / record.file_name(suffix)
                if row[field] is not None and path.exists():
                    named[path.name] = _read(field, path)
    return named


def _read(field: str, path: Path) -> Content | None:
    try:
        return load(field, path)
    except ValueError:
        return None


def _is_same(first: Content | None, second: Content | None) -> bool:
    """Return whether two files have the same spectra in them."""
    if first is second or first is None or second is None:
        return first is second
    if isinstance(first, Spectrum) and isinstance(second, Spectrum):
        values = first.to_dict(), second.to_dict()
        arrays = [[value.pop(name) for name in STORED_ARRAYS] for value in values]
        same = [np.array_equal(ours, theirs, equal_nan=True) for ours, theirs in zip(*arrays, strict=True)]
        return all(same) and json.dumps(values[0]) == json.dumps(values[1])  # as text, in which NaN equals itself
    if isinstance(first, Spectrum) or isinstance(second, Spectrum):
        return False
    return first.keys() == second.keys() and all(_is_same(first[name], second[name]) for name in first)


def read_index(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of an index, and what is known about the run.

    Raises:
        ValueError: If it is damaged, or was written by a newer version.
    """
    kind = "the index of a spectrum history"
    with damage_named(path, kind):
        check_regular(path)
        index = parsed(path.read_bytes(), finite=False)
        version = version_in(index)
    check_version(version, str(path))
    with damage_named(path, kind):
        check_fields(index, {"about": of(dict)}, "the index")
        return check_rows(index.get("records"), _names_a_file, _names_a_file), index["about"]


def _names_a_file(value: object) -> bool:
    return text(value) and Path(str(value)).name != ""
