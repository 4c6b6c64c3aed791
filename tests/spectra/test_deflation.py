"""Which nodes are eigenvalues, their weights, and the error of the trace: closed forms, and coverage over spectra."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_hesd.spectra import deflation
from tests.example_spectra import SMALL, analyze
from tests.example_spectra import SMALL_POPULATION as SPECTRA


def converged(nodes, weights=None, residuals=0.0, dimension=100, rounding=1e-15):
    nodes = np.array([nodes], dtype=float)
    weights = np.full(nodes.shape, 1 / dimension) if weights is None else np.array([weights])
    residuals = np.broadcast_to(residuals, nodes.shape)
    return deflation.converged_nodes(nodes, weights, residuals, dimension, rounding)[0].tolist()


class TestConvergedNodes:
    def test_residuals_are_relative_and_a_node_that_rounding_hides_is_none(self):
        residuals = [[2e-8, 1e-10, 1e-10, 1e-9, 0.5]]
        assert converged([-1.0, -0.5, 1e-3, 1.0, 4.0], residuals=residuals) == [False, True, False, True, False]
        assert converged([0.01, 0.5, 1.0], residuals=[[0.0, 0.0, 1.0]], rounding=1e-3) == [False, True, False]

    @pytest.mark.parametrize(("gap", "expected"), [(1e-13, True), (1e-15, False)])
    def test_equal_nodes_show_a_multiple_eigenvalue_and_then_no_node_counts(self, gap, expected):
        nodes = [0.3, 1.0, 1.0 + gap, 2.0, 3.0]
        assert converged(nodes, residuals=[[0, 0, 0, 0, 1]], rounding=1e-14) == [expected] * 4 + [False]

    def test_nodes_of_large_weight_and_their_copies_do_not_count(self):
        weights = [0.01, 0.01, 0.3, 0.02, 0.66]
        assert converged([1, 2, 3, 4, 5], weights, [[0, 0, 0, 0, 1]]) == [True, True, False, True, False]
        nodes = [0.05 - 1e-16, 0.05, 1.0, 2.0, 3.0]
        weights = [1e-9, 0.9, 0.01, 0.01, 0.08]
        assert converged(nodes, weights, [[0, 0, 0, 0, 1]]) == [False, False, True, True, False]

    def test_in_an_invariant_space_all_are_eigenvalues_up_to_rounding(self):
        weights, rounding = [0.97, 0.01, 0.02], 1e-6
        assert converged([1e-9, 1.0, 2.0], weights, [[0.0, 1e-7, 5e-7]], rounding=rounding) == [False, True, True]
        assert converged([1e-9, 1.0, 2.0], weights, [[0.1, 1e-7, 5e-7]], rounding=rounding) == [False] * 3

    def test_weights_that_are_too_large_together_make_none_count(self):
        # χ² of ten degrees of freedom exceeds 29.6 in one of a thousand cases.
        for total, expected in ((28.5, True), (30.5, False)):
            weights = [total / 1000] * 10 + [1 - total / 100]
            assert converged([*range(1, 11), 20], weights, [[0.0] * 10 + [1.0]]) == [expected] * 10 + [False]

    def test_after_all_steps_every_node_is_an_eigenvalue_and_fewer_that_hold_the_whole_vector_are_multiple(self):
        assert converged([0.0, 1.0, 1.0, np.nan], [0.9, 0.1, 0.0, 0.0], dimension=3) == [True, True, True, False]
        assert converged([1.0, 2.0, np.nan], [0.4, 0.6, 0.0], dimension=3) == [False] * 3

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_they_are_eigenvalues_unless_these_have_copies(self, dtype):
        found = 0
        for name in ("outliers", "power law", "both signs", "close"):
            spectrum = analyze(SPECTRA[name], 1, (40, 30), dtype)
            nodes = spectrum.nodes[spectrum.converged_nodes]
            assert np.abs(nodes[:, None] - SPECTRA[name]).min(axis=1).max() <= spectrum.rounding
            found += len(nodes)
        assert found > 70
        # Copies of eigenvalues are noticed, and a shifted null space leaves the others simple.
        eigenvalues = np.repeat(np.arange(1.0, 76) ** -1.2, 2)
        spectra = [analyze(eigenvalues, seed, (40,), dtype) for seed in range(8)]
        assert not any(spectrum.converged_nodes.any() for spectrum in spectra)
        for seed in range(4):
            spectrum = analyze(SPECTRA["null space"] + 0.05, seed, dtype=dtype)
            assert spectrum.converged_nodes.sum() >= 18
            assert spectrum.trace == pytest.approx((SPECTRA["null space"] + 0.05).sum(), rel=1e-3)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 5, 40])
def test_quantiles(degrees, probability):
    ours = deflation._chi_squared_quantile(degrees, probability)
    assert ours == pytest.approx(stats.chi2.ppf(probability, degrees), rel=0.03 if degrees > 1 else 1e-9)


class TestDeflatedWeights:
    def test_of_converged_nodes_are_those_of_one_eigenvalue_and_the_others_share_the_rest(self):
        weights = np.array([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]])
        mask = np.array([[True, False, False, False], [False] * 4])
        new = deflation.deflated_weights(weights, mask, 5)
        np.testing.assert_allclose(new, [[0.2, 0.8 * 2 / 3, 0.8 / 3, 0.0], [0.25] * 4], rtol=1e-14)

    def test_the_trace_is_closer_to_the_true_one(self):
        for name in ("outliers", "power law", "both signs", "null space"):
            true = SPECTRA[name].sum()
            spectra = [analyze(SPECTRA[name], seed) for seed in range(8)]
            deflated = np.mean([(spectrum.trace - true) ** 2 for spectrum in spectra])
            plain = np.mean([(SMALL * np.nansum(s.weights * s.nodes) - true) ** 2 for s in spectra])
            assert deflated < plain / 25


class TestTraceError:
    @pytest.mark.parametrize(
        ("steps", "dtype"),
        [((40,), torch.float64), ((40,), torch.float32), ((1,), torch.float64), ((20, 5, 12), torch.float64)],
    )
    def test_covers_as_often_as_a_standard_error_does(self, steps, dtype):
        within = np.array(
            [
                abs(spectrum.trace - eigenvalues.sum()) <= spectrum.trace_error * np.array([1, 2])
                for eigenvalues in SPECTRA.values()
                for seed in range(10)
                for spectrum in [analyze(eigenvalues, seed, steps, dtype)]
            ]
        )
        one, two = within.mean(axis=0)
        deviation = np.sqrt(0.25 / len(within))
        assert 0.68 - 2 * deviation < one < 0.9  # and it is no larger than needed
        assert two > 0.95 - deviation

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(
        "eigenvalues",
        [np.full(SMALL, -0.7), np.zeros(SMALL), SPECTRA["power law"][:30], np.eye(SMALL)[0], np.array([2.0])],
        ids=["equal", "zero", "all found", "rank one", "one"],
    )
    def test_of_what_is_not_random_is_rounding(self, eigenvalues, dtype):
        for seed in range(5):
            spectrum = analyze(eigenvalues, seed, dtype=dtype)
            trace = float(torch.tensor(eigenvalues, dtype=dtype).double().sum())
            assert abs(spectrum.trace - trace) <= spectrum.trace_error
            assert spectrum.trace_error <= 2 * len(eigenvalues) * spectrum.rounding

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scales_with_the_matrix(self, scale):
        expected = analyze(SPECTRA["outliers"], 2)
        spectrum = analyze(scale * SPECTRA["outliers"], 2)
        assert spectrum.trace == pytest.approx(scale * expected.trace, rel=1e-6)
        assert spectrum.trace_error == pytest.approx(scale * expected.trace_error, rel=1e-6)

    def test_of_vectors_of_signs_does_not_fall_short(self):
        # The bound on their variance takes no account of the diagonal.
        rng = np.random.default_rng(5)
        axes = np.linalg.qr(rng.standard_normal((SMALL, SMALL)))[0]
        matrix = (axes * SPECTRA["both signs"]) @ axes.T
        estimates = [u @ matrix @ u for u in rng.choice([-1.0, 1.0], (400, SMALL))]
        u = rng.choice([-1.0, 1.0], SMALL) / np.sqrt(SMALL)
        product = matrix @ u
        node = u @ product
        rule = np.array([[node]]), np.ones((1, 1)), np.array([[np.linalg.norm(product - node * u)]])
        none = np.zeros((1, 1), dtype=bool)
        error = deflation.trace_error(*rule, none, dimension=SMALL, rounding=0.0, on_sphere=False)
        assert np.std(estimates) < error < 2 * np.std(estimates)
