"""What converged Ritz pairs add to one Lanczos run: trace, density and traces of layers against dense Hessians.

python -m benchmarks.one_run            # about half an hour on two quiet cores
python -m benchmarks.one_run --seeds 2 --networks MLP --out /tmp/bench
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.checks import watched
from benchmarks.distances import points, wasserstein
from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.analysis import estimation
from lightning_hesd.numerics.inputs.blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]

    from lightning_hesd import Spectrum

RESULTS = Path(__file__).parent / "results"
EXPLANATION = """\
Digits, {samples} samples, float64, one Gaussian probe, {seeds} start vectors, {steps} steps. *Plain*: every node by its
quadrature weight, as in stochastic Lanczos quadrature; *ours*: converged nodes count as one eigenvalue each, and in the
density the weight of any other node is spread over its cell (`Spectrum.distribution`). Both take the same products.
*trace*: root mean square of the relative error. *density*: Wasserstein-1 distance to all eigenvalues, as a share of the
spectrum's width, mean, before any smoothing; *best*: the same with the best weights that the nodes, as points, allow.
*layers*: median relative error of the traces of layers that hold more than 1 % of the trace. *covered*: share of start
vectors whose trace is within two standard errors; of traces of layers within two standard errors; of bounds on the
extreme eigenvalues of layers that hold; of bounds on the number of negative eigenvalues that hold. *beyond products*:
share of an analysis that layers, counts and density take.
"""
HEADER = (
    *("network", "parameters", "steps", "converged", "trace, plain", "ours", "density, plain", "ours", "best"),
    *(
        "layers, plain",
        "ours",
        "covered: trace",
        "layers",
        "bounds",
        "negative",
        "negative eigenvalues",
        "beyond products",
    ),
)


class Attention(nn.Module):
    """One layer of attention over the rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.ff = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        """Return the logits, shape (samples, 10)."""
        x = self.embed(x.view(-1, 8, 8))
        weights = (self.query(x) @ self.key(x).mT / 4).softmax(-1)
        x = self.norm(x + weights @ self.value(x))
        return self.head((x + self.ff(x)).mean(1))


class Tied(nn.Module):
    """An autoencoder with tied weights before a classifier, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mid, self.head = nn.Linear(64, 28), nn.Linear(28, 28), nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Any:
        """Return the logits, shape (samples, 10)."""
        hidden = torch.tanh(self.mid(torch.tanh(self.mid(torch.tanh(self.encode(x))))))
        return self.head(torch.tanh(self.encode(F.linear(hidden, self.encode.weight.T))))


class Adapted(nn.Module):
    """A frozen network with low-rank adapters, whose second factors start at zero, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(width, 128).requires_grad_(False) for width in (64, 128))
        self.down = nn.ModuleList([nn.Linear(64, 3, bias=False), nn.Linear(128, 2, bias=False)])
        self.up = nn.ModuleList([nn.Linear(3, 128, bias=False), nn.Linear(2, 128, bias=False)])
        self.head = nn.Linear(128, 10)
        for weight in self.up.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Any:
        """Return the logits, shape (samples, 10)."""
        x = torch.tanh(self.first(x) + self.up[0](self.down[0](x)))
        return self.head(torch.tanh(self.second(x) + self.up[1](self.down[1](x))))


def perceptron() -> nn.Module:
    """Return a network of three linear layers."""
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 10))


def convolutional() -> nn.Module:
    """Return a network of two convolutions with batch norm."""
    first = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MLP": (perceptron, 20),
    "CNN with batch norm": (convolutional, 8),
    "attention": (Attention, 20),
    "tied weights": (Tied, 20),
    "adapters (LoRA)": (Adapted, 20),
}
"""Network and epochs of training, by name."""


@dataclass
class Problem:
    """A trained network, its batch, and its dense Hessian.

    Attributes:
        net: The network, float64, in evaluation mode.
        batch: The samples.
        hessian: The Hessian, shape (n, n).
        layers: Positions of each layer's parameters in the Hessian, by name.
    """

    net: nn.Module
    batch: tuple[Tensor, Tensor]
    hessian: Array
    layers: dict[str, Array]


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(module(batch[0]), batch[1])


