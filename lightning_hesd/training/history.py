"""The records of a run: in memory, on disk and in checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_hesd.spectra.assessment import check_comparable
from lightning_hesd.spectra.record import LAYERS_SUFFIX, PLAIN_FIELDS, START_EPOCH, SUFFIXES, SpectrumRecord, when
from lightning_hesd.spectra.spectrum import ARRAYS, Spectrum, load_layers
from lightning_hesd.spectra.tables import layers_table, records_table
from lightning_hesd.spectra.validation import (
    at_least,
    each,
    each_named,
    first_invalid_field,
    of,
    optional,
    parsed,
    text,
)
from lightning_hesd.training.folders import exists, fetched, joined
from lightning_hesd.training.history_files import INDEX_NAME, HistoryFolder, completed, index_rows

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from lightning_hesd.training.history_files import Content

__all__ = ["PLAIN_FIELDS", "START_EPOCH", "SUFFIXES", "SpectrumHistory", "SpectrumRecord", "when"]

_STATE = {
    "records": text,
    "shapes": each(each(at_least(0))),
    "numbers": lambda value: isinstance(value, torch.Tensor) and value.dtype == torch.float64,
}


class SpectrumHistory(list[SpectrumRecord]):
    """The records of a run in the order they were made."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: dict[str, HistoryFolder] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return no folders: a copy reads them again, and filesystems cannot be pickled."""
        return {"_folders": {}}

    def rewind(self, global_step: int) -> None:
        """Forget the records after `global_step`, from which a run goes on; at step 0 all, because a run begins."""
        self[:] = [record for record in self if global_step > 0 and record.global_step <= global_step]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the spectra not yet written to `folder`, and the index of all records.

        Every file is written whole or not at all, the index last. Files of another run that the index names are
        replaced or deleted, after the index, so that an index never names files of another run.

        Args:
            folder: A path, or a URL of a filesystem that fsspec knows.
        """
        self._folder(folder).update(self._contents(), self._rows())

    def is_in(self, folder: str | os.PathLike[str]) -> bool:
        """Return whether a folder has the files of all these records; it may have others."""
        self._folders.pop(str(folder), None)  # another run may have written to it since
        return self._folder(folder).has(self._contents())

    def _folder(self, folder: str | os.PathLike[str]) -> HistoryFolder:
        location = str(folder)
        if location not in self._folders:
            self._folders[location] = HistoryFolder(location)
        return self._folders[location]

    def _contents(self) -> dict[str, Content]:
        """Return the spectra by the names of their files."""
        contents: dict[str, Content] = {}
        for record in self:
            contents |= {record.file_name(suffix): spectrum for suffix, spectrum in record.spectra.items()}
            if record.layers:
                contents[record.file_name(LAYERS_SUFFIX)] = dict(record.layers)
        return contents

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the index."""
        return [
            {
                **_plain(record),
                **{
                    field: record.file_name(suffix) if suffix in record.spectra else None
                    for field, suffix in SUFFIXES.items()
                },
                "layers": record.file_name(LAYERS_SUFFIX) if record.layers else None,
            }
            for record in self
        ]

    @classmethod
    def load(cls, log_dir: str | os.PathLike[str], name: str = "hesd") -> SpectrumHistory:
        """Read the history of a run back.

        Args:
            log_dir: The run's log directory, or the folder of the history in it; a path, or a URL.
            name: The callback's `name`, which is also that of the folder.

        Raises:
            FileNotFoundError: If the folder has no history.
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
            for row in index_rows(path):
                # The names only: an index must not point outside its own folder.
                paths = {f: row[f] and directory / Path(row[f]).name for f in (*SUFFIXES, "layers")}
                layers = paths.pop("layers")
                spectra = {f: file and Spectrum.load(file) for f, file in paths.items()}
                try:
                    history.append(_record(row, spectra, layers and load_layers(layers)))
                except ValueError as error:
                    msg = f"a record in {path} is damaged: {error}"
                    raise ValueError(msg) from error
        return history

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas table with a row for each record, in their order.

        Columns are `epoch`, `global_step` and the scalars that are logged, without the prefix of their names: `c_t`,
        `c_t_low`, `c_t_high`, `lambda_max`, ..., `loss`, `seconds`. Those of other spectra begin with `gen_`, `pre_`,
        `ggn_` or `residual_`, and are there if some record has such a spectrum; so are `delta_r_e`, `delta_k_h05` and
        `verdict` (in words), and `stability_ratio`. `hesd_type` is "MP" or "MN". What is undefined, or was not found
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
        arrays: list[NDArray[np.float64]] = []
        rows = [
            {
                **_plain(record),
                **{field: _packed(getattr(record, field), arrays) for field in SUFFIXES},
                "layers": record.layers and {name: _packed(layer, arrays) for name, layer in record.layers.items()},
            }
            for record in self
        ]
        return {
            "records": json.dumps(rows, separators=(",", ":")),
            "shapes": [array.shape for array in arrays],
            "numbers": torch.from_numpy(np.concatenate([np.zeros(0), *(array.ravel() for array in arrays)])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the records by those of `state_dict`.

        Raises:
            ValueError: If that is something else, or is damaged.
        """
        if (wrong := first_invalid_field(state, _STATE)) is not None:
            msg = f"`{wrong}` is missing or is something else"
            raise ValueError(msg)
        rows = completed(parsed(state["records"], finite=False), optional(of(dict)), optional(each_named(of(dict))))
        ends = np.cumsum([math.prod(shape) for shape in state["shapes"]], dtype=int)
        parts = np.split(state["numbers"].cpu().numpy(), ends)
        arrays = [part.reshape(shape) for part, shape in zip(parts, state["shapes"], strict=False)]
        self[:] = [
            _record(
                row,
                {field: _unpacked(row[field], arrays) for field in SUFFIXES},
                row["layers"] and {name: _unpacked(layer, arrays) for name, layer in row["layers"].items()},
            )
            for row in rows
        ]


def _plain(record: SpectrumRecord) -> dict[str, Any]:
    return {field: getattr(record, field) for field in PLAIN_FIELDS}


def _record(row: Mapping[str, Any], spectra: Mapping[str, Any], layers: Any) -> SpectrumRecord:
    record = SpectrumRecord(**{field: row[field] for field in PLAIN_FIELDS}, **spectra, layers=layers)
    if record.spectrum is not None and record.generalization is not None:
        check_comparable(record.spectrum, record.generalization)  # else the assessment would fail, later on
    return record


def _packed(spectrum: Spectrum | None, arrays: list[NDArray[np.float64]]) -> dict[str, Any] | None:
    """Return the fields of a spectrum: for its arrays, which are appended, their positions."""
    if spectrum is None:
        return None
    positions = range(len(arrays), len(arrays) + len(ARRAYS))
    arrays.extend(getattr(spectrum, name) for name in ARRAYS)
    return {**spectrum.to_dict(), **dict(zip(ARRAYS, positions, strict=True))}


def _unpacked(values: dict[str, Any] | None, arrays: Sequence[NDArray[np.float64]]) -> Any:
    if values is None:
        return None
    return Spectrum.from_dict({**values, **{name: arrays[values[name]] for name in ARRAYS}})
