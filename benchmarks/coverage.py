"""How often bounds and errors from a Lanczos run hold, over spectra that make it hard, and how wide they are.

python -m benchmarks.coverage            # about a quarter of an hour on a quiet core
python -m benchmarks.coverage --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from benchmarks.distances import wasserstein
from lightning_hesd import Spectrum
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature, tridiagonal_eigh
from lightning_hesd.spectra.criteria import rounding_threshold
from lightning_hesd.spectra.layer_curvature import RitzPairs, layer_curvatures
from lightning_hesd.spectra.quadrature import stack_rules

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

DIMENSION = 400
LAYERS = (130, 20, 190, 40, 15, 5)
THRESHOLDS = (0.3, 0.1, 0.03, 0.01, 0.003, 1e-4)

EXPLANATION = """\
Matrices of {dimension} dimensions with random eigenvectors, {steps} Lanczos steps from one vector, {seeds} start
vectors each, confidence 95 %. Percentages say how often a statement holds:

- counts: the number of eigenvalues beyond a threshold, over {thresholds} thresholds from 0.3 to 0.0001 of the spectral
  norm on both sides of zero; then the median width of the interval, in eigenvalues
- band: all of the cumulative distribution; then its mean height over the spectrum's width
- density: the Wasserstein-1 distance of the density from the spectrum is at most `density_error`; then medians of both,
  in widths of the spectrum
- trace: within one and within two standard errors (68 % and 95 % for a normal distribution); then the median error, in
  sums of the eigenvalues' absolute values
- layers: traces of {layers} layers of {smallest} to {largest} parameters within two standard errors
- Weyl: the largest and the smallest eigenvalue of each layer; then the median width for the largest, in spectral norms

