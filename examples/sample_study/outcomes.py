"""The outcome of a run, in one file; and the outcomes of a study, selected by their settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from examples.sample_study.settings import STATES, Run
from lightning_hesd.sample_size.loss_differences import LossDifferences, differences_of
from lightning_hesd.spectra.files import read_archive, save_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from examples.sample_study.settings import Study

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Numbers:
    """A network at one set of weights.

    Attributes:
        accuracy: Share of correctly classified samples.
        ggn: ‖G‖ of the mean loss.
        hessian: ‖H‖ of the mean loss.
        weight_norm: M_W, largest spectral norm of a weight matrix.
        largest_entry: M, largest absolute value of a weight.
        published: Theorem 1's bound on ‖G‖.
        tight_ggn: A bound on ‖G‖ that always holds.
        tight_hessian: A bound on ‖H‖ that always holds.
    """

    accuracy: float
    ggn: float
    hessian: float
    weight_norm: float
    largest_entry: float
    published: float
    tight_ggn: float
    tight_hessian: float


class Displaced(NamedTuple):
    """How the loss settles at some distance from the trained weights.

    `relative` is the distance in units of the norm of the weights, `radius` the distance R itself, and `largest` the
    maximum over k of (k + 1)/2 times the mean difference, which Lemma 2 bounds by M_ℓ + B R².
    """

    relative: float
    radius: float
    constant: float
    largest: float


@dataclass(frozen=True, eq=False)
class State:
    """Numbers and per-sample losses of a network; for a trained one, also the results at several distances."""

    run: Run
    numbers: Numbers
    losses: Array
    displaced: tuple[Displaced, ...]

    @cached_property
    def settling(self) -> LossDifferences:
        """|L_{k+1} - L_k|."""
        return differences_of(self.losses, orders=self.run.setup.orders, seed=self.run.seed)

    @property
    def mean_loss(self) -> float:
        return float(self.losses.mean())

    def constant_at(self, relative: float) -> float:
        """Return log c at a distance, averaged over directions."""
        return float(np.mean([math.log(d.constant) for d in self.displaced if d.relative == relative]))

    def margins(self, bound: float) -> list[tuple[float, float]]:
        """Return relative distances, and the factors by which Lemma 2 with this bound on the Hessian is too large."""
        worst = float(self.losses.max())
        return [(d.relative, (worst + bound * d.radius**2) / d.largest) for d in self.displaced if d.largest > 0]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """All runs of a study."""

    study: Study
    states: Mapping[str, Mapping[Run, State]]
    seconds: float

    def find(self, inputs: str, state: str, width: int, depth: int) -> list[State]:
        """Return one configuration from all seeds."""
        seeds = range(self.study.seeds)
        return [self.states[state][Run(inputs, width, depth, seed, self.study.setup)] for seed in seeds]

    def values(self, inputs: str, state: str, sweep: str, quantity: Callable[[State], float]) -> Array:
        """Return a quantity over a sweep, shape (seeds, sizes)."""
        pairs = self.study.configurations(sweep)
        return np.stack([[quantity(s) for s in self.find(inputs, state, *pair)] for pair in pairs], axis=1)

    def of_seed(self, inputs: str, state: str, seed: int) -> list[State]:
        """Return all networks of a seed."""
        return [s for run, s in self.states[state].items() if (run.inputs, run.seed) == (inputs, seed)]


def save(
    run: Run,
    out: Path,
    *,
    numbers: Mapping[str, Numbers],
    displaced: Iterable[Displaced],
    losses: Mapping[str, Array],
    seconds: float,
) -> None:
    """Write the outcome of a run in one atomic step."""
    header = {
        "numbers": {state: asdict(found) for state, found in numbers.items()},
        "displaced": list(displaced),
        "seconds": seconds,
    }
    save_archive(out / run.file, header, losses)


def read(study: Study, out: Path) -> Outcomes:
    """Return the outcomes of all runs, which must be finished."""
    states: dict[str, dict[Run, State]] = {state: {} for state in STATES}
    seconds = 0.0
    for run in study.runs():
        header, arrays = read_archive(out / run.file, "the outcome of a run")
        seconds += header["seconds"]
        for state in STATES:
            moved = tuple(Displaced(*d) for d in header["displaced"]) if state == STATES[0] else ()
            numbers = Numbers(**header["numbers"][state])
            states[state][run] = State(run, numbers, arrays[state], moved)
    return Outcomes(study, states, seconds)
