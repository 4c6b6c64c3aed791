"""The distribution: cells by hand, densities in closed form, and its distance from true spectra."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.distances import points, wasserstein
from lightning_hesd.spectra import quadrature
from lightning_hesd.spectra.distribution import Distribution, spread
from tests.example_spectra import SMALL_POPULATION as SPECTRA
from tests.example_spectra import analyze

# Derandomized: the suite gives the same verdict every time.
reproducibly = settings(derandomize=True, deadline=None, max_examples=100, database=None)

NAN = math.nan


@st.composite
def rules(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rules of one to three probes of different lengths, with nodes of both signs, zeros, ties, and padding."""
    node = st.one_of(st.just(0.0), st.floats(-1e6, -1e-6), st.floats(1e-6, 1e6), st.sampled_from([-1.0, 1.0]))
    stacked = []
    for _ in range(draw(st.integers(1, 3))):
        theta = np.sort(np.array(draw(st.lists(node, min_size=1, max_size=6))))
        parts = np.array(draw(st.lists(st.integers(1, 100), min_size=len(theta), max_size=len(theta))), dtype=float)
        stacked.append((theta, parts / parts.sum()))
    return quadrature.stack_rules(stacked)


def of_rules(nodes, weights, residuals=0.0, converged=()) -> Distribution:
    nodes = np.array(nodes)
    return spread(nodes, np.array(weights), np.full(nodes.shape, residuals), np.isin(nodes, converged))


def histogram(nodes, weights, *args) -> tuple[np.ndarray, np.ndarray]:
    return of_rules(nodes, weights).histogram(*args)


class TestSpread:
    NODES = (-4.0, -1.0, 0.5, 1.5, 2.5, 5.0)
    WEIGHTS = (0.1, 0.2, 0.3, 0.2, 0.1, 0.1)

    def test_cells_end_halfway_at_zero_at_the_extremes_and_at_the_residual(self):
        found = of_rules([self.NODES], [self.WEIGHTS], 9.0)
        assert found.left.tolist() == [0.0, 1.5, 0.5, 0.5, 0.5, 1.25]
        assert found.right.tolist() == [1.5, 1.0, 0.5, 0.5, 1.25, 0.0]
        low, high, mass = found.pieces
        assert low.tolist() == [-4.0, -2.5, 0.0, 1.0, 2.0, -1.0, 0.5, 1.5, 2.5, 5.0]
        assert high.tolist() == [-4.0, -1.0, 0.5, 1.5, 2.5, 0.0, 1.0, 2.0, 3.75, 5.0]
        np.testing.assert_allclose(
            mass, [0.1, 0.08, 0.15, 0.1, 0.1 * 1.25 / 1.75, 0.12, 0.15, 0.1, 0.1 * 0.5 / 1.75, 0.1], rtol=1e-14
        )
        found = of_rules([self.NODES], [self.WEIGHTS], 0.75)
        assert found.left.tolist() == [0.0, 0.75, 0.5, 0.5, 0.5, 0.75]
        assert found.right.tolist() == [0.75, 0.75, 0.5, 0.5, 0.75, 0.0]

    def test_converged_nodes_and_zeros_are_points(self):
        found = of_rules([(-4.0, -1.0, 0.0, 1.5, 2.5)], [(0.1, 0.2, 0.3, 0.2, 0.2)], 9.0, converged=[-1.0])
        assert (found.left[[1, 2]].tolist(), found.right[[1, 2]].tolist()) == ([0.0, 0.0], [0.0, 0.0])
        assert (found.left[3], found.right[3]) == (1.5, 0.5)

    def test_probes_have_cells_of_their_own_and_share_the_mass(self):
        found = of_rules([self.NODES, (1.0, 2.0, 3.0, NAN, NAN, NAN)], [self.WEIGHTS, (0.2, 0.5, 0.3, 0, 0, 0)], 9.0)
        one = of_rules([self.NODES], [self.WEIGHTS], 9.0)
        assert found.left.tolist() == [*one.left, 0.0, 0.5, 0.5]
        assert found.right.tolist() == [*one.right, 0.5, 0.5, 0.0]
        np.testing.assert_allclose(found.weights, [w / 2 for w in (*self.WEIGHTS, 0.2, 0.5, 0.3)], rtol=1e-15)

    @pytest.mark.parametrize("nodes", [[[3.0]], [[0.0]], [[-1.0, 2.0]], [[1.0, 1.0, 1.0]]])
    def test_one_node_two_nodes_and_equal_nodes_are_points(self, nodes):
        found = of_rules(nodes, np.full(np.shape(nodes), 1 / len(nodes[0])), 9.0)
        low, high, _ = found.pieces
        assert low.tolist() == high.tolist() == nodes[0]

    @reproducibly
    @given(rule=rules(), residual=st.floats(0.0, 10.0))
    def test_keeps_mass_mean_signs_and_range(self, rule, residual):
        nodes, weights = rule
        low, high, mass = of_rules(nodes, weights, residual).pieces
        size = np.nanmax(np.abs(nodes))
        assert mass.sum() == pytest.approx(1.0, abs=1e-12)
        assert mass @ (low + high) / 2 == pytest.approx(quadrature.moments(nodes, weights, 1).mean(), abs=1e-12 * size)
        assert mass[high > 0].sum() == pytest.approx(weights[nodes > 0].sum() / len(nodes), abs=1e-12)
        assert low.min() == np.nanmin(nodes)
        assert high.max() == np.nanmax(nodes)

    def test_is_nearer_to_true_spectra_than_points(self):
        ratios = []
        for eigenvalues in SPECTRA.values():
            spectra = [analyze(eigenvalues, seed, steps=(12,)) for seed in range(3)]
            spread_out = np.mean([wasserstein(one.distribution, eigenvalues) for one in spectra])
            plain = [points(one.nodes[0], one.density_weights[0]) for one in spectra]
            as_points = np.mean([wasserstein(one, eigenvalues) for one in plain])
            ratios.append(spread_out / max(as_points, 1e-12))
        assert max(ratios) < 1.02
        assert np.median(ratios) < 0.95

    def test_of_all_eigenvalues_is_the_spectrum_and_a_peak_at_zero_stays_narrow(self):
        eigenvalues = np.linspace(-1.0, 1.3, 30)
        assert wasserstein(analyze(eigenvalues).distribution, eigenvalues) < 1e-13
        rng = np.random.default_rng(0)
        eigenvalues = np.concatenate([1e-6 * rng.standard_normal(250), 0.02 * rng.standard_t(3, 50), [1.0, 2.0]])
        found = analyze(np.sort(eigenvalues), steps=(25,)).distribution
        assert np.diff(found.cumulative([-3e-3, 3e-3]))[0] > 0.75


