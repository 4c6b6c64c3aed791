"""The outcome of a training: accuracies and spectra of its analyzed epochs, in one folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_hesd import SpectrumHistory
from lightning_hesd.spectra.files import atomic_write
from lightning_hesd.spectra.record import START_EPOCH

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from examples.paper_hesd.settings import Experiment
    from lightning_hesd import Spectrum
    from lightning_hesd.training.history import SpectrumRecord

OUTCOME, WEIGHTS = "outcome.json", "weights.pt"
TOLERANCE = 0.01
"""Largest distance of a candidate's training accuracy from the best, as for HessianCheckpoint."""

TRAINED = 0.84
"""Minimum training accuracy of a trained network: that of the least trained network in the paper's tables."""


@dataclass(frozen=True)
class Row:
    """Numbers of one analyzed epoch."""

    epoch: int
    train_acc: float
    val_acc: float
    gen_acc: float
    squared_norm: float
    gradients: dict[str, float]


@dataclass(frozen=True)
class Point(Row):
    """One analyzed epoch: its numbers and its spectra."""

    record: SpectrumRecord

    @property
    def spectrum(self) -> Spectrum:
        """The spectrum on the training data."""
        assert self.record.spectrum is not None
        return self.record.spectrum


@dataclass(frozen=True)
class Outcome:
    """The outcome of one experiment."""

    experiment: Experiment
    folder: Path
    rows: tuple[Row, ...]
    parameters: int
    distinct: int
    seconds: float

    @cached_property
    def history(self) -> SpectrumHistory:
        """The records of the callback."""
        return SpectrumHistory.load(self.folder)

    def other(self, name: str) -> SpectrumRecord:
        """Return the last record of another callback."""
        return SpectrumHistory.load(self.folder, name)[-1]

    @property
    def start(self) -> Spectrum | None:
        """The spectrum of the random initialization."""
        return next((record.spectrum for record in self.history if record.epoch == START_EPOCH), None)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The analyzed epochs whose C_t is defined."""
        records = {r.epoch: r for r in self.history if r.spectrum is not None and not math.isnan(r.spectrum.c_t)}
        return tuple(Point(**vars(row), record=records[row.epoch]) for row in self.rows if row.epoch in records)

    @property
    def last(self) -> Point:
        """The last analyzed epoch."""
        return self.points[-1]

    @property
    def trained(self) -> list[Point]:
        """The epochs at which the network is trained."""
        return [point for point in self.points if point.train_acc >= TRAINED]

    @property
    def candidates(self) -> list[Point]:
        """The epochs whose training accuracy is close to the best."""
        best = max(point.train_acc for point in self.points)
        return [point for point in self.points if best - point.train_acc <= TOLERANCE]

    @property
    def errors(self) -> list[str]:
        """Errors of failed analyses."""
        return [f"epoch {record.epoch}: {record.error}" for record in self.history if record.error]


def is_done(folder: Path) -> bool:
    """Whether an experiment has been finished."""
    return (folder / OUTCOME).is_file()


def write(experiment: Experiment, folder: Path, seconds: float, **found: object) -> None:
    """Write the other results, after the callback has written the spectra: then the experiment is done."""
    values = {"experiment": asdict(experiment), "seconds": seconds, **found}
    with atomic_write(folder / OUTCOME) as partial:
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read(experiments: Iterable[Experiment], out: Path) -> dict[str, Outcome]:
    """Return the outcomes of finished experiments that have a spectrum, by name."""
    outcomes = {}
    for experiment in experiments:
        folder = out / experiment.folder
        if is_done(folder):
            values = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
            rows = tuple(Row(**row) for row in values["rows"])
            outcome = Outcome(experiment, folder, rows, values["parameters"], values["distinct"], values["seconds"])
            if outcome.points:
                outcomes[experiment.name] = outcome
    return outcomes
