"""Records as plain values, and back: in indices of histories, in states of checkpoints, in results of the command line.

These differ in how a spectrum is stored (in a file of its own, or in one tensor), and in nothing else. Data are of
unknown origin: each function that reads raises a ValueError for invalid data, and no other exception.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lightning_hesd.spectra.assessment import check_comparable
from lightning_hesd.spectra.files import damage_named, read_archive, save_archive
from lightning_hesd.spectra.layer_spectra import LayerSpectra
from lightning_hesd.spectra.record import LAYERS_SUFFIX, PLAIN_FIELDS, SUFFIXES, SpectrumRecord
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.spectrum_data import STORED_ARRAYS
from lightning_hesd.spectra.validation import (
    at_least,
    check_fields,
    each,
    each_named,
    having,
    integer,
    number,
    of,
    optional,
    text,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lightning_hesd.spectra.validation import Check

    Array: TypeAlias = NDArray[np.float64]
    Content: TypeAlias = Spectrum | Mapping[str, Spectrum]

FIELDS = {**SUFFIXES, "layers": LAYERS_SUFFIX}
"""The fields of a record that hold spectra, with their suffixes in names of files."""


# Records --------------------------------------------------------------------------------------------------------------


def encode_record(record: SpectrumRecord, store: Callable[[str, Content], Any]) -> dict[str, Any]:
    """Return a record as plain values.

    Args:
        record: The record.
        store: Function of the name of a field and the spectrum, or the spectra of layers, in it; returns the plain
            value that stands for them.
    """
    contents = {field: getattr(record, field) or None for field in FIELDS}
    return {
        **{field: getattr(record, field) for field in PLAIN_FIELDS},
        **{field: None if content is None else store(field, content) for field, content in contents.items()},
    }


def decode_record(row: Mapping[str, Any], load: Callable[[str, Any], Any]) -> SpectrumRecord:
    """Return the record of a row that `record_fields` fit.

    Args:
        row: Plain values of a record.
        load: Function of the name of a field and the plain value in it; returns the spectrum, or the spectra of layers.

    Raises:
        ValueError: If the spectra on training and on generalization data cannot be compared.
    """
    contents: dict[str, Any] = {field: None if row[field] is None else load(field, row[field]) for field in FIELDS}
    record = SpectrumRecord(**{field: row[field] for field in PLAIN_FIELDS}, **contents)
    if record.spectrum is not None and record.generalization is not None:
        check_comparable(record.spectrum, record.generalization)  # else the assessment would fail, later on
    return record


def record_fields(spectrum: Check, layers: Check) -> dict[str, Check]:
    """Return the checks of a row, given those of the values that stand for a spectrum and for spectra of layers."""
    return {
        "epoch": integer,
        "global_step": integer,
        "error": optional(text),
        **dict.fromkeys(("first_loss", "stability_threshold"), optional(number)),
        **dict.fromkeys(("metrics", "gradients"), each_named(number)),
        **dict.fromkeys(SUFFIXES, optional(spectrum)),
        "layers": optional(layers),
    }


def check_rows(rows: object, spectrum: Check, layers: Check) -> list[dict[str, Any]]:
    """Return rows after a check; arguments as for `record_fields`.

    Raises:
        ValueError: If they are no list of records.
    """
    if not isinstance(rows, list):
        msg = f"the records must be a list, got {type(rows).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - of data, not of arguments
    for row in rows:
        check_fields(row, record_fields(spectrum, layers), "a record")
    return rows


# Many spectra in one array --------------------------------------------------------------------------------------------


class Packing:
    """Arrays of many spectra, for storage as one array with their shapes.

    Attributes:
        arrays: The arrays so far; packed spectra refer to them by position.
    """

    def __init__(self, arrays: Sequence[Array] = ()) -> None:
        self.arrays: list[Array] = list(arrays)

    @classmethod
    def of(cls, numbers: Array, shapes: Sequence[Sequence[int]]) -> Packing:
        """Return the packing of one array.

        Args:
            numbers: All numbers, shape (total,).
            shapes: Shape of each array, in the order of their numbers.

        Raises:
            ValueError: If there are more or fewer numbers than the shapes have.
        """
        sizes = [math.prod(shape) for shape in shapes]
        if numbers.ndim != 1 or sum(sizes) != len(numbers):
            msg = f"the arrays have {sum(sizes):.4g} numbers, got an array of shape {numbers.shape}"
            raise ValueError(msg)
        parts = np.split(numbers, np.cumsum(sizes, dtype=int)[:-1]) if sizes else []
        return cls([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each array."""
        return [array.shape for array in self.arrays]

    @property
    def numbers(self) -> Array:
        """All numbers, shape (total,)."""
        return np.concatenate([np.zeros(0), *(array.ravel() for array in self.arrays)])

    def pack(self, spectrum: Spectrum) -> dict[str, Any]:
        """Append the arrays of a spectrum, and return its fields with positions in place of arrays."""
        values = spectrum.to_dict()
        for name in STORED_ARRAYS:
            self.arrays.append(values[name])
            values[name] = len(self.arrays) - 1
        return values

    def unpack(self, values: Mapping[str, Any]) -> Spectrum:
        """Return the spectrum that was packed.

        Raises:
            ValueError: If it is damaged.
        """
        positions = dict.fromkeys(STORED_ARRAYS, lambda at: at_least(0)(at) and at < len(self.arrays))
        check_fields(values, positions, "a spectrum")
        return Spectrum.from_dict({**values, **{name: self.arrays[values[name]] for name in STORED_ARRAYS}})


