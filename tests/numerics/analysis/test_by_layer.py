"""What one analysis of a whole network tells of its layers and of numbers of eigenvalues, against dense Hessians."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.collectives import Collectives
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.vectors import VectorSpace
from tests import cases
from tests.numerics.analysis.test_preconditioned import diagonals, preconditioned
from tests.oracles import case_hessian, dense_hessian
from tests.ranks import in_threads

LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "mlp": {"0": ("0.",), "2": ("2.",)},
    "conv_batchnorm": {"0": ("0.", "1."), "5": ("5.",)},
    "attention": {"attention": ("attention.",), "head": ("head.",)},
    "sdpa": {"project": ("project.",), "head": ("head.",)},
    "tied": {"embedding": ("embedding.",), "mix": ("mix.",)},
    "frozen": {"0": ("0.",), "2": ("2.",), "4": ("4.",)},
}
"""Prefixes of the names of each layer's parameters."""


def blocks(problem: cases.Problem, name: str, hessian: np.ndarray) -> dict[str, np.ndarray]:
    """Return the layers' diagonal blocks; a Hessian's rows are in the order of the parameters that require grad."""
    owners = [
        layer
        for parameter, values in problem.module.named_parameters()
        if values.requires_grad
        for layer, prefixes in LAYERS[name].items()
        if parameter.startswith(prefixes)
        for _ in range(values.numel())
    ]
    chosen = {layer: np.flatnonzero(np.array(owners) == layer) for layer in LAYERS[name]}
    return {layer: hessian[np.ix_(own, own)] for layer, own in chosen.items()}


def check(spectrum: Spectrum, true: dict[str, np.ndarray], slack: float) -> list[bool]:
    """Check what is certain, and return whether the errors of the traces hold."""
    assert list(spectrum.by_layer) == list(true)
    holds = []
    for layer, block in zip(spectrum.by_layer.values(), true.values(), strict=True):
        values = np.linalg.eigvalsh(block)
        assert layer.dimension == len(block)
        assert layer.lambda_min_bounds[0] - slack <= values[0] <= layer.lambda_min_bounds[1] + slack
        assert layer.lambda_max_bounds[0] - slack <= values[-1] <= layer.lambda_max_bounds[1] + slack
        holds.append(abs(layer.trace - values.sum()) <= 2 * layer.trace_error)
    found = spectrum.by_layer.values()
    assert sum(layer.dimension for layer in found) == spectrum.dimension
    assert sum(layer.trace for layer in found) == pytest.approx(spectrum.trace, rel=1e-4, abs=slack)
    assert sum(layer.lambda_max_weight for layer in found) == pytest.approx(1, abs=1e-5)
    assert sum(layer.lambda_min_weight for layer in found) == pytest.approx(1, abs=1e-5)
    return holds


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in cases.NAMES), ("conv_batchnorm", torch.float32), ("tied", torch.float32)],
)
def test_layers_of_networks(name, dtype):
    hessian = case_hessian(name).numpy()
    problem, size = cases.make(name, dtype), np.linalg.norm(hessian, 2)
    true = blocks(problem, name, hessian)
    holds = []
    for steps, probes, seed in ((12, 3, 2), (len(hessian), 1, 3)):
        spectrum = hessian_spectrum(*problem, steps=steps, probes=probes, seed=seed)
        holds += check(spectrum, true, slack=1e-4 * size if dtype == torch.float32 else 1e-9 * size)
    assert sum(holds) >= len(holds) - 1
    # After all steps nothing is left to chance.
    for layer, block in zip(spectrum.by_layer.values(), true.values(), strict=True):
        assert layer.trace == pytest.approx(np.trace(block), abs=1e-3 * size if dtype == torch.float32 else 1e-9 * size)
    eigenvalues = np.linalg.eigvalsh(hessian)
    assert spectrum.negative_count[0] <= (eigenvalues < -spectrum.rounding).sum() <= spectrum.negative_count[1]


def test_shares_are_those_of_the_dense_hessian():
    problem, hessian = cases.make("conv_batchnorm"), case_hessian("conv_batchnorm").numpy()
    values, vectors = np.linalg.eigh(hessian)
    negative = blocks(problem, "conv_batchnorm", (vectors * np.minimum(values, 0)) @ vectors.T)
    whole = blocks(problem, "conv_batchnorm", hessian)
    largest = blocks(problem, "conv_batchnorm", np.outer(vectors[:, -1], vectors[:, -1]))
    found = hessian_spectrum(*problem, steps=len(hessian)).by_layer
    for name, layer in found.items():
        assert layer.trace_share == pytest.approx(np.trace(whole[name]) / np.trace(hessian), rel=1e-8)
        assert layer.negative_share == pytest.approx(np.trace(negative[name]) / np.minimum(values, 0).sum(), rel=1e-6)
        assert layer.lambda_max_weight == pytest.approx(np.trace(largest[name]), rel=1e-8)