UNIFORM = Distribution(np.array([1.0, 4.0]), np.array([0.6, 0.4]), np.array([1.0, 0.0]), np.array([2.0, 0.0]))
"""Two thirds of 0.6 are on the shorter side of the first node; the second one is a point."""


def test_cumulative_shares_by_hand():
    shares = UNIFORM.cumulative([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 3.9, 4.0])
    np.testing.assert_allclose(shares, [0, 0, 0.2, 0.4, 0.5, 0.6, 0.6, 1.0], atol=1e-15)
    below = UNIFORM.cumulative([0.5, 4.0, 4.1], strictly=True)
    np.testing.assert_allclose(below, [0.2, 0.6, 1.0], atol=1e-15)


class TestDensity:
    @pytest.mark.parametrize(
        ("nodes", "weights"),
        [
            ([[-1.0, 0.5, 3.0]], [[0.5, 0.3, 0.2]]),
            ([[-1.0, 0.5, 3.0], [2.0, NAN, NAN]], [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]),
            ([[5.0]], [[1.0]]),  # a single eigenvalue: no width
            ([[-5e-7]], [[1.0]]),
            ([[0.0]], [[1.0]]),  # the zero matrix: no scale either
            ([[1e12, 1.0001e12]], [[0.5, 0.5]]),  # narrow and far from zero
            ([[-1e-30, 1e-30]], [[0.5, 0.5]]),
            # Several probes of a multiple of the identity find the same eigenvalue up to rounding, which is no width.
            ([[1.4], [np.nextafter(1.4, 2)], [np.nextafter(1.4, 1)]], [[1.0]] * 3),
        ],
    )
    def test_integrates_to_one_on_the_default_grid(self, nodes, weights):
        grid, values = of_rules(nodes, weights).density()
        assert np.trapezoid(values, grid) == pytest.approx(1.0, abs=1e-8)
        assert values.min() >= 0

    @pytest.mark.parametrize("sigma", [0.003, 0.1, 0.5, 30.0])
    def test_of_uniform_pieces_is_a_difference_of_normal_distributions(self, sigma):
        grid = np.linspace(-1.0, 5.0, 301)
        _, values = UNIFORM.density(grid, sigma)

        def uniform(low, high):
            # By the upper tails above the middle, where the lower ones would cancel.
            sign = np.where(grid > (low + high) / 2, -1, 1)
            ends = [stats.norm.cdf(sign * (grid - end) / sigma) for end in (low, high)]
            return np.abs(ends[0] - ends[1]) / (high - low)

        expected = 0.4 * uniform(0.0, 1.0) + 0.2 * uniform(1.0, 3.0) + 0.4 * stats.norm.pdf(grid, 4.0, sigma)
        shown = expected > 1e-10 * expected.max()
        np.testing.assert_allclose(values[shown], expected[shown], rtol=1e-3)
        high = expected > 1e-2 * expected.max()
        np.testing.assert_allclose(values[high], expected[high], rtol=1e-6)

    def test_default_sigma_is_one_percent_of_the_width(self):
        found = of_rules([[-1.0, 4.0]], [[0.5, 0.5]])
        (_, default), (_, explicit) = found.density([-1.0, -0.9, 0.0]), found.density([-1.0, -0.9, 0.0], sigma=0.05)
        assert default.tolist() == explicit.tolist()

    def test_refusals(self):
        for sigma in (0.0, -1.0, NAN):
            with pytest.raises(ValueError, match="`sigma` must be positive"):
                UNIFORM.density(sigma=sigma)
        for grid in (0.5, [[0.0, 1.0]]):
            with pytest.raises(ValueError, match="`grid` must be one-dimensional"):
                UNIFORM.density(grid)


