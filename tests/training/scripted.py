"""A Trainer whose analyses are scripted, so that selection can be tested on any history, with real files."""

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianCheckpoint, Spectrum
from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
from lightning_hesd.training.source import SpectrumSource
from tests.training.modules import QUIET


def make_spectrum(c_t: float, *, lambda_max: float = 1.0, loss: float = 0.5) -> Spectrum:
    """A spectrum of two exact nodes with the given C_t; NaN gives one without curvature."""
    undefined = math.isnan(c_t)
    return Spectrum(
        verified="yes",
        nodes=np.zeros((1, 2)) if undefined else np.array([[c_t * lambda_max, lambda_max]]),
        weights=np.array([[0.5, 0.5]]),
        residuals=np.zeros((1, 2)),
        steps_per_probe=(2,),
        dimension=2,
        num_samples=8,
        loss=loss,
        rounding=1e-12,
        matvecs=2,
        seconds=0.1,
        reason="no curvature" if undefined else None,
    )


@dataclass(frozen=True)
class Epoch:
    """What one epoch of the script brings: no `c_t` means no analysis, a NaN one an undefined C_t.

    With `scatter`, C_t differs by as much between four resamples of the samples: between the first two in even epochs,
    between the others in odd ones, so that the errors of an even and an odd epoch are independent.
    """

    c_t: float | None
    lambda_max: float = 1.0
    loss: float = 0.5
    accuracy: float = 0.5
    error: bool = False
    scatter: float = 0.0

    def spectrum(self, number: int) -> Spectrum:
        """The spectrum after this epoch."""
        assert self.c_t is not None
        spectrum = make_spectrum(self.c_t, lambda_max=self.lambda_max, loss=self.loss)
        if not self.scatter:
            return spectrum
        pattern = np.roll([1.0, -1.0, 0.0, 0.0], 2 * (number % 2))
        lowest = self.lambda_max * (self.c_t + self.scatter * pattern)
        extremes = np.array([lowest, np.full(4, self.lambda_max)])
        return replace(spectrum, group_curvatures=np.full((3, 4), 0.25), resampled_extremes=extremes)


class ScriptedSource(SpectrumSource):
    """Stands in for HessianSpectrumCallback: its records come from a script."""

    def __init__(self, script: list[Epoch], name: str = "hesd", on_error: Any = "warn") -> None:
        super().__init__(name, on_error)
        self.script = script
        self.forgets = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = self.script[trainer.current_epoch]
        if epoch.error:
            self.history.append(SpectrumRecord(trainer.current_epoch, trainer.global_step, None, "failed"))
        elif epoch.c_t is not None:
            spectrum = epoch.spectrum(trainer.current_epoch)
            self.history.append(SpectrumRecord(trainer.current_epoch, trainer.global_step, spectrum))

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.forgets:
            self.history.load_state_dict(state_dict["history"])


class ScriptedModule(pl.LightningModule):
    """One weight that counts steps, so that every epoch's checkpoint differs; logs the script's accuracy."""

    def __init__(self, script: list[Epoch]) -> None:
        super().__init__()
        self.script = script
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.weight

    def on_train_epoch_end(self) -> None:
        self.log("train_acc", self.script[self.current_epoch].accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(2, 1)), batch_size=1)


STEPS_PER_EPOCH = 2


def make_trainer(tmp_path: Path, callbacks: list[pl.Callback], epochs: int, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(default_root_dir=tmp_path, max_epochs=epochs, callbacks=callbacks, **{**QUIET, **kwargs})


def run_script(
    tmp_path: Path, script: list[Epoch], callbacks: list[pl.Callback], *, quiet: bool = True, **kwargs: Any
) -> pl.Trainer:
    """Train through the script; with `quiet` the package's own warnings are expected and ignored."""
    trainer = make_trainer(tmp_path, callbacks, len(script), **kwargs)
    with warnings.catch_warnings():
        if quiet:
            warnings.filterwarnings("ignore", message="lightning_hesd: ")
        trainer.fit(ScriptedModule(script), loader())
    return trainer


def epoch_of(path: str) -> int:
    """The epoch whose final weights a checkpoint holds, by the weights themselves and not by its name."""
    steps = torch.load(path, weights_only=True)["state_dict"]["weight"].item()
    return round(steps / STEPS_PER_EPOCH) - 1


def earliest(record: Any) -> float:
    return -float(record.epoch)


def keeping(rule: Any = earliest, **arguments: Any) -> HessianCheckpoint:
    """A rule by which every state stays a candidate, and the earliest one is the pick."""
    return HessianCheckpoint(rule, **{"require_mp": False, "tolerance": 99.0, **arguments})


def history(*records: SpectrumRecord) -> SpectrumHistory:
    found = SpectrumHistory()
    found.extend(records)
    return found


def example() -> SpectrumHistory:
    failed = SpectrumRecord(0, 10, None, "RuntimeError: no luck")
    return history(SpectrumRecord(-1, 0, make_spectrum(-0.9)), failed, SpectrumRecord(1, 20, make_spectrum(-0.2)))
