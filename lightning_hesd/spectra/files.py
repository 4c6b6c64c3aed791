"""Files that appear whole or not at all, and archives of arrays with a header, without pickle.

An archive may come from anybody. Reading one takes no more memory than a few times its size, and runs nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from numpy.lib import format as npy

from lightning_hesd.spectra.validation import CORRUPT_FILE_ERRORS, check_regular, integer, one_line, parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

FORMAT_VERSION = 1


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
            os.fsync(file.fileno())  # else a power cut may keep the new name, and lose what it stands for
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)  # on a full disk it would be in the way of all that comes next


def save_archive(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float64]]
) -> None:
    """Write plain values and arrays as .npz; the file appears whole or not at all."""
    text = np.array(json.dumps({"format": FORMAT_VERSION, **header}))
    with atomic_write(Path(path)) as partial, partial.open("wb") as file:
        np.savez(file, header=text, **arrays)  # type: ignore[arg-type]  # names of arrays, no other argument


@contextlib.contextmanager
def opened_archive(
    path: str | os.PathLike[str], kind: str
) -> Iterator[tuple[dict[str, Any], Callable[[str], NDArray[np.float64]]]]:
    """Open what `save_archive` wrote.

    Args:
        path: The file.
        kind: What it should be, in words.

    Yields:
        Its header, and a function that reads an array; what goes wrong meanwhile counts as damage.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is something else, is damaged, or was written by a newer version.
    """
    version = FORMAT_VERSION
    try:
        check_regular(Path(path))
        with Path(path).open("rb") as file, ZipFile(file) as archive:
            _check_sizes(archive, os.fstat(file.fileno()).st_size)
            header = parsed(str(_array(archive, "header", "U")), finite=False)
            version = header.pop("format")
            if not integer(version):
                msg = "its format is no number"
                raise ValueError(msg)
            if version == FORMAT_VERSION:
                yield header, lambda name: _array(archive, name, "f").astype(np.float64)
    except FileNotFoundError:
        raise
    except CORRUPT_FILE_ERRORS as error:
        msg = f"{os.fspath(path)} is not {kind}, or is damaged ({one_line(error)})."
        raise ValueError(msg) from error
    if version != FORMAT_VERSION:
        msg = f"{os.fspath(path)} has format {version}, this version reads {FORMAT_VERSION}: update lightning_hesd."
        raise ValueError(msg)


def _check_sizes(archive: ZipFile, size: int) -> None:
    """Check that an archive is as large as what is in it: compressed, a few kilobytes could become any number.

    Raises:
        ValueError: If it is not.
    """
    members = archive.infolist()
    if any(m.compress_type != ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        msg = "its arrays are compressed, which ours never are"
        raise ValueError(msg)


def _array(archive: ZipFile, name: str, kind: str) -> NDArray[Any]:
    """Return an array of a kind; `np.load` would allocate whatever its header claims before it looks for the data.

    Raises:
        ValueError: If it is of another kind, or its data are not those of its shape.
    """
    data = io.BytesIO(archive.read(f"{name}.npy"))
    if npy.read_magic(data) != (1, 0):
        msg = f"`{name}` is of another version of NumPy's format"
        raise ValueError(msg)
    shape, fortran_order, dtype = npy.read_array_header_1_0(data)
    if dtype.kind != kind:
        msg = f"`{name}` has dtype {dtype}"
        raise ValueError(msg)
    return np.frombuffer(data.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
