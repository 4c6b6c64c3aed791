"""Names and locations of checkpoint files, on any filesystem, kept apart from those of other callbacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile, ZipFile

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_hesd.training.folders import exists, is_remote, joined, local_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch.callbacks import ModelCheckpoint

DEFAULT_FILENAME = "{epoch}-{step}"
"""ModelCheckpoint's template of file names without a `filename`."""

SHARDED_METADATA = "meta.pt"
"""File in the folder of a sharded checkpoint that has everything but the parameters."""


def prefix(*parts: str) -> str:
    """Return a prefix of file names, without characters that are special in filesystems or templates."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part).strip("_.") or "own" for part in parts)


def place(path: object) -> str:
    """Return the canonical path of a file; of a link, that of the link itself."""
    if is_remote(str(path)):
        return str(path).rstrip("/")
    local = local_path(str(path))
    return str(local.parent.resolve() / local.name)


def is_same_file(path: object, other: object) -> bool:
    """Return whether two paths lead to the same file, also through links."""
    if is_remote(str(path)) or is_remote(str(other)):
        return place(path) == place(other)
    return local_path(str(path)).resolve() == local_path(str(other)).resolve()


def lies_in(path: str, folder: str, extension: str) -> bool:
    """Return whether a path is that of a checkpoint in a folder or below it, on any filesystem."""
    if not path.endswith(extension):
        return False
    if is_remote(folder):
        return path.startswith(f"{folder.rstrip('/')}/") and ".." not in path.split("/")
    return not is_remote(path) and Path(place(path)).is_relative_to(local_path(folder).resolve())


def may_coincide(filename: str, other: ModelCheckpoint, *, auto_insert_metric_name: bool) -> bool:
    """Return whether a template of file names and that of another callback can give the same name."""
    ours = _split(filename, auto_insert_metric_name)
    theirs = _split(other.filename or DEFAULT_FILENAME, other.auto_insert_metric_name)
    return _matches(ours, theirs) or _matches(theirs, ours)


def _split(template: str, auto_insert_metric_name: bool) -> list[str]:  # noqa: FBT001 - an attribute, passed on
    """Return the texts around the values in a template."""
    texts = [""]
    for text, name in re.findall(r"([^{]*)(?:\{([^}:]*)[^}]*\})?", template):
        texts[-1] += text + (f"{name}=" if name and auto_insert_metric_name else "")
        if name:
            texts.append("")
    return texts


def _matches(texts: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether a template, given by its texts, can give a name of another template."""
    return re.fullmatch(".*".join(map(re.escape, texts)) + r"(-v\d+)?", "0".join(others)) is not None


def is_written_as(path: str, mark: str) -> bool:
    """Return whether a checkpoint file exists and has its mark: another run may have written to the same path.

    True without a mark, and in formats other than PyTorch's, in which no mark can be found.
    """
    if not exists(path):
        return False
    if not is_remote(path) and local_path(path).is_dir():
        path = joined(path, SHARDED_METADATA)
    if not mark or not exists(path):
        return True
    with get_filesystem(path).open(path, "rb") as file:
        if file.read(2) != b"PK":
            return True
        try:
            with ZipFile(file) as archive:
                pickles = [name for name in archive.namelist() if Path(name).name == "data.pkl"]
                return any(mark.encode() in archive.read(name) for name in pickles)
        except (BadZipFile, EOFError):  # an incomplete file
            return False
