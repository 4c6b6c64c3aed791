"""Settings of the study: a sweep over widths and one over depths, on two kinds of inputs, from several seeds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

PIXELS, FEATURES = INPUTS = ("pixels", "features")
TRAINED, INITIAL = STATES = ("trained", "initial")
WIDTH, DEPTH = SWEEPS = ("width", "depth")


@dataclass(frozen=True)
class Setup:
    """Settings that all runs share.

    Attributes:
        epochs: Epochs of every training; 54 of the digits are as many steps as ten epochs of 10,000 images.
        batch_size: Samples per step; from the paper.
        learning_rate: Constant learning rate of Adam.
        orders: Random orders of the samples; from the paper.
        steps: Lanczos steps for the largest eigenvalues.
        radii: Distances from the trained weights, in units of their norm.
        directions: Number of random directions for each distance.
        extractor_epochs: Epochs of the training of the feature extractor.
    """

    epochs: int = 54
    batch_size: int = 64
    learning_rate: float = 1e-3
    orders: int = 100
    steps: int = 24
    radii: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3)
    directions: int = 2
    extractor_epochs: int = 10


@dataclass(frozen=True)
class Run:
    """One network; the seed determines initialization, batches, random orders and directions."""

    inputs: str
    width: int
    depth: int
    seed: int
    setup: Setup

    @property
    def file(self) -> str:
        """Name of the file of the outcome; it identifies the settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.inputs}-w{self.width}-d{self.depth}-s{self.seed}-{digest}.npz"


@dataclass(frozen=True)
class Study:
    """The runs of the study.

    `width` and `depth` are the fixed values while the other is swept. A width of 16 is the paper's; our copy of the
    paper lacks the number of layers. The depth is the number of hidden layers, one less than the number of weight
    matrices.
    """

    widths: tuple[int, ...] = (4, 8, 16, 32, 64)
    depths: tuple[int, ...] = tuple(range(1, 11))
    width: int = 16
    depth: int = 2
    seeds: int = 10
    setup: Setup = field(default_factory=Setup)

    def sizes(self, sweep: str) -> tuple[int, ...]:
        """Return the widths or depths of a sweep."""
        return self.widths if sweep == WIDTH else self.depths

    def configurations(self, sweep: str) -> list[tuple[int, int]]:
        """Return width and depth of the networks of a sweep."""
        return [(w, self.depth) for w in self.widths] if sweep == WIDTH else [(self.width, d) for d in self.depths]

    def runs(self) -> list[Run]:
        """Return all runs; those in both sweeps appear once."""
        every = dict.fromkeys(pair for sweep in SWEEPS for pair in self.configurations(sweep))
        every[self.width, self.depth] = None  # of the figures that show a single network
        seeds = range(self.seeds)
        return [Run(inputs, *pair, seed, self.setup) for seed in seeds for inputs in INPUTS for pair in every]


QUICK = Study(widths=(4, 64), depths=(1, 4), seeds=3, setup=Setup(epochs=12, orders=20, steps=12, extractor_epochs=1))