def pack_records(records: Sequence[SpectrumRecord]) -> tuple[list[dict[str, Any]], Packing]:
    """Return records as plain values, and the arrays of their spectra."""
    packing = Packing()

    def store(_: str, content: Content) -> dict[str, Any]:
        if isinstance(content, Spectrum):
            return packing.pack(content)
        return {name: packing.pack(spectrum) for name, spectrum in content.items()}

    return [encode_record(record, store) for record in records], packing


def unpack_records(rows: object, packing: Packing) -> list[SpectrumRecord]:
    """Return the records that were packed.

    Raises:
        ValueError: If they are damaged.
    """

    def load(field: str, value: Any) -> Content:
        if field != "layers":
            return packing.unpack(value)
        return LayerSpectra((name, packing.unpack(spectrum)) for name, spectrum in value.items())

    return [decode_record(row, load) for row in check_rows(rows, of(dict), each_named(of(dict)))]


# Files ----------------------------------------------------------------------------------------------------------------


def save(content: Content, path: str | os.PathLike[str]) -> None:
    """Write a spectrum, or the spectra of layers by name, to one file: no pickle, and whole or not at all."""
    if isinstance(content, Spectrum):
        content.save(path)
        return
    headers: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    for index, (layer, spectrum) in enumerate(content.items()):
        values = spectrum.to_dict()
        arrays |= {f"{index}/{name}": values.pop(name) for name in STORED_ARRAYS}
        headers.append({"layer": layer, "fields": values})
    save_archive(path, {"layers": headers}, arrays)


def load(field: str, path: str | os.PathLike[str]) -> Content:
    """Read the spectrum, or the spectra of layers, that `save` wrote for this field of a record.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has other content, is damaged, or was written by a newer version.
    """
    return load_layers(path) if field == "layers" else Spectrum.load(path)


def load_layers(path: str | os.PathLike[str]) -> LayerSpectra:
    """Read the spectra of layers, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has other content, is damaged, or was written by a newer version.
    """
    kind = "a file of the spectra of layers"
    header, arrays = read_archive(path, kind)
    with damage_named(path, kind):
        check_fields(header, {"layers": each(having({"layer": text, "fields": of(dict)}))}, "the header")
        found = LayerSpectra()
        for index, entry in enumerate(header["layers"]):
            stored = {name: arrays[f"{index}/{name}"] for name in STORED_ARRAYS if f"{index}/{name}" in arrays}
            found[entry["layer"]] = Spectrum.from_dict({**entry["fields"], **stored})
        return found