Eigenvalues that are equal, or that differ by less than the run resolves, break the assumption of simple eigenvalues.
"""
HEADER = ("spectrum", "converged", "counts", "width", "band", "height", "density", "distance, bound", "trace 1",
          "trace 2", "error", "layers", "Weyl", "width")  # fmt: skip


class Case(NamedTuple):
    """A spectrum, and how it is analyzed."""

    eigenvalues: Array
    dtype: torch.dtype = torch.float64
    probes: int = 1


def cases(n: int = DIMENSION) -> dict[str, Case]:
    """Return the spectra, by name."""
    rng = np.random.default_rng(0)
    rank = np.arange(1, n + 1)
    bulk = rng.standard_normal(n)
    outliers = np.concatenate([np.geomspace(10, 1, 12), 0.02 * bulk[:-12]])
    few = np.concatenate([np.geomspace(10, 0.01, 30), np.zeros(n - 30)])
    network = np.concatenate(
        [
            np.geomspace(8, 0.05, 30),
            np.abs(0.01 * rng.standard_t(3, n // 4)),
            -np.abs(0.004 * rng.standard_t(3, n // 3)),
            1e-6 * rng.standard_normal(n - 30 - n // 4 - n // 3),
        ]
    )
    pair = np.concatenate([outliers[:1], outliers[:-1]])
    spectra = {
        "uniform": np.linspace(-0.5, 1, n),
        "outliers on a bulk": outliers,
        "geometric": np.geomspace(1, 1e-8, n),
        "power law": rank**-1.5,
        "slow power law": rank**-0.7,
        "both signs": np.where(rank % 2, 1.0, -0.9) / rank,
        "negative": -np.geomspace(1e-4, 1, n),
        "heavy tails": rng.standard_t(2, n),
        "null space": few,
        "null space, shifted": few + 0.05,
        "like a network": network,
        "clusters of 8, 1e-3 apart": np.repeat(np.geomspace(1, 1e-3, n // 8), 8) * (1 + 1e-3 * bulk),
        "pairs 1e-6 apart": np.repeat(rank[: n // 2] ** -1.2, 2) * (1 + 1e-6 * bulk),
        "every eigenvalue twice": np.repeat(rank[: n // 2] ** -1.2, 2),
        "the largest one twice": pair,
    }
    return {
        **{name: Case(values) for name, values in spectra.items()},
        "like a network, float32": Case(network, torch.float32),
        "like a network, 3 probes": Case(network, probes=3),
        "outliers on a bulk, 3 probes": Case(outliers, probes=3),
    }


class Matrix:
    """A symmetric matrix with given eigenvalues, random eigenvectors and layers."""

    def __init__(self, case: Case) -> None:
        self.dtype, self.probes = case.dtype, case.probes
        n = len(case.eigenvalues)
        axes = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
        self.matrix = torch.from_numpy((axes * case.eigenvalues) @ axes.T).to(case.dtype)
        dense = self.matrix.double().numpy()
        dense = (dense + dense.T) / 2
        self.eigenvalues = np.linalg.eigvalsh(dense)
        self.norm = float(np.abs(self.eigenvalues).max())
        ends = np.cumsum(LAYERS)
        self.layers = [slice(end - size, end) for end, size in zip(ends, LAYERS, strict=True)]
        self.traces = np.array([np.trace(dense[own, own]) for own in self.layers])
        self.extremes = np.array([np.linalg.eigvalsh(dense[own, own])[[0, -1]] for own in self.layers])

    def analyze(self, steps: int, seed: int) -> Spectrum:
        """Return the spectrum that Lanczos runs find."""
        generator = torch.Generator().manual_seed(seed)
        n, runs = len(self.matrix), []
        for _ in range(self.probes):
            start = torch.randn(n, generator=generator, dtype=torch.float64).to(self.dtype)
            runs.append(Lanczos(self.matrix.mv, start, steps))
            runs[-1].run()
        nodes, weights, residuals = stack_rules([gauss_quadrature(run.alphas, run.betas) for run in runs])
        rounding = rounding_threshold(float(np.nanmax(np.abs(nodes))), torch.finfo(self.dtype).eps, n)
        pairs = [self._ritz_pairs(run) for run in runs]
        dimensions = {str(index): size for index, size in enumerate(LAYERS)}
        return Spectrum(
            nodes, weights, residuals, steps_per_probe=tuple(len(run.alphas) for run in runs), dimension=n,
            num_samples=1, loss=1.0, rounding=rounding, matvecs=steps, seconds=0.0, verified="yes",
            by_layer=layer_curvatures(pairs, dimensions, rounding, confidence=0.95),
        )  # fmt: skip

    def _ritz_pairs(self, run: Lanczos) -> RitzPairs:
        nodes, vectors = tridiagonal_eigh(run.alphas, run.betas)
        grams: Any = run.grams([[own] for own in self.layers])  # never None with a basis
        return RitzPairs(nodes, vectors, float(run.betas[-1]) * np.abs(vectors[-1]), grams)

    def judge(self, spectrum: Spectrum) -> dict[str, Any]:
        """Return which statements of a spectrum hold, and how wide they are."""
        true, layers = self.eigenvalues, spectrum.by_layer.values()
        margin = 2 * spectrum.rounding  # an eigenvalue so close to a threshold may count or not
        counts = []
        for threshold in self.norm * np.array([*THRESHOLDS, *(-t for t in THRESHOLDS)]):
            positive = threshold > 0
            fewest, largest = spectrum.count(above=threshold) if positive else spectrum.count(below=threshold)
            least, most = ((np.sign(threshold) * true > abs(threshold) + shift).sum() for shift in (margin, -margin))
            counts.append((fewest <= most and least <= largest, largest - fewest))
        points, low, high = spectrum.cumulative_band
        width = float(true[-1] - true[0])
        trace_error = abs(spectrum.trace - true.sum())
        bounds = np.array([(layer.lambda_min_bounds, layer.lambda_max_bounds) for layer in layers])
        trace_errors = np.abs(self.traces - [layer.trace for layer in layers])
        distance = wasserstein(spectrum.distribution, true)
        return {
            "converged": spectrum.converged_nodes.sum() / self.probes,
            "counts": np.mean([holds for holds, _ in counts]),
            "count width": np.median([width for _, width in counts]),
            "band": (np.searchsorted(true, points + margin, side="right") / len(true) >= low - 1e-9).all()
            and (np.searchsorted(true, points[1:] - margin) / len(true) <= high[:-1] + 1e-9).all(),
            "height": float(((high - low)[:-1] * np.diff(points)).sum()) / width,
            "density": distance <= spectrum.density_error * (points[-1] - points[0]) + margin,
            "distance": distance / width,
            "bound": spectrum.density_error * (points[-1] - points[0]) / width,
            "trace 1": trace_error <= spectrum.trace_error,
            "trace 2": trace_error <= 2 * spectrum.trace_error,
            "error": spectrum.trace_error / np.abs(true).sum(),
            "layers": np.mean(trace_errors <= [2 * layer.trace_error for layer in layers]),
            "Weyl": ((bounds[..., 0] <= self.extremes) & (self.extremes <= bounds[..., 1])).mean(),
            "Weyl width": np.median(bounds[:, 1, 1] - bounds[:, 1, 0]) / self.norm,
        }


def row(name: str, case: Case, steps: int, seeds: int) -> list[str]:
    """Return the row of a spectrum."""
    matrix = Matrix(case)
    found = [matrix.judge(matrix.analyze(steps, seed)) for seed in range(seeds)]

    def share(key: str) -> str:
        return f"{100 * np.mean([one[key] for one in found]):.0f} %"

    def median(key: str) -> float:
        return float(np.median([one[key] for one in found]))

    return [
        name, f"{median('converged'):.0f}",
        share("counts"), f"{median('count width'):.0f}", share("band"), f"{median('height'):.1e}",
        share("density"), f"{median('distance'):.1e}, {median('bound'):.1e}",
        share("trace 1"), share("trace 2"), f"{median('error'):.1e}",
        share("layers"), share("Weyl"), f"{median('Weyl width'):.1e}",
    ]  # fmt: skip


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="Lanczos steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=60, help="start vectors (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(cases().items())[: 2 if args.quick else None]
    rows: list[list[str]] = []
    for name, case in chosen:
        rows.append(row(name, case, args.steps, 2 if args.quick else args.seeds))
        print(*rows[-1], sep=", ", flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows))
    explanation = EXPLANATION.format(
        dimension=DIMENSION, steps=args.steps, seeds=args.seeds, thresholds=2 * len(THRESHOLDS),
        layers=len(LAYERS), smallest=min(LAYERS), largest=max(LAYERS),
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "coverage.md").write_text(f"# Coverage\n\n{explanation}\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
