"""A ModelCheckpoint whose files are its own: no two states share a path, and no other callback uses it.

Its files may lie on any filesystem.
"""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile, is_zipfile

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.compat.messages import warn
from lightning_hesd.training.compat.namespaces import join_namespaces, lightning_types, of_every_namespace
from lightning_hesd.training.compat.runs import isolated_saving, name_of
from lightning_hesd.training.compat.strategies import saving_together
from lightning_hesd.training.folders import absolute, exists, is_remote, joined, local_path
from lightning_hesd.training.isolation.isolation import TrainingIsolation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import lightning.pytorch as pl
    from torch import Tensor

DEFAULT_FILENAME = "{epoch}-{step}"
"""ModelCheckpoint's template of file names without a `filename`."""

SHARDED_METADATA = "meta.pt"
"""File in the folder of a sharded checkpoint that has everything but the parameters."""


@of_every_namespace("callbacks.ModelCheckpoint")
class ExclusiveCheckpoint(ModelCheckpoint):
    """Writes files that never collide with those of other checkpoint callbacks.

    Without a `filename`, names begin with `name_prefix`. With one, they do so only if another callback of the Trainer
    may write the same name to the same folder. `enable_version_counter=False` allows overwriting files of an earlier
    run, as in ModelCheckpoint, but neither a file of this run nor the file that it was resumed from. The arguments are
    those of ModelCheckpoint.
    """

    def __init__(self, **kwargs: Any) -> None:
        join_namespaces()
        super().__init__(**kwargs)
        self._given = {"dirpath": self.dirpath, "filename": self.filename}  # by the user
        self._found: dict[str, Any] = {}  # by this callback, for a run
        self._set_up_by: str | None = None
        self._has_names = False
        self._is_resumed = False

    @property
    def name_prefix(self) -> str:
        """Prefix of file names."""
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder to write to, again in every Trainer that fits."""
        join_namespaces()
        if stage == TrainerFn.FITTING and name_of(trainer) != self._set_up_by:
            self._set_up_by = name_of(trainer)
            self.dirpath = self._as_given("dirpath")
            if not self._is_resumed:
                self.forget_run()
        if stage == TrainerFn.FITTING:
            self._has_names = False
        super().setup(trainer, pl_module, stage)
        self.dirpath = self._found["dirpath"] = absolute(str(self.dirpath))

    def _as_given(self, name: str) -> Any:
        """Return the user's value of an attribute, which this callback has set for the last run."""
        if name not in self._found or getattr(self, name) != self._found[name]:
            self._given[name] = getattr(self, name)
        return self._given[name]

    def forget_run(self) -> None:
        """Forget the files of the last run: a callback may serve several runs."""
        self.best_model_path = self.last_model_path = self._last_checkpoint_saved = ""
        self._last_global_step_saved = 0

    def choose_names(self, trainer: pl.Trainer) -> None:
        """Choose names that no other callback uses; called once all know their folders, before the first file."""
        others = [c for c in self._other_checkpoints(trainer) if place(c.dirpath) == place(self.dirpath)]
        given: str | None = self._as_given("filename")
        if given is None:
            self.filename = f"{self.name_prefix}-{DEFAULT_FILENAME}"
        elif any(may_coincide(given, c, auto_insert_metric_name=self.auto_insert_metric_name) for c in others):
            self.filename = f"{self.name_prefix}-{given}"
        else:
            self.filename = given
        self._found["filename"] = self.filename
        # `Trainer.fit(ckpt_path="last")` looks for this prefix.
        last = type(self).CHECKPOINT_NAME_LAST
        self.CHECKPOINT_NAME_LAST = f"{last}-{self.name_prefix}" if any(c.save_last for c in others) else last

    def free_path(self, trainer: pl.Trainer, names: dict[str, Tensor], own: Iterable[str]) -> str:
        """Return a path for a new file that no other file has, also none of this callback's `own`.

        The template of the file name takes its values from `names`.
        """
        taken = {place(path) for path in own}
        for other in self._other_checkpoints(trainer):
            files = (other.best_model_path, other.last_model_path, *other.best_k_models)
            taken.update(place(path) for path in files if path)
        if trainer.ckpt_path is not None:
            taken.add(place(trainer.ckpt_path))
        if self.save_last:
            taken.add(place(self.format_checkpoint_name(names, self.CHECKPOINT_NAME_LAST)))
        versions: Iterable[int | None] = itertools.chain([None], itertools.count(self.STARTING_VERSION))
        paths = (self.format_checkpoint_name(names, ver=version) for version in versions)
        return next(
            path
            for path in paths
            if place(path) not in taken and not (self._enable_version_counter and self.file_exists(path, trainer))
        )

    def _other_checkpoints(self, trainer: pl.Trainer) -> list[ModelCheckpoint]:
        """Return the other callbacks that write checkpoints to a folder, without mocks, which lack the attributes."""
        kinds = lightning_types("callbacks.ModelCheckpoint")
        others = [c for c in trainer.checkpoint_callbacks if isinstance(c, kinds) and c is not self]
        return [c for c in others if hasattr(c, "dirpath") and hasattr(c, "best_k_models")]

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a checkpoint; if that fails on one rank, it fails on all.

        Training would not write it, so changes by hooks such as `on_save_checkpoint` are undone before it is written.
        """
        isolation = partial(TrainingIsolation().reading, trainer, trainer.lightning_module)
        with saving_together(trainer), isolated_saving(trainer, isolation):
            super()._save_checkpoint(trainer, filepath)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """With `save_on_exception`, write the present state under a separate name."""
        with patched(self, "filename", f"{self.filename or DEFAULT_FILENAME}-exception"):
            super().on_exception(trainer, pl_module, exception)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Delete a checkpoint; one that cannot be deleted stays: this does not end training."""
        try:
            super()._remove_checkpoint(trainer, filepath)
        except FileNotFoundError:
            return
        except Exception as error:  # noqa: BLE001 - a plugin of the user's raises what it likes
            warn(f"{filepath} is not needed any more, but cannot be deleted ({one_line(error)}): delete it yourself.")

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        """Return whether to delete a checkpoint: only in the callback's folder, and never the resumed one.

        Lightning compares the text of paths: `..` in a path could lead out of the folder, and a link could hide the
        resumed file. On remote filesystems it compares nothing.
        """
        resumed = trainer.ckpt_path is not None and is_same_file(previous, trainer.ckpt_path)
        return (
            not resumed
            and super()._should_remove_checkpoint(trainer, previous, current)
            and lies_in(previous, str(self.dirpath), self.FILE_EXTENSION)
        )