class TestHistogram:
    NODES = np.array([[-1.0, 0.0, 3.0], [2.0, NAN, NAN]])
    WEIGHTS = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])

    def test_explicit_edges_by_hand(self):
        mass, edges = histogram(self.NODES, self.WEIGHTS, [-1.0, 0.0, 2.5, 3.0])
        assert (mass.tolist(), edges.tolist()) == ([0.25, 0.625, 0.125], [-1.0, 0.0, 2.5, 3.0])

    @pytest.mark.parametrize("bins", [2, 7, 120])
    def test_zero_is_an_edge_of_a_spectrum_with_both_signs(self, bins):
        mass, edges = histogram(self.NODES, self.WEIGHTS, bins)
        assert 0.0 in edges
        assert bins <= len(mass) <= bins + 1
        np.testing.assert_allclose(np.diff(edges), (3.0 - -1.0) / bins, rtol=1e-12)
        assert (edges[0] <= -1.0, edges[-1] >= 3.0) == (True, True)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_one_sided_spectra_are_laid_from_node_to_node(self, sign):
        nodes = np.sort(sign * np.array([[1.0, 2.0, 5.0]]))
        mass, edges = histogram(nodes, np.array([[0.2, 0.3, 0.5]]), 4)
        assert edges.tolist() == sorted(sign * edge for edge in (1.0, 2.0, 3.0, 4.0, 5.0))
        assert mass.sum() == pytest.approx(1.0, abs=1e-15)

    @pytest.mark.parametrize("node", [5.0, -5.0, 0.0, 1e-30])
    def test_a_single_eigenvalue_has_one_bin(self, node):
        mass, edges = histogram(np.array([[node]]), np.array([[1.0]]))
        assert mass.tolist() == [1.0]
        assert edges[0] < node < edges[-1]

    @reproducibly
    @given(rule=rules(), bins=st.integers(1, 200))
    def test_mass_is_one_and_left_of_zero_it_is_the_negative_weight(self, rule, bins):
        nodes, weights = rule
        mass, edges = histogram(nodes, weights, bins)
        assert mass.shape == (len(edges) - 1,)
        assert mass.min() >= 0
        assert mass.sum() == pytest.approx(1.0, abs=1e-12)
        assert np.all(np.diff(edges) > 0)
        if np.nanmin(nodes) < 0 < np.nanmax(nodes):
            negative = weights[nodes < 0].sum() / len(nodes)
            assert mass[edges[:-1] < 0].sum() == pytest.approx(negative, abs=1e-12)

    @pytest.mark.parametrize("edges", [[-0.5, 3.0], [-1.0, 2.9], [4.0, 5.0], [], [-1.0, NAN, 3.0], [3.0, -1.0]])
    def test_there_is_a_bin_and_edges_enclose_every_node(self, edges):
        # A histogram that silently lost mass would no longer sum to 1.
        with pytest.raises(ValueError, match="bins"):
            histogram(self.NODES, self.WEIGHTS, edges)
        with pytest.raises(ValueError, match="`bins` must be at least 1"):
            histogram(self.NODES, self.WEIGHTS, 0)
        with pytest.raises(ValueError, match="bins"):
            histogram(np.array([[0.0]]), np.array([[1.0]]), [0.0])  # no bin, although the edge "encloses" the node


class TestLargestDistance:
    def test_no_distribution_within_a_band_is_farther(self):
        rng = np.random.default_rng(1)
        for _ in range(50):
            places = np.sort(rng.random(6))
            low, high = np.sort(np.sort(rng.random((2, 6)), axis=1), axis=0)
            low[-1] = high[-1] = 1.0
            reach = rng.uniform(0, 1, (2, 3)) * np.diff(places[[0, 1, 2, 4, 5]]).reshape(2, 2)[:, [0, 1, 1]] / 2
            nodes, weights = places[[1, 2, 4]], rng.dirichlet(np.ones(3))
            as_points = points(nodes, weights)
            for found in (as_points, Distribution(nodes, weights, *np.minimum(reach, places[1] - places[0]))):
                largest = found.largest_distance(places, low, high)
                for share in (0.0, 0.4, 1.0):
                    shares = low + share * (high - low)
                    distance = between(found, places, shares)
                    assert distance <= largest + 1e-12
                    assert found.largest_distance(places, shares, shares) >= distance - 1e-12
                    if found is as_points:
                        assert found.largest_distance(places, shares, shares) == pytest.approx(distance)


def between(found: Distribution, places: np.ndarray, shares: np.ndarray) -> float:
    """Wasserstein-1 distance from the distribution with these shares up to each place, by a fine grid."""
    low, high, mass = found.pieces
    parts = (np.arange(2000) + 0.5) / 2000
    grid = np.add.outer(low, 0 * parts) + np.outer(high - low, parts)
    return stats.wasserstein_distance(places, grid.ravel(), np.diff(shares, prepend=0.0), np.repeat(mass / 2000, 2000))
