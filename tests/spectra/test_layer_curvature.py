"""`layer_curvatures` against dense matrices: traces and their errors, shares, and bounds on eigenvalues."""

import math

import numpy as np
import pytest
import torch

from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.ritz import tridiagonal_eigh
from lightning_hesd.spectra.criteria import rounding_threshold
from lightning_hesd.spectra.layer_curvature import LayerCurvature, RitzPairs, _extremes, _factor, layer_curvatures
from tests.example_spectra import SMALL, SMALL_POPULATION

SIZES = {"first": 50, "norm": 3, "middle": 80, "scalar": 1, "last": 16}
LAYERS = [slice(end - size, end) for end, size in zip(np.cumsum([*SIZES.values()]), SIZES.values(), strict=True)]


def rotated(eigenvalues: np.ndarray) -> np.ndarray:
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((SMALL, SMALL)))[0]
    matrix = (axes * eigenvalues) @ axes.T
    return (matrix + matrix.T) / 2


def gauss_newton() -> np.ndarray:
    """Layers of very different curvature."""
    rng = np.random.default_rng(2)
    scales = np.repeat([1.0, 3.0, 0.3, 1.0, 0.05], [*SIZES.values()])
    jacobian = rng.standard_normal((60, SMALL)) * np.geomspace(1, 1e-3, 60)[:, None] * scales
    return jacobian.T @ jacobian / 60 - 1e-3 * np.diag(scales)


MATRICES = {
    **{name: rotated(values) for name, values in SMALL_POPULATION.items()},
    "Gauss-Newton": gauss_newton(),
    "diagonal": np.diag(np.random.default_rng(3).permutation(SMALL_POPULATION["both signs"])),
    "identity": 0.7 * np.eye(SMALL),
    "zero": np.zeros((SMALL, SMALL)),
    "rank one": rotated(np.r_[3.0, np.zeros(SMALL - 1)]),
}


def analyze(
    matrix: np.ndarray, seed: int = 0, steps: int = 40, probes: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, LayerCurvature]:
    generator = torch.Generator().manual_seed(seed)
    operator, runs = torch.tensor(matrix, dtype=dtype), []
    for _ in range(probes):
        start = torch.randn(len(matrix), generator=generator, dtype=torch.float64).to(dtype)
        run = Lanczos(operator.mv, start, steps)
        run.run()
        nodes, vectors = tridiagonal_eigh(run.alphas, run.betas)
        grams = run.grams([[own] for own in LAYERS])
        assert grams is not None
        runs.append(RitzPairs(nodes, vectors, float(run.betas[-1]) * np.abs(vectors[-1]), grams))
    norm = max(float(np.abs(run.nodes).max()) for run in runs)
    rounding = rounding_threshold(norm, torch.finfo(dtype).eps, len(matrix))
    return layer_curvatures(runs, SIZES, rounding, confidence=0.95)


def blocks(matrix: np.ndarray) -> list[np.ndarray]:
    return [matrix[own, own] for own in LAYERS]


def bounds_hold(matrix: np.ndarray, found: dict[str, LayerCurvature], slack: float = 0.0) -> list[bool]:
    return [
        low - slack <= true <= high + slack
        for block, layer in zip(blocks(matrix), found.values(), strict=True)
        for true, (low, high) in zip(
            np.linalg.eigvalsh(block)[[0, -1]], (layer.lambda_min_bounds, layer.lambda_max_bounds), strict=True
        )
    ]


