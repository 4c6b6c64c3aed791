"""The records of a run: in memory, on disk and inside checkpoints.

On disk a folder has files of spectra, and an index that names them.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_hesd.spectra.codec import (
    FIELDS,
    Packing,
    check_rows,
    decode_record,
    encode_record,
    load,
    pack_records,
    save,
    unpack_records,
)
from lightning_hesd.spectra.files import damage_named
from lightning_hesd.spectra.record import START_EPOCH, SpectrumRecord, when
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.spectrum_data import STORED_ARRAYS
from lightning_hesd.spectra.tables import layers_table, records_table
from lightning_hesd.spectra.validation import (
    FORMAT_VERSION,
    at_least,
    check_fields,
    check_regular,
    check_version,
    each,
    parsed,
    text,
    version_in,
)
from lightning_hesd.training.folders import exists, fetched, joined, remove, write, write_text

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from lightning_hesd.spectra.codec import Content

__all__ = ["START_EPOCH", "SpectrumHistory", "SpectrumRecord", "when"]

INDEX_NAME = "index.json"


def is_plain_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of float64 numbers that NumPy can take."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float64
        and value.layout == torch.strided
        and not (value.is_meta or value.requires_grad)
    )


_STATE = {"records": text, "shapes": each(each(at_least(0))), "numbers": is_plain_tensor}


class SpectrumHistory(list[SpectrumRecord]):
    """The records of a run in the order they were made."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: dict[str, _HistoryFolder] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return no folders: a copy looks into them anew, and file systems cannot be pickled."""
        return {"_folders": {}}

    def rewind(self, global_step: int) -> None:
        """Forget what lies ahead of `global_step`, everything at step 0: a run starts, or goes on, from there."""
        self[:] = [record for record in self if global_step > 0 and record.global_step <= global_step]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the spectra not yet written to `folder`, and the index of all records.

        Every file appears whole or not at all, the index last. Files of another run that the folder's index names are
        replaced or deleted; the index goes before them, so that none ever names what is not its own.

        Args:
            folder: A path, or a URL of a filesystem that fsspec knows.
        """
        self._folder(folder).update(self._contents(), self._rows())

    def is_in(self, folder: str | os.PathLike[str]) -> bool:
        """Look into a folder, and return whether the files of all these records are there, whatever else is."""
        self._folders.pop(str(folder), None)  # another run may have written to it since
        return self._folder(folder).has(self._contents())

    def _folder(self, folder: str | os.PathLike[str]) -> _HistoryFolder:
        location = str(folder)
        if location not in self._folders:
            self._folders[location] = _HistoryFolder(location)
        return self._folders[location]

    def _contents(self) -> dict[str, Any]:
        """Return the spectra by the names of their files."""
        return {
            record.file_name(suffix): getattr(record, field)
            for record in self
            for field, suffix in FIELDS.items()
            if getattr(record, field)
        }

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the index."""
        return [
            encode_record(record, lambda field, _, record=record: record.file_name(FIELDS[field]))  # type: ignore[misc]
            for record in self
        ]

    @classmethod
    def load(cls, log_dir: str | os.PathLike[str], name: str = "hesd") -> SpectrumHistory:
        """Read the history of a run back.

        Args:
            log_dir: The run's log directory, or the folder of the history in it; a path, or a URL.
            name: The callback's `name`, which is also that of the folder.

        Raises:
            FileNotFoundError: If there is no history.
            ValueError: If its index is damaged, or was written by a newer version.
        """
        folders = [joined(log_dir, name), str(log_dir)]
        location = next((folder for folder in folders if exists(joined(folder, INDEX_NAME))), None)
        if location is None:
            msg = f"no {INDEX_NAME} in {folders[0]} or {folders[1]}: pass the log directory of a run with the callback."
            raise FileNotFoundError(msg)
        history = cls()
        with fetched(location) as directory:
            path = directory / INDEX_NAME
            rows = _index_rows(path)
            try:
                # The names only: an index must not point outside its own folder.
                history.extend(decode_record(r, lambda f, name: load(f, directory / Path(name).name)) for r in rows)
            except ValueError as error:
                msg = f"a record in {path} is damaged: {error}"
                raise ValueError(msg) from error
        return history

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas table with a row for each record, in their order.

        Columns are `epoch`, `global_step` and the scalars that are logged, without the prefix of their names: `c_t`,
        `c_t_low`, `c_t_high`, `lambda_max`, ..., `loss`, `seconds`. Those of other spectra begin with `gen_`, `pre_`,
        `ggn_` or `residual_`, and are there if some record has such a spectrum; so are `delta_r_e`, `delta_k_h05` and
        `verdict` (in words), and `stability_ratio`. `metric_<key>` are the metrics of the network that were logged for
        the analyzed weights. `hesd_type` is "MP" or "MN". What is undefined, or was not found
        because the analysis failed, is missing; `error` has what failed.

        Raises:
            ImportError: If pandas is not installed.
        """
        return records_table(self)

    def layers_to_dataframe(self) -> pd.DataFrame:
        """Return a pandas table with a row for each analyzed layer of each record, and its `LayerIndicators`.

        Columns are `epoch`, `global_step`, `layer`, `c_t`, `lambda_max`, `trace`, ...; `pivot` makes a matrix of one.

        Raises:
            ImportError: If pandas is not installed.
        """
        return layers_table(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the records as texts, numbers and one tensor, for checkpoints.

        Every checkpoint has all records: as tensors of their own and plain values, a few hundred would take longer to
        pickle than a small network takes to train for an epoch.
        """
        rows, packing = pack_records(self)
        return {
            "format": FORMAT_VERSION,
            "records": json.dumps(rows, separators=(",", ":")),
            "shapes": packing.shapes,
            "numbers": torch.from_numpy(packing.numbers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the records by those of `state_dict`.

        Raises:
            ValueError: If the state is invalid or damaged.
        """
        check_version(version_in(state), "the history")
        check_fields(state, _STATE, "the history")
        packing = Packing.of(state["numbers"].cpu().numpy(), state["shapes"])
        self[:] = unpack_records(parsed(state["records"], finite=False), packing)


# The folder -----------------------------------------------------------------------------------------------------------


class _HistoryFolder:
    """A folder of a run's spectra, on this machine or a remote one, which another run may have used before."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._there = _named_by_index(location)

    def has(self, contents: Mapping[str, Content]) -> bool:
        """Return whether it has these files, by name, with these contents."""
        return all(name in self._there and _is_same(self._there[name], content) for name, content in contents.items())

    def update(self, contents: Mapping[str, Content], rows: Sequence[Mapping[str, Any]]) -> None:
        """Make it a folder of these files, and no others of ours.

        Files of another run that the index names are replaced or deleted. The index goes before them and comes last, so
        that none ever names what is not its own. Contents are by names of files, rows are those of the index.
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
        write_text(self._location, INDEX_NAME, json.dumps({"format": FORMAT_VERSION, "records": rows}, indent=1))


def _named_by_index(location: str) -> dict[str, Content | None]:
    """Return what the index in a folder names, by the names that such files have; None for what cannot be read."""
    named: dict[str, Content | None] = {}
    if not exists(joined(location, INDEX_NAME)):
        return named
    with fetched(location) as directory:
        try:
            rows = _index_rows(directory / INDEX_NAME)
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


def _index_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an index.

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
        return check_rows(index.get("records"), _names_a_file, _names_a_file)


def _names_a_file(value: object) -> bool:
    return text(value) and Path(str(value)).name != ""