def test_only_chosen_parameters_are_analyzed_and_a_preconditioner_scales_the_layers():
    problem = cases.make("frozen")

    def chosen(name: str, _: Any) -> bool:
        return name.startswith(("0.", "4.weight"))

    hessian = dense_hessian(*problem, parameters=chosen).numpy()
    spectrum = hessian_spectrum(*problem, steps=len(hessian), parameters=chosen)
    assert {name: layer.dimension for name, layer in spectrum.by_layer.items()} == {"0": 20, "4": 12}
    assert spectrum.by_layer["0"].trace == pytest.approx(np.trace(hessian[:20, :20]), rel=1e-8)
    assert spectrum.by_layer["4"].trace == pytest.approx(np.trace(hessian[20:, 20:]), rel=1e-8)
    problem = cases.make("mlp")
    preconditioner = diagonals(problem.module)
    hessian = preconditioned("mlp", preconditioner).numpy()
    spectrum = hessian_spectrum(*problem, steps=len(hessian), preconditioner=preconditioner)
    check(spectrum, blocks(problem, "mlp", hessian), slack=1e-9 * np.linalg.norm(hessian, 2))


# Option `layer_probes`: more random vectors, at one product each ------------------------------------------------------


def test_traces_of_layers_are_as_accurate_as_so_many_vectors_make_them() -> None:
    problem, diagonal = cases.make("mlp"), case_hessian("mlp").diagonal()
    errors, stated = {}, {}
    for probes in (0, 15):
        found = [hessian_spectrum(*problem, steps=6, seed=seed, layer_probes=probes) for seed in range(12)]
        layers = [list(spectrum.by_layer.values()) for spectrum in found]
        expected = [float(part.sum()) for part in diagonal.split([layer.dimension for layer in layers[0]])]
        deviations = np.array([[layer.trace for layer in of_one] for of_one in layers]) - expected
        stated[probes] = np.array([[layer.trace_error for layer in of_one] for of_one in layers])
        errors[probes] = np.sqrt((deviations**2).mean(axis=0))
        assert (np.abs(deviations) <= 3 * stated[probes]).all()
        assert {spectrum.matvecs for spectrum in found} == {6 + probes}
    assert (errors[15] < 0.5 * errors[0]).all()
    assert (np.median(stated[15], axis=0) < 0.5 * np.median(stated[0], axis=0)).all()


def test_more_vectors_do_not_change_the_spectrum_and_there_are_none_without_a_krylov_basis() -> None:
    plain, probed = (hessian_spectrum(*cases.make("mlp"), steps=6, layer_probes=probes) for probes in (0, 3))
    np.testing.assert_array_equal(plain.nodes, probed.nodes)
    assert plain.trace == probed.trace
    bounds = [[layer.lambda_max_bounds for layer in s.by_layer.values()] for s in (plain, probed)]
    assert bounds[0] == bounds[1]
    without = hessian_spectrum(*cases.make("mlp"), steps=6, layer_probes=3, basis="none")
    assert (without.by_layer, without.matvecs) == ({}, 6)


# Several ranks --------------------------------------------------------------------------------------------------------


class _Shard(VectorSpace):
    """The space of vectors of which each rank holds a part."""

    def __init__(self, dimension: int, ranks: Collectives) -> None:
        super().__init__(dimension)
        self._ranks = ranks

    def dot(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(torch.dot(first, second))

    def norm(self, vector: torch.Tensor) -> torch.Tensor:
        return self.dot(vector, vector).sqrt()

    def coefficients(self, basis: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(basis @ vector)


def test_gram_matrices_of_sharded_vectors_are_those_of_whole_ones():
    n, layers = 24, [[slice(0, 7), slice(20, 24)], [slice(7, 20)]]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix, start = matrix + matrix.T, torch.randn(n, generator=generator, dtype=torch.float64)
    whole = Lanczos(matrix.mv, start, 10)
    whole.run()
    expected = whole.grams(layers)
    np.testing.assert_allclose(expected.sum(axis=0), np.eye(10), atol=1e-13)

    def work(ranks: Collectives) -> np.ndarray:
        # The first rank holds 12 elements, the second one the others; of a layer it may hold none.
        own = slice(12 * ranks.rank, 12 * ranks.rank + 12)

        def product(vector: torch.Tensor) -> torch.Tensor:
            full = torch.zeros(n, dtype=torch.float64)
            full[own] = vector
            return (matrix @ ranks.sum(full))[own]

        run = Lanczos(product, start[own].clone(), 10, space=_Shard(n, ranks))
        run.run()
        mine = [[slice(0, 7), slice(0, 0)], [slice(7, 12)]] if ranks.rank == 0 else [[slice(8, 12)], [slice(0, 8)]]
        # As many ranges on each rank, as parameters have: each is a sum over ranks.
        return run.grams([[*ranges, *[slice(0, 0)] * (2 - len(ranges))] for ranges in mine])

    first, second = in_threads(2, work)
    np.testing.assert_allclose(first, expected, atol=1e-12)
    np.testing.assert_array_equal(first, second)
