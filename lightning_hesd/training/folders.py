"""Files in folders of this machine or of any filesystem that fsspec knows, written whole or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_hesd.spectra.files import atomic_write

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    Location = str | os.PathLike[str]


def is_remote(location: Location) -> bool:
    """Return whether a path is a URL of another filesystem, such as "s3://bucket/run"."""
    return "://" in str(location) and not str(location).startswith("file://")


def local_path(location: Location) -> Path:
    """Return the path of a location on this machine."""
    return Path(str(location).removeprefix("file://"))


def absolute(location: Location) -> str:
    """Return a location that stays the same if the working directory changes, as a training script may do."""
    return str(location) if is_remote(location) else str(local_path(location).absolute())


def joined(folder: Location, *names: str) -> str:
    """Return the location of a file in a folder, given the names on the way."""
    return (
        "/".join([str(folder).rstrip("/"), *names]) if is_remote(folder) else str(local_path(folder).joinpath(*names))
    )


def folder_of(location: Location) -> str:
    """Return the folder of a file."""
    return str(location).rpartition("/")[0] if is_remote(location) else str(local_path(location).parent)


def shown_path(location: Location) -> str:
    """Return a location for the terminal: relative to the working directory, if it lies in it."""
    if is_remote(location):
        return str(location)
    path, here = local_path(location), Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def exists(location: Location) -> bool:
    """Return whether a location exists; False if the filesystem cannot be reached."""
    if not is_remote(location):
        return local_path(location).exists()
    try:
        return bool(get_filesystem(str(location)).exists(str(location)))
    except Exception:  # noqa: BLE001 - clients raise anything, or are not installed: the location cannot be read
        return False


@contextlib.contextmanager
def fetched(folder: Location) -> Iterator[Path]:
    """Provide the files of a folder on this machine, copied if it is remote; without subfolders.

    Yields:
        Path of the folder or its copy.
    """
    if not is_remote(folder):
        yield local_path(folder)
        return
    filesystem = get_filesystem(str(folder))
    with tempfile.TemporaryDirectory() as copy:
        if filesystem.isdir(str(folder)):
            for entry in filesystem.ls(str(folder), detail=True):
                if entry["type"] == "file":
                    filesystem.get_file(entry["name"], str(Path(copy) / Path(entry["name"]).name))
        yield Path(copy)


def write(folder: Location, name: str, save: Callable[[Path], None]) -> None:
    """Write a file into a folder, which is created if necessary; `save` writes it to a path, whole or not at all."""
    if not is_remote(folder):
        directory = local_path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        save(directory / name)
        return
    filesystem, target = get_filesystem(str(folder)), joined(folder, name)
    with tempfile.TemporaryDirectory() as copy:
        path = Path(copy) / name
        save(path)
        filesystem.makedirs(str(folder), exist_ok=True)
        filesystem.put_file(str(path), f"{target}.partial")
        filesystem.mv(f"{target}.partial", target)


def write_text(folder: Location, name: str, text: str) -> None:
    """Write text to a file as `write` does."""

    def save(path: Path) -> None:
        with atomic_write(path) as incomplete:
            incomplete.write_text(text, encoding="utf-8", newline="")

    write(folder, name, save)


def append(folder: Location, name: str, text: str) -> None:
    """Append text to a file, which is created if necessary; a remote file is written as a whole.

    Raises:
        ValueError: If a local file is no regular one.
    """
    if not is_remote(folder):
        directory = local_path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        _check_regular(directory / name)
        with (directory / name).open("a", encoding="utf-8", newline="") as file:
            file.write(text)
        return
    write_text(folder, name, read_text(folder, name) + text)


def read_text(folder: Location, name: str) -> str:
    """Return the text of a file; empty if there is no such file.

    Raises:
        ValueError: If a local file is no regular one.
    """
    location = joined(folder, name)
    if not exists(location):
        return ""
    if not is_remote(folder):
        _check_regular(local_path(location))
    data: bytes = get_filesystem(location).cat_file(location)
    return data.decode("utf-8", errors="replace")


def remove(folder: Location, names: Iterable[str]) -> None:
    """Delete files of a folder; a missing file is no error."""
    for name in names:
        location = joined(folder, name)
        with contextlib.suppress(FileNotFoundError):
            get_filesystem(location).rm_file(location)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe would wait for another process, and a device may never end
        msg = f"{path} is no regular file, but a folder, a pipe or a device: remove it."
        raise ValueError(msg)
