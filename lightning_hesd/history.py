"""The records of a run: in memory, on disk and inside checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback

from lightning_hesd.spectrum import Spectrum

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from lightning.pytorch.callbacks import Checkpoint

INDEX_NAME = "index.json"
INDEX_FORMAT = 1
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
        error: Why it failed; None if it did not.
        generalization: The spectrum on the generalization data; None where none is analysed.
        layers: The spectra of single layers; None where none are analysed.
    """

    epoch: int
    global_step: int
    spectrum: Spectrum | None
    error: str | None = None
    generalization: Spectrum | None = None
    layers: Mapping[str, Spectrum] | None = None

    @property
    def file_name(self) -> str:
        """Name of the spectrum's file in the history's folder."""
        return f"epoch={self.epoch}-step={self.global_step}.npz"


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
            path = directory / record.file_name
            if record.spectrum is not None and path not in self._saved:
                record.spectrum.save(path)
                self._saved.add(path)
        rows = [
            {
                "epoch": record.epoch,
                "global_step": record.global_step,
                "spectrum": None if record.spectrum is None else record.file_name,
                "error": record.error,
            }
            for record in self
        ]
        partial = directory / f"{INDEX_NAME}.partial"
        partial.write_text(json.dumps({"format": INDEX_FORMAT, "records": rows}, indent=1), encoding="utf-8")
        partial.replace(directory / INDEX_NAME)

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
            for row in rows if version == INDEX_FORMAT else ():
                # The name only: an index must not point outside its own folder.
                spectrum = row["spectrum"] and Spectrum.load(directory / Path(row["spectrum"]).name)
                history.append(SpectrumRecord(row["epoch"], row["global_step"], spectrum, row["error"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            msg = f"{path} is not the index of a spectrum history, or is damaged ({error!r})."
            raise ValueError(msg) from error
        if version != INDEX_FORMAT:
            msg = f"{path} has format {version}, this version reads {INDEX_FORMAT}: update lightning_hesd."
            raise ValueError(msg)
        return history

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the records as tensors and plain values: Lightning loads nothing else from a checkpoint."""
        return [
            {
                "epoch": record.epoch,
                "global_step": record.global_step,
                "spectrum": record.spectrum and _tensors(record.spectrum.to_dict()),
                "error": record.error,
            }
            for record in self
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Replace the records by those of `state_dict`."""
        self[:] = [
            SpectrumRecord(
                row["epoch"], row["global_step"], row["spectrum"] and Spectrum(**_arrays(row["spectrum"])), row["error"]
            )
            for row in state
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


def _tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for key, v in values.items()}


def _arrays(values: dict[str, Any]) -> dict[str, Any]:
    return {key: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for key, v in values.items()}