# Names and locations --------------------------------------------------------------------------------------------------


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


def path_now(path: str, mark: str, moves: Iterable[tuple[str, Any]]) -> str:
    """Return the path of a checkpoint file with a mark, also if its folder was moved; empty if there is none.

    A move is a folder, and what it may be now.
    """
    paths = [path]
    for old, new in moves if mark else ():
        if lies_in(path, old, ""):
            paths.append(joined(str(new), *path.removeprefix(old).strip("/\\").split("/")))
    return next((path for path in paths if is_written_as(path, mark)), "")


def _file_with_mark(path: str) -> str:
    is_sharded = not is_remote(path) and local_path(path).is_dir()
    return joined(path, SHARDED_METADATA) if is_sharded else path


def is_overwritten(path: str, mark: str) -> bool:
    """Return whether a complete checkpoint file has lost its mark: another run has written to the same path."""
    try:
        if not exists(path) or is_written_as(path, mark):
            return False
        path = _file_with_mark(path)
        with get_filesystem(path).open(path, "rb") as file:
            return is_zipfile(file)  # or else a thread is still writing it
    except FileNotFoundError:  # another rank has deleted it meanwhile
        return False


def is_written_as(path: str, mark: str) -> bool:
    """Return whether a checkpoint file exists and has its mark: another run may have written to the same path.

    True without a mark, and in formats other than PyTorch's, in which no mark can be found.
    """
    if not exists(path):
        return False
    path = _file_with_mark(path)
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
