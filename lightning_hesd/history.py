"""The records of a run: in memory, on disk and inside checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback

from lightning_hesd.assessment import assess_generalization
from lightning_hesd.files import written_whole
from lightning_hesd.spectrum import Spectrum, load_layers, save_layers

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint

    from lightning_hesd.assessment import Assessment
    from lightning_hesd.selection import Choice

INDEX_NAME = "index.json"
INDEX_FORMAT = 1
SUFFIXES = {
    "spectrum": "",
    "generalization": "_gen",
    "preconditioned": "_pre",
    "ggn": "_ggn",
    "residual": "_residual",
}
"""What distinguishes the spectra of a record in the names of files and metrics."""

PLAIN_FIELDS = ("epoch", "global_step", "error", "stability_threshold")
"""The fields of a record that are plain values."""

LAYERS_SUFFIX = "_layers"

LATER_FIELDS = ("ggn", "residual", "layers")
"""What the first histories did not have."""

START_EPOCH = -1
"""Epoch of the record made before the first optimizer step."""

OnError = Literal["warn", "raise"]


@dataclass(frozen=True)
class SpectrumRecord:
    """One analysis of a run.

    Attributes:
        epoch: Epoch it was made in, as `trainer.current_epoch`; -1 before the first step.
        global_step: Optimizer steps taken by then.
        spectrum: The spectrum on the training data; None if the analysis failed.
        error: What failed, and why; None if nothing did.
        generalization: The spectrum on the generalization data; None where none is analysed.
        layers: The spectra of single layers, by name; None where none are analysed.
        preconditioned: The spectrum on the training data through the optimizer's eyes; None where it is not analysed.
        stability_threshold: Up to which largest eigenvalue of that the optimizer's steps are stable; None: unknown.
        ggn: The spectrum of the Gauss-Newton matrix; None where it is not analysed.
        residual: The spectrum of the rest of the Hessian; None where it is not analysed.
    """

    epoch: int
    global_step: int
    spectrum: Spectrum | None
    error: str | None = None
    generalization: Spectrum | None = None
    layers: Mapping[str, Spectrum] | None = None
    preconditioned: Spectrum | None = None
    stability_threshold: float | None = None
    ggn: Spectrum | None = None
    residual: Spectrum | None = None

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """The spectra there are, by what distinguishes them in the names of files and metrics: see `SUFFIXES`."""
        every = {suffix: getattr(self, field) for field, suffix in SUFFIXES.items()}
        return {suffix: spectrum for suffix, spectrum in every.items() if spectrum is not None}

    @property
    def stability_ratio(self) -> float | None:
        """Largest preconditioned eigenvalue over the optimizer's threshold: 1 is the edge of stability."""
        if self.preconditioned is None or self.stability_threshold is None:
            return None
        return self.preconditioned.lambda_max / self.stability_threshold

    @cached_property
    def assessment(self) -> Assessment | None:
        """What the two spectra say about generalization; None where there are no two."""
        if self.spectrum is None or self.generalization is None:
            return None
        return assess_generalization(self.spectrum, self.generalization)

    def file_name(self, suffix: str = "") -> str:
        """Return the name of a spectrum's file in the history's folder."""
        return f"epoch={self.epoch}-step={self.global_step}{suffix}.npz"


def when(epoch: int) -> str:
    """Return in words when the record of an epoch was made."""
    return "before the first step" if epoch == START_EPOCH else f"of epoch {epoch}"