def load(name: str, samples: int) -> Problem:
    """Train a network, and compute its Hessian row by row."""
    make, epochs = NETWORKS[name]
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    torch.manual_seed(0)
    net = make().double()
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), 3e-3)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(1500), 50):
            optimizer.zero_grad()
            loss: Any = loss_fn(net, (x[chosen], y[chosen]))
            loss.backward()
            optimizer.step()
    net.eval()
    batch = (x[:samples], y[:samples])
    gradient = torch.autograd.grad(loss_fn(net, batch), [*trained.values()], create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = []
    for element in flat:
        row = torch.autograd.grad(element, [*trained.values()], retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    ends = np.cumsum([p.numel() for p in trained.values()])
    places = {p: np.arange(end - p.numel(), end) for p, end in zip(trained.values(), ends, strict=True)}
    layers = {key: np.concatenate([places[p] for p in own]) for key, own in blocks(net, "auto", trained).items()}
    hessian = torch.stack(rows).numpy()
    return Problem(net, batch, (hessian + hessian.T) / 2, layers)


def best_weights(nodes: Array, eigenvalues: Array) -> Array:
    """Return the share of eigenvalues that are nearest to each node."""
    nearest = np.abs(eigenvalues[:, None] - nodes).argmin(axis=1)
    return np.bincount(nearest, minlength=len(nodes)) / len(eigenvalues)


def plain_layer_traces(problem: Problem, spectrum: Spectrum, seed: int) -> dict[str, float]:
    """Return Hutchinson's estimates from the start vector of an analysis, without deflation."""
    vector = torch.randn(spectrum.dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    vector *= math.sqrt(spectrum.dimension) / np.linalg.norm(vector)
    product = problem.hessian @ vector
    return {name: float(vector[at] @ product[at]) for name, at in problem.layers.items()}


def measure(name: str, steps: int, seeds: int, problem: Problem) -> list[str]:
    """Return the row of a network."""
    eigenvalues = np.linalg.eigvalsh(problem.hessian)
    trace, n = float(eigenvalues.sum()), len(eigenvalues)
    parts = {key: problem.hessian[np.ix_(at, at)] for key, at in problem.layers.items()}
    extremes = {key: np.linalg.eigvalsh(part)[[0, -1]] for key, part in parts.items()}
    large = [key for key, part in parts.items() if abs(np.trace(part)) > 0.01 * abs(trace)]
    found: dict[str, list[Any]] = {}

    def note(key: str, *values: Any) -> None:
        found.setdefault(key, []).extend(values)

    for seed in range(seeds):
        with watched(estimation, "layers_of_runs") as layers:
            spectrum = hessian_spectrum(problem.net, [problem.batch], loss_fn, steps=steps, seed=seed)
        started = time.perf_counter()
        low, high = spectrum.negative_count
        found_trace, trace_error = spectrum.trace, spectrum.trace_error
        note("beyond", (layers.seconds + time.perf_counter() - started) / spectrum.seconds)
        [nodes], [weights] = spectrum.nodes, spectrum.weights
        note("converged", int(spectrum.converged_nodes.sum()))
        note("plain", n * float(weights @ nodes) / trace - 1)
        note("trace", found_trace / trace - 1)
        note("covered", abs(found_trace - trace) <= 2 * trace_error)
        for key, estimate in (
            ("plain density", points(nodes, weights)),
            ("density", spectrum.distribution),
            ("best", points(nodes, best_weights(nodes, eigenvalues))),
        ):
            note(key, wasserstein(estimate, eigenvalues) / np.ptp(eigenvalues))
        plain = plain_layer_traces(problem, spectrum, seed)
        for layer, curvature in spectrum.by_layer.items():
            true = float(np.trace(parts[layer]))
            note("layers covered", abs(curvature.trace - true) <= 2 * curvature.trace_error)
            pairs = zip((curvature.lambda_min_bounds, curvature.lambda_max_bounds), extremes[layer], strict=True)
            note("bounds hold", all(low <= value <= high for (low, high), value in pairs))
            if layer in large:
                note("layers", abs(curvature.trace / true - 1))
                note("plain layers", abs(plain[layer] / true - 1))
        negative = int((eigenvalues < -spectrum.rounding).sum())
        note("negative", low <= negative <= high)
        note("counts", (low, negative, high))

    def root_mean_square(key: str) -> str:
        return f"{math.sqrt(statistics.fmean(value**2 for value in found[key])):.3f}"

    def mean(key: str, form: str) -> str:
        return format(statistics.fmean(found[key]), form)

    low, negative, high = (int(value) for value in np.median(found["counts"], axis=0))
    return [
        *(name, f"{n:,}", str(steps), mean("converged", ".0f"), root_mean_square("plain"), root_mean_square("trace")),
        *(mean("plain density", ".1e"), mean("density", ".1e"), mean("best", ".1e")),
        *(f"{statistics.median(found['plain layers']):.2f}", f"{statistics.median(found['layers']):.3f}"),
        *(mean("covered", ".0%"), mean("layers covered", ".0%"), mean("bounds hold", ".0%"), mean("negative", ".0%")),
        *(f"{low} to {high}, in truth {negative}", f"{statistics.median(found['beyond']):.1%}"),
    ]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", nargs="+", type=int, default=[60, 100])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.networks:
        problem = load(name, given.samples)
        for steps in given.steps:
            rows.append(measure(name, steps, given.seeds, problem))
            print(" | ".join(rows[-1]), flush=True)
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
    text = EXPLANATION.format(samples=given.samples, seeds=given.seeds, steps=" or ".join(map(str, given.steps)))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "one_run.md").write_text("\n".join(["# From one run", "", text, *lines, ""]))


if __name__ == "__main__":
    main()