class TestTraces:
    @pytest.mark.parametrize(("steps", "probes", "seeds"), [(40, 1, 8), (40, 3, 3), (2, 1, 8)])
    def test_errors_cover(self, steps, probes, seeds):
        within = [
            abs(layer.trace - np.trace(block)) <= 2 * layer.trace_error
            for matrix in MATRICES.values()
            for seed in range(seeds)
            for block, layer in zip(blocks(matrix), analyze(matrix, seed, steps, probes).values(), strict=True)
        ]
        assert np.mean(within) >= 0.95

    @pytest.mark.parametrize("name", ["identity", "uniform"])
    def test_errors_of_a_layer_of_one_parameter_cover(self, name):
        # Its estimate rests on a single random number, which may be small by chance.
        matrix = MATRICES[name]
        true = float(matrix[LAYERS[3], LAYERS[3]].item())
        found = [analyze(matrix, seed, steps=4)["scalar"] for seed in range(40)]
        assert np.mean([abs(layer.trace - true) <= 2 * layer.trace_error for layer in found]) >= 0.9

    def test_are_close_where_eigenvalues_have_converged(self):
        for name in ("outliers", "power law", "null space", "Gauss-Newton"):
            total = np.trace(MATRICES[name])
            for seed in range(4):
                for block, layer in zip(blocks(MATRICES[name]), analyze(MATRICES[name], seed).values(), strict=True):
                    assert abs(layer.trace - np.trace(block)) < 0.05 * total
                    assert layer.trace_error < 0.08 * total

    @pytest.mark.parametrize("name", ["uniform", "negative"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_are_exact_after_all_steps(self, name, dtype):
        matrix = MATRICES[name]
        for block, layer in zip(blocks(matrix), analyze(matrix, steps=SMALL, dtype=dtype).values(), strict=True):
            assert abs(layer.trace - np.trace(block)) <= 2 * layer.trace_error
            assert layer.trace_error < 16 * SMALL * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_of_what_is_not_random_are_off_by_rounding_only(self, dtype):
        matrix = MATRICES["rank one"]
        for seed in range(5):
            for block, layer in zip(blocks(matrix), analyze(matrix, seed, dtype=dtype).values(), strict=True):
                assert abs(layer.trace - np.trace(block)) <= 2 * layer.trace_error <= 2000 * torch.finfo(dtype).eps

    def test_of_nothing_there_are_no_shares_and_of_a_single_step_nothing_is_known(self):
        for layer in analyze(MATRICES["zero"]).values():
            assert math.isnan(layer.trace_share)
            assert math.isnan(layer.negative_share)
        assert analyze(MATRICES["uniform"], steps=1) == {}
        assert len(analyze(MATRICES["identity"], steps=1)) == len(SIZES)


class TestBounds:
    @pytest.mark.parametrize(
        ("steps", "probes", "dtype"), [(40, 1, torch.float32), (12, 1, torch.float64), (3, 1, torch.float64)]
    )
    def test_cover(self, steps, probes, dtype):
        held = [
            holds
            for matrix in MATRICES.values()
            for seed in range(3)
            for holds in bounds_hold(matrix, analyze(matrix, seed, steps, probes, dtype))
        ]
        assert np.mean(held) >= 0.95

    # A Gauss-Newton matrix of rank 60, less 0.00005 to 0.003: only these eigenvalues are multiple ones.
    @pytest.mark.parametrize(
        ("name", "width"), [("uniform", 1e-10), ("diagonal", 1e-10), ("negative", 1e-10), ("Gauss-Newton", 0.01)]
    )
    def test_are_exact_after_all_steps_up_to_multiple_eigenvalues(self, name, width):
        matrix = MATRICES[name]
        found = analyze(matrix, steps=SMALL)
        assert all(bounds_hold(matrix, found))
        for layer in found.values():
            assert np.diff(layer.lambda_max_bounds) < width
            assert np.diff(layer.lambda_min_bounds) < width

    @pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
    def test_of_close_eigenvalues_whose_vectors_lie_in_different_layers(self, gap):
        # A run that has not told them apart sees one vector, in both layers.
        values = 0.01 * np.random.default_rng(4).standard_normal(SMALL)
        values[3], values[60] = 10.0, 10.0 * (1 + gap)
        held = [
            holds
            for steps in (4, 8, 12, 20)
            for seed in range(5)
            for holds in bounds_hold(np.diag(values), analyze(np.diag(values), seed, steps))
        ]
        assert np.mean(held) >= 0.95

    @pytest.mark.parametrize(
        ("size", "signs"), [(1, "both"), (6, "positive"), (6, "negative"), (7, "both"), (20, "negative"), (28, "both")]
    )
    def test_hold_for_every_remainder(self, size, signs):
        # Weyl's inequalities for six pairs, and a remainder with eigenvalues between -0.5 and 0.2.
        rng = np.random.default_rng(5)
        sign = {"positive": 1.0, "negative": -1.0, "both": np.array([1, -1, 1, -1, 1, -1])}[signs]
        for _ in range(20):
            axes = np.linalg.qr(rng.standard_normal((30, 30)))[0]
            theta = sign * rng.uniform(0.0, 3.0, 6)
            rest = rng.uniform(-0.5, 0.2, 24)
            matrix = (axes * np.concatenate([theta, rest])) @ axes.T
            pairs = axes[:size, :6]
            eigenvalues = np.linalg.eigvalsh(matrix[:size, :size])
            bounds = _extremes(_factor(pairs.T @ pairs, size, 1e-15)[0], theta, size, -0.5, 0.2)
            for (low, high), extreme in zip(bounds, (eigenvalues[0], eigenvalues[-1]), strict=True):
                assert low - 1e-12 <= extreme <= high + 1e-12
                assert high - low <= 0.7 + 1e-12
