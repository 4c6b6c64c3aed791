import math

import numpy as np
import pytest

from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra import eigenvalue_bounds, quadrature

NAN = math.nan


def random_tridiagonal(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=steps), rng.uniform(0.1, 2.0, size=steps)


def dense(alphas: np.ndarray, betas: np.ndarray) -> np.ndarray:
    return np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)


class TestGaussQuadrature:
    @pytest.mark.parametrize("steps", [1, 2, 10])
    def test_moments_are_those_of_the_matrix_up_to_degree_2m_minus_1(self, steps):
        # T_m is the leading part of a longer T: e₁ᵀTᵏe₁ agree up to k = 2m − 1, which is what makes the rule Gaussian.
        alphas, betas = random_tridiagonal(steps + 8, seed=0)
        nodes, weights, _ = gauss_quadrature(alphas[:steps], betas[:steps])
        whole = dense(alphas, betas)
        norm = np.linalg.norm(whole, 2)
        power = np.eye(len(whole))
        for degree in range(2 * steps):
            expected = power[0, 0]
            assert (weights * nodes**degree).sum() == pytest.approx(expected, rel=0, abs=1e-13 * norm**degree)
            power = power @ whole
        # One degree more is no longer exact: the test above can fail.
        assert abs((weights * nodes ** (2 * steps)).sum() - power[0, 0]) > 1e-6

    @pytest.mark.parametrize("steps", [1, 7])
    def test_weights_and_residuals_are_the_ends_of_the_eigenvectors(self, steps):
        alphas, betas = random_tridiagonal(steps, seed=3)
        nodes, weights, residuals = gauss_quadrature(alphas, betas)
        values, vectors = np.linalg.eigh(dense(alphas, betas))
        np.testing.assert_allclose(nodes, values, rtol=0, atol=1e-14)
        np.testing.assert_allclose(weights, vectors[0] ** 2, rtol=0, atol=1e-14)
        np.testing.assert_allclose(residuals, betas[-1] * np.abs(vectors[-1]), rtol=0, atol=1e-14)


def test_moments_of_each_probe_by_hand() -> None:
    nodes, weights = np.array([[-2.0, 1.0, 3.0], [4.0, NAN, NAN]]), np.array([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])
    for k, expected in enumerate([[1, 1], [1.25, 4], [5.75, 16], [11.75, 64]]):
        assert quadrature.moments(nodes, weights, k).tolist() == expected
    with pytest.raises(ValueError, match=r"`k` must be a non-negative integer, got -1"):
        quadrature.moments(nodes, weights, -1)


class TestMissProbability:
    @staticmethod
    def one_end(dimension: int, steps: int, tolerance: float) -> float:
        return 1.648 * math.sqrt(dimension) * math.exp(-math.sqrt(tolerance) * (2 * steps - 1))

    def test_is_the_bound_for_both_ends_and_independent_probes_multiply(self):
        for dimension, steps, tolerance in ((1000, 60, 0.05), (272_000, 100, 0.01)):
            expected = 2 * self.one_end(dimension, steps, tolerance)
            assert 0 < expected < 1
            found = eigenvalue_bounds.miss_probability(dimension, [steps], tolerance)
            assert found == pytest.approx(expected, rel=1e-14)
        ends = [self.one_end(1000, steps, 0.05) for steps in (20, 30)]
        assert max(ends) < 1
        expected = 2 * math.prod(ends)
        assert eigenvalue_bounds.miss_probability(1000, [20, 30], 0.05) == pytest.approx(expected, rel=1e-14)
        # A useless one does not make the bound worse.
        alone, both = (eigenvalue_bounds.miss_probability(1000, steps, 0.05) for steps in ([30], [30, 1]))
        assert both == pytest.approx(alone, rel=1e-14)

    def test_is_at_most_one_and_zero_for_as_many_steps_as_dimensions(self):
        assert eigenvalue_bounds.miss_probability(10**9, [1], 0.01) == 1.0
        # Both ends together exceed 1 although neither does.
        assert 0.5 < self.one_end(1000, 10, 0.05) < 1
        assert eigenvalue_bounds.miss_probability(1000, [10], 0.05) == 1.0
        assert eigenvalue_bounds.miss_probability(30, [30], 0.01) == 0.0
        assert eigenvalue_bounds.miss_probability(30, [5, 30], 0.01) == 0.0
        assert eigenvalue_bounds.miss_probability(30, [29], 0.01) > 0.0

    def test_holds_for_a_spectrum_whose_top_is_easily_missed(self):
        spectrum = np.linspace(0.0, 1.0, 60) ** 10
        steps, tolerance, runs = 8, 0.1, 300
        rng = np.random.default_rng(0)
        missed = 0
        for _ in range(runs):
            powers = [rng.normal(size=60)]
            for _ in range(steps - 1):
                powers.append(spectrum * powers[-1])
            basis, _ = np.linalg.qr(np.array(powers).T)
            top = np.linalg.eigvalsh(basis.T @ (spectrum[:, None] * basis))[-1]
            missed += top < spectrum[-1] - tolerance * np.ptp(spectrum)
        assert 0 < missed / runs <= eigenvalue_bounds.miss_probability(60, [steps], tolerance) < 0.25


def test_the_rule_gives_the_matrix_back() -> None:
    alphas, betas = random_tridiagonal(12, seed=3)
    nodes, weights, _ = gauss_quadrature(alphas, betas)
    # First components of eigenvectors are known to the rounding unit, the smallest of them to fewest digits.
    tolerance = 10 * np.finfo(np.float64).eps / np.sqrt(weights.min())
    assert quadrature.tridiagonal(nodes, weights) == pytest.approx(dense(alphas, betas), abs=tolerance)
    assert quadrature.tridiagonal(np.array([0.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(np.array([[2.0]]))
