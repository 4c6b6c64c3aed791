"""Settings of the study: every data set with every size of network and every seed."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field

from examples.layer_study.data import NAMES


@dataclass(frozen=True)
class Setup:
    """Settings that all runs share.

    Attributes:
        epochs: Epochs of every training, an even number: the Hessians are analyzed half-way and at the end.
        train_size: Training samples at most; never more than half of the data. Few, so that networks can overfit.
        batch_size: Training samples per step.
        learning_rate: Learning rate of Adam, without weight decay.
        steps: Lanczos steps of every spectrum.
        probes: Start vectors of every spectrum: shares and ranks are means over them.
    """

    epochs: int = 80
    train_size: int = 200
    batch_size: int = 40
    learning_rate: float = 0.01
    steps: int = 30
    probes: int = 4


@dataclass(frozen=True)
class Run:
    """One network on one data set; the seed determines split, initialization and order of samples."""

    dataset: str
    width: int
    depth: int
    seed: int
    setup: Setup

    @property
    def folder(self) -> str:
        """Name of the folder of the outcome; it identifies the settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.dataset}-w{self.width}-d{self.depth}-s{self.seed}-{digest}"


@dataclass(frozen=True)
class Study:
    """All combinations of data sets, seeds and configurations.

    A configuration is a width and a depth. The statistics resample configurations, hence many of them and few seeds.
    """

    datasets: tuple[str, ...] = NAMES
    widths: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    depths: tuple[int, ...] = (1, 2, 4)
    seeds: int = 3
    setup: Setup = field(default_factory=Setup)

    @property
    def configurations(self) -> list[tuple[int, int]]:
        """Width and depth of each configuration."""
        return list(itertools.product(self.widths, self.depths))

    def runs(self) -> list[Run]:
        """Return the runs: by data set, then seed, then configuration, as the axes of all arrays."""
        return [
            Run(dataset, width, depth, seed, self.setup)
            for dataset in self.datasets
            for seed in range(self.seeds)
            for width, depth in self.configurations
        ]


QUICK = Study(datasets=("wine", "moons", "diabetes"), widths=(2, 8, 32), depths=(1, 2), seeds=2)
