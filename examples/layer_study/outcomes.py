"""The outcome of a run: its numbers and spectra, in one folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from examples.layer_study.indicators import indicators
from lightning_hesd import SpectrumHistory
from lightning_hesd.spectra.files import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

    from examples.layer_study.settings import Run

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Numbers:
    """The numbers of a run.

    Attributes:
        train_loss: Mean loss of the trained network over the training samples.
        test_loss: The same over the test samples.
        train_score: Accuracy or R² on the training samples.
        test_score: The same on the test samples.
        constant_loss: Training loss of the best constant prediction.
        shuffled_loss: Training loss of the same network, trained in the same way on shuffled targets.
        parameters: Number of parameters.
        train_size: Number of training samples.
        test_size: Number of test samples.
        features: Number of inputs.
        seconds: Duration.
    """

    train_loss: float
    test_loss: float
    train_score: float
    test_score: float
    constant_loss: float
    shuffled_loss: float
    parameters: int
    train_size: int
    test_size: int
    features: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A finished run: its settings, its numbers and the indicators by name."""

    run: Run
    numbers: Numbers
    indicators: dict[str, float]


def is_done(folder: Path) -> bool:
    """Whether a run has been finished."""
    return (folder / OUTCOME).is_file()


def write(run: Run, folder: Path, numbers: Numbers) -> None:
    """Write the numbers, after the callback has written the spectra: then the run is done."""
    with atomic_write(folder / OUTCOME) as partial:
        partial.write_text(json.dumps({"run": asdict(run), "numbers": asdict(numbers)}, indent=1), encoding="utf-8")


def read(run: Run, out: Path) -> Outcome:
    """Return the outcome of a finished run."""
    folder = out / run.folder
    values = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    return Outcome(run, Numbers(**values["numbers"]), indicators(*SpectrumHistory.load(folder)))
