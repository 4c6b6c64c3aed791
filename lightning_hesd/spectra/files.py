"""Files that appear whole or not at all, and archives of arrays with a header, without pickle.

An archive may be of unknown origin. Reading one takes no more memory than a few times its size, and runs no code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy

from lightning_hesd.spectra.validation import FORMAT_VERSION, check_regular, check_version, one_line, parsed, version_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

ZIP_ERRORS = (BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError, struct.error)
"""Exceptions of `zipfile` for a damaged archive; of encrypted members it raises a RuntimeError."""

NPY_ERRORS = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)
"""Exceptions of NumPy for a damaged header of an array, which is the text of a Python dict."""


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `target` when all is written; if that fails it is removed.

    Yields:
        A path in the same folder.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name, and lose the content
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)  # a full disk needs the space


def save_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> None:
    """Write a text, and the folders that are to hold it; the file appears whole or not at all.

    Args:
        path: The file.
        text: The text.
        errors: What becomes of characters that are no text, as for `str.encode`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def save_archive(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float64]]
) -> None:
    """Write plain values and arrays as .npz; the file appears whole or not at all."""
    text = np.array(json.dumps({"format": FORMAT_VERSION, **header}))
    with atomic_write(Path(path)) as partial, partial.open("wb") as file:
        np.savez(file, header=text, **arrays)  # type: ignore[arg-type]  # names of arrays, no other argument


def read_archive(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Read the header and the arrays that `save_archive` wrote.

    Args:
        path: The file.
        kind: Description of the expected content, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such archive, is damaged, or was written by a newer version.
    """
    with damage_named(path, kind):
        members = _members(Path(path))
        header = parsed(str(_array(members, "header", "U")), finite=False)
        version = version_in(header)
    check_version(version, os.fspath(path))
    with damage_named(path, kind):
        arrays = {name: _array(members, name, "f").astype(np.float64) for name in members if name != "header"}
    return {key: value for key, value in header.items() if key != "format"}, arrays


@contextlib.contextmanager
def damage_named(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Add the name of the file, and the kind of content it should have, to the message of a ValueError.

    Raises:
        ValueError: If the body raises one.
    """
    try:
        yield
    except ValueError as error:
        msg = f"{os.fspath(path)} is not {kind}, or is damaged ({one_line(error)})."
        raise ValueError(msg) from error


def _members(path: Path) -> dict[str, bytes]:
    """Return the contents of an archive by name, without ".npy".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no archive, or its members are compressed.
    """
    check_regular(path)
    try:
        with path.open("rb") as file, ZipFile(file) as archive:
            # An archive is as large as its members: compressed, a few kilobytes could become any number.
            members, size = archive.infolist(), os.fstat(file.fileno()).st_size
            if any(m.compress_type != ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                msg = "its arrays are compressed, which ours never are"
                raise ValueError(msg)
            return {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    except FileNotFoundError:
        raise
    except ZIP_ERRORS as error:
        msg = one_line(error)
        raise ValueError(msg) from error


def _array(members: Mapping[str, bytes], name: str, kind: str) -> NDArray[Any]:
    """Return an array of a kind; `np.load` would allocate whatever its header claims before it looks for the data.

    Raises:
        ValueError: If it is missing, is of another kind, or its data do not have its shape.
    """
    if name not in members:
        msg = f"`{name}` is missing"
        raise ValueError(msg)
    data = io.BytesIO(members[name])
    try:
        if npy.read_magic(data) != (1, 0):
            msg = f"`{name}` is of another version of NumPy's format"
            raise ValueError(msg)
        shape, fortran_order, dtype = npy.read_array_header_1_0(data)
    except NPY_ERRORS as error:
        msg = f"the header of `{name}` cannot be read: {one_line(error)}"
        raise ValueError(msg) from error
    if dtype.kind != kind:
        msg = f"`{name}` has dtype {dtype}"
        raise ValueError(msg)
    return np.frombuffer(data.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
