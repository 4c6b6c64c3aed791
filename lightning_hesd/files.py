"""Files that appear whole or not at all, and archives of arrays with a header, without pickle."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

FORMAT_VERSION = 1


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
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
    with written_whole(Path(path)) as partial, partial.open("wb") as file:
        np.savez(file, header=text, **arrays)  # type: ignore[arg-type]  # names of arrays, no other argument


@contextlib.contextmanager
def opened_archive(path: str | os.PathLike[str], kind: str) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Open what `save_archive` wrote.

    Args:
        path: The file.
        kind: What it should be, in words.

    Yields:
        Its header and its arrays, read when asked for; what goes wrong meanwhile counts as damage.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is something else, is damaged, or was written by a newer version.
    """
    version = FORMAT_VERSION
    try:
        # Opened here, because `np.load` leaves a damaged file open.
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            version = header.pop("format")
            if version == FORMAT_VERSION:
                yield header, archive
    except FileNotFoundError:
        raise
    except (BadZipFile, KeyError, TypeError, AttributeError, EOFError, ValueError, OSError, RuntimeError) as error:
        msg = f"{os.fspath(path)} is not {kind}, or is damaged ({error})."
        raise ValueError(msg) from error
    if version != FORMAT_VERSION:
        msg = f"{os.fspath(path)} has format {version}, this version reads {FORMAT_VERSION}: update lightning_hesd."
        raise ValueError(msg)
