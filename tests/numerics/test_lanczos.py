from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_hesd.criteria import rounding_threshold
from lightning_hesd.lanczos import STEPS_BETWEEN_CHECKS, Lanczos, NonFiniteProductError
from lightning_hesd.quadrature import gauss_quadrature

DTYPES = [torch.float64, torch.float32]

# Name: (spectrum, number of distinct eigenvalues).
SPECTRA: dict[str, tuple[list[float], int]] = {
    "indefinite": (np.linspace(-3.0, 5.0, 30).tolist(), 30),
    "clustered": ([-2.0] * 4 + [0.5] * 20 + [3.0] * 5 + [7.0], 4),
    "rank_deficient": ([0.0] * 40 + [-1.0, 2.0, 10.0], 4),
    "all_positive": (np.geomspace(0.1, 8.0, 25).tolist(), 25),
    "all_negative": ((-np.geomspace(0.1, 8.0, 25)).tolist(), 25),
    "zero": ([0.0] * 12, 1),
    "multiple_of_identity": ([-2.5] * 12, 1),
    "one_by_one": ([3.0], 1),
    "pair": ([-1.0, 1.0], 2),
}


def make_matrix(spectrum: list[float], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with this spectrum and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def make_start(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vector: matrix @ vector


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int, **options: Any) -> Lanczos:
    """A process that has been run."""
    process = Lanczos(matvec, start, steps, **options)
    process.run()
    return process


def run(name: str, dtype: torch.dtype, steps: int) -> tuple[Lanczos, np.ndarray, float]:
    """The result, the true eigenvalues, and how far rounding may move an eigenvalue of this matrix."""
    spectrum = SPECTRA[name][0]
    matrix = make_matrix(spectrum, dtype)
    true = np.sort(spectrum)
    rounding = rounding_threshold(float(np.abs(true).max()), torch.finfo(dtype).eps, len(true))
    return lanczos(times(matrix), make_start(len(spectrum), dtype), steps), true, rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
class TestPrescribedSpectra:
    def test_breaks_down_after_one_step_per_distinct_eigenvalue_and_finds_them_all(self, name, dtype):
        distinct = SPECTRA[name][1]
        result, true, rounding = run(name, dtype, steps=1000)
        assert result.breakdown
        assert len(result.alphas) == len(result.betas) == distinct
        nodes, _, residuals = gauss_quadrature(result.alphas, result.betas)
        # Repeated eigenvalues once, none left out, none invented.
        np.testing.assert_allclose(nodes, np.unique(true), rtol=0, atol=rounding)
        assert residuals.max() <= rounding

    def test_nodes_lie_inside_the_spectrum_and_eigenvalues_within_their_residuals(self, name, dtype):
        for steps in range(1, SPECTRA[name][1] + 1):
            result, true, rounding = run(name, dtype, steps)
            assert len(result.alphas) == steps
            nodes, _, residuals = gauss_quadrature(result.alphas, result.betas)
            assert nodes.min() >= true[0] - rounding
            assert nodes.max() <= true[-1] + rounding
            distances = np.abs(nodes[:, None] - true).min(axis=1)
            assert np.all(distances <= residuals + rounding)

    def test_weights_are_those_of_the_start_vector(self, name, dtype):
        spectrum, distinct = SPECTRA[name]
        matrix, start = make_matrix(spectrum, torch.float64), make_start(len(spectrum))
        result = lanczos(times(matrix.to(dtype)), start.to(dtype), distinct)
        _, weights, _ = gauss_quadrature(result.alphas, result.betas)
        values, vectors = torch.linalg.eigh(matrix)
        shares = (vectors.T @ (start / start.norm())).square()
        expected = [float(shares[(values - value).abs() < 1e-6].sum()) for value in np.unique(spectrum)]
        # Eigenvectors of T are as well determined as the gaps are wide; the narrowest here is 0.019.
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


class TestOrthogonality:
    """The basis is not exposed; lost orthogonality shows as copies of eigenvalues that are there once."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_ghosts_of_outlying_eigenvalues(self, dtype):
        # Outliers converge early; without reorthogonalisation rounding would let them in again and again.
        spectrum = np.concatenate([np.linspace(-1.0, 1.0, 197), [1e2, 1e3, 1e4]])
        matrix = make_matrix(spectrum.tolist(), dtype)
        result = lanczos(times(matrix), make_start(200, dtype), steps=100)
        nodes, _, _ = gauss_quadrature(result.alphas, result.betas)
        rounding = rounding_threshold(1e4, torch.finfo(dtype).eps, 200)
        outliers = nodes[nodes > 50]
        np.testing.assert_allclose(outliers, [1e2, 1e3, 1e4], rtol=0, atol=rounding)

    @pytest.mark.parametrize(("dtype", "tail"), [(torch.float64, 2e-12), (torch.float32, 2e-4)])
    def test_a_small_remainder_after_the_dominant_part_is_found(self, dtype, tail):
        # β falls to the size of the tail after three steps: one Gram-Schmidt pass leaves a component of relative size
        # epsilon/tail along the dominant part, which would falsify every later coefficient.
        spectrum = np.concatenate([tail * np.linspace(-1.0, 1.0, 97), [2.0, 3.0, 5.0]])
        matrix = torch.diag(torch.tensor(spectrum, dtype=dtype))
        result = lanczos(times(matrix), make_start(100, dtype), steps=60)
        assert len(result.alphas) == 60
        nodes, _, _ = gauss_quadrature(result.alphas, result.betas)
        np.testing.assert_allclose(nodes[-3:], [2.0, 3.0, 5.0], rtol=0, atol=8 * torch.finfo(dtype).eps * 5)
        rest = nodes[:-3]
        slack = 8 * torch.finfo(dtype).eps * 5
        assert np.abs(rest).max() <= tail + slack
        # Ninety-seven even eigenvalues, 57 nodes: the ends are found well.
        assert rest.min() == pytest.approx(-tail, abs=0.01 * tail + slack)
        assert rest.max() == pytest.approx(tail, abs=0.01 * tail + slack)


class TestBreakdown:
    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_relative_to_the_norm(self, dtype, scale):
        spectrum = [0.0] * 97 + [-scale, 2 * scale, 3 * scale]
        matrix = make_matrix(spectrum, dtype)
        result = lanczos(times(matrix), make_start(100, dtype), steps=100)
        assert result.breakdown
        # Three eigenvalues and zero, with one more step where rounding hides the end of the Krylov space.
        assert 4 <= len(result.alphas) <= 5
        nodes, _, _ = gauss_quadrature(result.alphas, result.betas)
        rounding = rounding_threshold(3 * scale, torch.finfo(dtype).eps, 100)
        assert np.abs(nodes[:, None] - np.array(spectrum)).min(axis=1).max() <= rounding
        assert (nodes > rounding).sum() == 2
        assert (nodes < -rounding).sum() == 1

    def test_a_start_vector_in_an_invariant_subspace_sees_only_that(self):
        matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
        result = lanczos(times(matrix), torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), steps=4)
        assert result.breakdown
        nodes, weights, _ = gauss_quadrature(result.alphas, result.betas)
        np.testing.assert_allclose(nodes, [1.0, 4.0], rtol=1e-14)
        np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-14)

    def test_a_zero_first_coefficient_is_no_breakdown(self):
        matrix = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        result = lanczos(times(matrix), torch.tensor([1.0, 0.0], dtype=torch.float64), steps=2)
        nodes, _, _ = gauss_quadrature(result.alphas, result.betas)
        np.testing.assert_allclose(nodes, [-1.0, 1.0], rtol=1e-14)

    def test_stopping_early_is_no_breakdown(self):
        result, _, _ = run("indefinite", torch.float64, steps=7)
        assert not result.breakdown
        assert result.matvecs == 7
        assert result.betas[-1] > 0.1

    def test_longer_runs_continue_shorter_ones(self):
        short, _, _ = run("indefinite", torch.float64, steps=7)
        long, _, _ = run("indefinite", torch.float64, steps=12)
        np.testing.assert_array_equal(long.alphas[:7], short.alphas)
        np.testing.assert_array_equal(long.betas[:7], short.betas)

    def test_the_length_of_the_start_vector_does_not_matter(self):
        matrix = make_matrix(SPECTRA["indefinite"][0], torch.float64)
        start = make_start(30)
        first, second = (lanczos(times(matrix), scale * start, steps=10) for scale in (1.0, 1e-3))
        np.testing.assert_allclose(first.alphas, second.alphas, rtol=0, atol=1e-12)
        np.testing.assert_allclose(first.betas, second.betas, rtol=0, atol=1e-12)

    def test_the_start_vector_is_left_alone(self):
        start = make_start(30)
        before = start.clone()
        lanczos(times(make_matrix(SPECTRA["indefinite"][0], torch.float64)), start, steps=10)
        assert torch.equal(start, before)


class TestErrors:
    @pytest.mark.parametrize("steps", [0, -1])
    def test_at_least_one_step(self, steps):
        with pytest.raises(ValueError, match=rf"`steps` must be at least 1, got {steps}"):
            lanczos(lambda vector: vector, torch.ones(3), steps)

    @pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
    def test_the_start_vector_must_have_a_direction(self, value):
        with pytest.raises(ValueError, match=r"`start` must be finite and not zero"):
            lanczos(lambda vector: vector, torch.full((3,), value), 2)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("bad_step", [1, 3])
    def test_a_non_finite_product_names_the_step_and_hands_out_the_vector(self, value, bad_step):
        matrix, vectors = make_matrix(SPECTRA["indefinite"][0], torch.float64), []

        def matvec(vector: Tensor) -> Tensor:
            vectors.append(vector.clone())
            product = matrix @ vector
            if len(vectors) >= bad_step:
                product[5] = value
            return product

        with pytest.raises(NonFiniteProductError, match=rf"step {bad_step} ") as caught:
            lanczos(matvec, make_start(30), steps=20)
        assert len(vectors) == bad_step  # on the CPU the error comes at once
        assert caught.value.vector.isfinite().all()
        assert torch.equal(caught.value.vector, vectors[bad_step - 1])


class _Elsewhere(str):
    """A device name that works like "cpu" and says that it is an accelerator."""

    type = "accelerator"


class _OnAccelerator(Tensor):
    """A CPU tensor that claims to live on an accelerator, whose coefficients are read back only now and then."""

    device = property(lambda self: _Elsewhere("cpu"))  # type: ignore[assignment]


def elsewhere(start: Tensor) -> Tensor:
    return start.as_subclass(_OnAccelerator)


class TestCheckInterval:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_late_checks_change_nothing_but_the_number_of_products(self, name, dtype):
        spectrum, distinct = SPECTRA[name]
        matrix, start = make_matrix(spectrum, dtype), make_start(len(spectrum), dtype)
        at_once = lanczos(times(matrix), start, steps=1000)
        late = lanczos(times(matrix), elsewhere(start), steps=1000)
        assert late.breakdown
        np.testing.assert_array_equal(late.alphas, at_once.alphas)
        np.testing.assert_array_equal(late.betas, at_once.betas)
        blocks = -(-distinct // STEPS_BETWEEN_CHECKS) * STEPS_BETWEEN_CHECKS
        assert late.matvecs == min(blocks, len(spectrum))

    @pytest.mark.parametrize("steps", [1, STEPS_BETWEEN_CHECKS, STEPS_BETWEEN_CHECKS + 3])
    def test_a_last_incomplete_block_is_read_too(self, steps):
        matrix, start = make_matrix(SPECTRA["indefinite"][0], torch.float64), make_start(30)
        late = lanczos(times(matrix), elsewhere(start), steps)
        at_once = lanczos(times(matrix), start, steps)
        assert not late.breakdown
        assert late.matvecs == steps
        np.testing.assert_array_equal(late.alphas, at_once.alphas)
        np.testing.assert_array_equal(late.betas, at_once.betas)

    def test_a_non_finite_product_is_found_late_with_the_right_step_and_vector(self):
        matrix, vectors = make_matrix(SPECTRA["indefinite"][0], torch.float64), []

        def matvec(vector: Tensor) -> Tensor:
            vectors.append(vector.clone())
            return matrix @ vector * (float("nan") if len(vectors) == 3 else 1.0)

        with pytest.raises(NonFiniteProductError, match=r"step 3 ") as caught:
            lanczos(matvec, elsewhere(make_start(30)), steps=20)
        assert len(vectors) == STEPS_BETWEEN_CHECKS
        assert caught.value.vector.isfinite().all()
        assert torch.equal(caught.value.vector, vectors[2])