class SpectrumHistory(list[SpectrumRecord]):
    """The records of a run in the order they were made."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: set[Path] = set()

    def rewind(self, global_step: int) -> None:
        """Forget what lies ahead of `global_step`, everything at step 0: a run starts, or goes on, from there."""
        self[:] = [record for record in self if global_step > 0 and record.global_step <= global_step]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the spectra not yet written to `folder`, and the index of all records.

        Every file appears whole or not at all, the index last.
        """
        directory = Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        for record in self:
            for suffix, spectrum in record.spectra.items():
                path = directory / record.file_name(suffix)
                self._save_once(path, spectrum.save)
            if record.layers:
                self._save_once(directory / record.file_name(LAYERS_SUFFIX), partial(save_layers, record.layers))
        rows = [
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
        with written_whole(directory / INDEX_NAME) as incomplete:
            incomplete.write_text(json.dumps({"format": INDEX_FORMAT, "records": rows}, indent=1), encoding="utf-8")

    def _save_once(self, path: Path, save: Callable[[Path], None]) -> None:
        if path not in self._saved:
            save(path)
            self._saved.add(path)

    @classmethod
    def load(cls, log_dir: str | os.PathLike[str], name: str = "hesd") -> SpectrumHistory:
        """Read the history of a run back.

        Args:
            log_dir: The run's log directory, or the folder of the history in it.
            name: The callback's `name`, which is also that of the folder.

        Raises:
            FileNotFoundError: If there is no history.
            ValueError: If its index is damaged, or was written by a newer version.
        """
        folders = [Path(log_dir) / name, Path(log_dir)]
        directory = next((folder for folder in folders if (folder / INDEX_NAME).is_file()), None)
        if directory is None:
            msg = f"no {INDEX_NAME} in {folders[0]} or {folders[1]}: pass the log directory of a run with the callback."
            raise FileNotFoundError(msg)
        path = directory / INDEX_NAME
        history = cls()
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            version, rows = index["format"], index["records"]
            for row in map(_completed, rows if version == INDEX_FORMAT else ()):
                # The names only: an index must not point outside its own folder.
                paths = {f: row[f] and directory / Path(row[f]).name for f in (*SUFFIXES, "layers")}
                layers = paths.pop("layers")
                spectra = {f: path and Spectrum.load(path) for f, path in paths.items()}
                history.append(_record(row, spectra, layers and load_layers(layers)))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            msg = f"{path} is not the index of a spectrum history, or is damaged ({error!r})."
            raise ValueError(msg) from error
        if version != INDEX_FORMAT:
            msg = f"{path} has format {version}, this version reads {INDEX_FORMAT}: update lightning_hesd."
            raise ValueError(msg)
        return history

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the records as tensors and plain values: Lightning loads nothing else from a checkpoint."""
        return [_state(record) for record in self]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Replace the records by those of `state_dict`."""
        self[:] = [
            _record(
                row,
                {field: _spectrum(row[field]) for field in SUFFIXES},
                row["layers"] and {name: _spectrum(values) for name, values in row["layers"].items()},
            )
            for row in map(_completed, state)
        ]


class SpectrumSource(Callback):
    """A callback that fills a history: what `HessianCheckpoint` looks for among the callbacks of a Trainer.

    Attributes:
        name: Prefix of its metrics.
        history: Its records so far.
        on_error: What it does about errors.
        checkpoint: The checkpoint callback it brings along, if any.
    """

    name: str
    history: SpectrumHistory
    on_error: OnError
    checkpoint: Checkpoint | None = None

    def take_note(self, trainer: pl.Trainer, choice: Choice) -> None:
        """Hear from a HessianCheckpoint what it makes of the latest record."""


def _completed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(LATER_FIELDS), **row}


def _plain(record: SpectrumRecord) -> dict[str, Any]:
    return {field: getattr(record, field) for field in PLAIN_FIELDS}


def _state(record: SpectrumRecord) -> dict[str, Any]:
    spectra: dict[str, Any] = {field: _tensors(getattr(record, field)) for field in SUFFIXES}
    layers: Any = record.layers and {name: _tensors(spectrum) for name, spectrum in record.layers.items()}
    return {**_plain(record), **spectra, "layers": layers}


def _record(row: Mapping[str, Any], spectra: Mapping[str, Any], layers: Any) -> SpectrumRecord:
    return SpectrumRecord(**{field: row[field] for field in PLAIN_FIELDS}, **spectra, layers=layers)


def _tensors(spectrum: Spectrum | None) -> dict[str, Any] | None:
    if spectrum is None:
        return None
    values = spectrum.to_dict()
    return {key: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for key, v in values.items()}


def _spectrum(values: dict[str, Any] | None) -> Any:
    if values is None:
        return None
    arrays: dict[str, Any] = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return Spectrum(**arrays)
