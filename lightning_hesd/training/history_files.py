"""The folder of a history: files of spectra, and an index that names them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.spectra.record import LAYERS_SUFFIX, SUFFIXES, SpectrumRecord
from lightning_hesd.spectra.spectrum import ARRAYS, Spectrum, load_layers, save_layers
from lightning_hesd.spectra.validation import (
    CORRUPT_FILE_ERRORS,
    check_regular,
    first_invalid_field,
    integer,
    number,
    optional,
    parsed,
    text,
)
from lightning_hesd.training.folders import exists, fetched, joined, remove, write, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_hesd.spectra.validation import Check

    Content = Spectrum | Mapping[str, Spectrum] | None

INDEX_NAME = "index.json"
INDEX_FORMAT = 1
LATER_FIELDS = ("generalization", "preconditioned", "stability_threshold", "ggn", "residual", "layers")
"""What the first histories did not have."""


class HistoryFolder:
    """A folder of a run's spectra, which another run may have used before.

    Args:
        location: A path, or a URL of a filesystem that fsspec knows.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._there = _named_by_index(location)

    def has(self, contents: Mapping[str, Content]) -> bool:
        """Return whether it has these files, by name, with these contents."""
        return all(name in self._there and _is_same(self._there[name], content) for name, content in contents.items())

    def update(self, contents: Mapping[str, Content], rows: Sequence[Mapping[str, Any]]) -> None:
        """Make it a folder of these files, and no others of ours.

        Files of another run that the index names are replaced or deleted. The index goes before them and comes last, so
        that none ever names what is not its own.

        Args:
            contents: Spectra, or those of layers, by names of files.
            rows: Rows of the index.
        """
        there = self._there
        outdated = [name for name, content in there.items() if not _is_same(content, contents.get(name))]
        if outdated:
            remove(self._location, [INDEX_NAME, *outdated])
            for name in outdated:
                del there[name]
        for name, content in contents.items():
            if name not in there:
                write(self._location, name, _saver(content))
            there[name] = content
        write_text(self._location, INDEX_NAME, json.dumps({"format": INDEX_FORMAT, "records": rows}, indent=1))


def _saver(content: Content) -> Callable[[Path], None]:
    if isinstance(content, Spectrum):
        return content.save
    assert content is not None  # noqa: S101 - what cannot be read comes from a folder, never from a record
    return partial(save_layers, content)


def _named_by_index(location: str) -> dict[str, Content]:
    """Return what the index in a folder names, by the names that such files have; None for what cannot be read."""
    named: dict[str, Content] = {}
    if not exists(joined(location, INDEX_NAME)):
        return named
    with fetched(location) as directory:
        try:
            rows = index_rows(directory / INDEX_NAME)
        except ValueError:
            return named  # of whatever it is, nothing is known to be ours
        for row in rows:
            record = SpectrumRecord(row["epoch"], row["global_step"], None)
            for field, suffix in (*SUFFIXES.items(), ("layers", LAYERS_SUFFIX)):
                path = directory / record.file_name(suffix)
                if row[field] is not None and path.exists():
                    named[path.name] = _read(path, load_layers if field == "layers" else Spectrum.load)
    return named


def _read(path: Path, load: Callable[[Path], Content]) -> Content:
    try:
        return load(path)
    except ValueError:
        return None


def _is_same(first: Content, second: Content) -> bool:
    """Return whether two files have the same spectra in them."""
    if first is second or first is None or second is None:
        return first is second
    if isinstance(first, Spectrum) and isinstance(second, Spectrum):
        return _fields(first) == _fields(second) and all(
            np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True) for name in ARRAYS
        )
    if isinstance(first, Spectrum) or isinstance(second, Spectrum):
        return False
    return first.keys() == second.keys() and all(_is_same(first[name], second[name]) for name in first)


def _fields(spectrum: Spectrum) -> str:
    """Return what is no array, as text, in which NaN equals itself."""
    return json.dumps({name: value for name, value in spectrum.to_dict().items() if name not in ARRAYS})


def index_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an index.

    Raises:
        ValueError: If it is damaged, or was written by a newer version.
    """
    try:
        check_regular(path)
        index = parsed(path.read_text(encoding="utf-8"), finite=False)
        version, rows = index["format"], index["records"]
        if not integer(version):
            msg = "its format is no number"
            raise ValueError(msg)
        if version == INDEX_FORMAT:
            name = optional(lambda value: text(value) and Path(value).name != "")
            return completed(rows, name, name)
    except CORRUPT_FILE_ERRORS as error:
        msg = f"{path} is not the index of a spectrum history, or is damaged ({error!r})."
        raise ValueError(msg) from error
    msg = f"{path} has format {version}, this version reads {INDEX_FORMAT}: update lightning_hesd."
    raise ValueError(msg)


def completed(rows: object, spectrum: Check, layers: Check) -> list[dict[str, Any]]:
    """Return rows with the fields that the first histories did not have, checked.

    Args:
        rows: The rows, of anybody.
        spectrum: What stands for a spectrum in them.
        layers: What stands for the spectra of layers.

    Raises:
        ValueError: If a field is missing or is something else.
    """
    fields = {
        "epoch": integer,
        "global_step": integer,
        "error": optional(text),
        "stability_threshold": optional(number),
        **dict.fromkeys(SUFFIXES, spectrum),
        "layers": layers,
    }
    if not isinstance(rows, list):
        msg = f"the records must be a list, got {type(rows).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - of files, not of arguments
    completed = []
    for row in rows:
        wrong = first_invalid_field({**dict.fromkeys(LATER_FIELDS), **row} if isinstance(row, dict) else row, fields)
        if wrong is not None:
            msg = f"`{wrong}` of a record is missing or is something else"
            raise ValueError(msg)
        completed.append({**dict.fromkeys(LATER_FIELDS), **row})
    return completed
