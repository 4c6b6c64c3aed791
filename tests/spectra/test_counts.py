"""Numbers of eigenvalues and bands against true spectra, the Radau rule by the recurrence, and exact probabilities."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.distances import wasserstein
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra import counts
from tests.example_spectra import SMALL, analyze
from tests.example_spectra import SMALL_POPULATION as SPECTRA
from tests.example_spectra import run as finished_run

LEVELS = (0.5, 0.1, 0.01, 0.001)


def rule(alphas, betas, dimension=SMALL) -> counts.Rule:
    nodes, weights, residuals = gauss_quadrature(alphas, betas)
    return counts.Rule(nodes, weights, residuals, np.zeros(len(nodes), dtype=bool), dimension, 1e-15)


def run(eigenvalues: np.ndarray, steps: int, seed: int = 0) -> tuple[np.ndarray, Lanczos]:
    """Return the start vector, of unit length, and the run."""
    lanczos = finished_run(eigenvalues, steps, torch.Generator().manual_seed(seed))
    return lanczos.ritz_vectors(np.eye(len(lanczos.alphas)))[0].numpy(), lanczos


def radau(alphas: np.ndarray, betas: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The Gauss-Radau rule by Golub's change of the last diagonal element of T (Golub & Meurant, section 6.2)."""
    m = len(alphas)
    matrix = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    last = np.linalg.solve(matrix - threshold * np.eye(m), betas[-1] ** 2 * np.eye(m)[-1])[-1]
    extended = np.diag([*alphas, threshold + last]) + np.diag(betas, 1) + np.diag(betas, -1)
    nodes, vectors = np.linalg.eigh(extended)
    return nodes, vectors[0] ** 2


class TestSharesOfTheStartVector:
    @pytest.mark.parametrize("steps", [1, 2, 12])
    @pytest.mark.parametrize("name", ["uniform", "outliers", "both signs"])
    def test_are_those_of_the_gauss_radau_rule(self, name, steps):
        _, lanczos = run(SPECTRA[name], steps)
        for threshold in np.quantile(SPECTRA[name], [0.02, 0.4, 0.77, 0.98]) + 1e-4:
            nodes, weights = radau(lanczos.alphas, lanczos.betas, threshold)
            at = np.argmin(np.abs(nodes - threshold))
            low, high = rule(lanczos.alphas, lanczos.betas).rest_share_below(threshold)
            assert (low, high) == pytest.approx((weights[:at].sum(), weights[: at + 1].sum()), abs=1e-9)

    @pytest.mark.parametrize("steps", [1, 12, 30])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_enclose_the_true_share_at_every_threshold(self, name, steps):
        eigenvalues = SPECTRA[name]
        start, lanczos = run(eigenvalues, steps, seed=4)
        found = rule(lanczos.alphas, lanczos.betas)
        size = np.abs(eigenvalues).max()
        # At eigenvalues, nodes, next to them, far outside, at huge ones and at infinity.
        near = [node * (1 + shift) for node in found.nodes for shift in (-1e-6, -1e-10, 0.0, 1e-10, 1e-6)]
        far = [-2 * size, 2 * size, -1e12 * size, 1e12 * size, -math.inf, math.inf]
        for threshold in [*eigenvalues[::9], *near, *far]:
            low, high = found.rest_share_below(threshold)
            margin = 1e-13 * size
            least = float((start[eigenvalues <= threshold - margin] ** 2).sum())
            most = float((start[eigenvalues <= threshold + margin] ** 2).sum())
            assert 0 <= low <= high + 1e-12
            assert high <= 1
            assert low <= most + 1e-7  # the rounding of the rule next to a node
            assert least <= high + 1e-7

    def test_of_the_rest_leave_converged_nodes_out(self):
        eigenvalues = SPECTRA["outliers"]
        start, _ = run(eigenvalues, 1, seed=2)
        spectrum = analyze(eigenvalues, 2)
        [found] = spectrum._rules
        known = spectrum.nodes[0][spectrum.converged_nodes[0]]
        assert len(known) >= 9
        rest = np.abs(eigenvalues[:, None] - known).min(axis=1) > 1e-9
        share = start**2 * rest / (start**2 * rest).sum()
        for threshold in [-0.01, 0.0, 0.02, *known]:  # also where an eigenvalue is
            low, high = found.rest_share_below(threshold)
            assert low - 1e-9 <= share[eigenvalues <= threshold].sum() <= high + 1e-9

    @pytest.mark.parametrize("distance", [1e-12, 1e-9, 1e-6])
    def test_close_to_a_node_are_those_of_exact_arithmetic(self, distance):
        """Eigenvectors of the rule's matrix in float64 are wrong by up to 4e-7 there."""
        generator = np.random.default_rng(0)
        nodes = np.sort(np.concatenate([1e-9 * generator.normal(size=4), generator.normal(size=4)]))
        weights = generator.dirichlet(np.ones(8))
        residuals = 10.0 ** generator.uniform(-10, 0, 8)
        rule = counts.Rule(nodes, weights, residuals, np.zeros(8, dtype=bool), 1000, 1e-16)
        with mpmath.workdps(60):
            for threshold in (nodes[2] + 1e-5 * distance, nodes[6] - distance, nodes[7] + distance):
                ratios = [
                    mpmath.mpf(r) ** 2 / (mpmath.mpf(x) - threshold) for x, r in zip(nodes, residuals, strict=True)
                ]
                matrix = mpmath.diag([*nodes, threshold + sum(ratios)])
                for i, residual in enumerate(residuals):
                    matrix[i, 8] = matrix[8, i] = (-1) ** i * mpmath.mpf(residual)
                values, vectors = mpmath.eigsy(matrix)
                roots = [mpmath.sqrt(weight) for weight in weights]
                shares = [sum(roots[i] * vectors[i, j] for i in range(8)) ** 2 for j in range(9)]
                place = min(range(9), key=lambda j: abs(values[j] - threshold))
                exact = [float(sum(shares[:place])), float(sum(shares[: place + 1]))]
                np.testing.assert_allclose(
                    rule.rest_share_below(float(threshold)), exact, rtol=0, atol=counts.MIN_SHARE
                )

    @pytest.mark.parametrize("tiny", [0.0, 1e-200, 1e-25])
    @pytest.mark.parametrize("coupling", [0.0, 0.1])
    def test_a_node_at_the_threshold_may_be_on_either_side(self, tiny, coupling):
        nodes, weights, residuals = np.array([[-1.0, tiny, 1.0], [0.2, 0.3, 0.5], [0.0, coupling, 0.0]])
        rule = counts.Rule(nodes, weights, residuals, np.zeros(3, dtype=bool), 1000, 1e-16)
        np.testing.assert_allclose(rule.rest_share_below(0.0), [0.2, 0.5], rtol=0, atol=counts.MIN_SHARE)


class TestNumbersFromShares:
    @pytest.mark.parametrize("failure", [0.3, 0.025, 1e-6])
    @pytest.mark.parametrize("n", [1, 2, 3, 20, 1000])
    def test_fail_no_more_often_than_they_say(self, n, failure):
        # The share along k eigenvectors is Beta(k/2, (n − k)/2); both bounds grow with the share.
        shares = np.concatenate([np.geomspace(1e-9, 0.5, 400), 1 - np.geomspace(0.5, 1e-9, 400)])
        least, most = counts.rest_counts(shares, shares, n, failure)
        assert (np.diff([least, most]) >= 0).all()
        for k in {1, 2, 3, n // 10, n // 2, n - 1} & set(range(1, n)):
            beta = stats.beta(k / 2, (n - k) / 2)
            too_many, too_few = shares[least > k], shares[most < k]
            assert too_many.size == 0 or beta.sf(too_many.min()) <= failure
            assert too_few.size == 0 or beta.cdf(too_few.max()) <= failure

    def test_are_not_much_wider_than_exact_ones_and_the_least_share_takes_an_eigenvector(self):
        n, failure, share = 1000, 0.025, 0.1
        [low], [high] = counts.rest_counts(np.array([share]), np.array([share]), n, failure)
        possible = [k for k in range(1, n) if failure <= stats.beta(k / 2, (n - k) / 2).cdf(share) <= 1 - failure]
        assert 0.6 * (high - low) < possible[-1] - possible[0] < high - low
        low, high = counts.rest_counts(np.array([1e-6, 1 - 1e-9]), np.array([1e-3, 1 - 1e-6]), 100, 0.01)
        assert (low[0], high[1]) == (1, 99)

    @pytest.mark.parametrize("n", [0, 1, 2, 500])
    def test_of_nothing_and_of_everything_are_certain(self, n):
        low, high = counts.rest_counts(np.array([0.0, 1.0]), np.array([0.0, 1.0]), n, 0.01)
        assert (low.tolist(), high.tolist()) == ([0, n], [0, n])


def true_count(eigenvalues: np.ndarray, above: float, below: float) -> int:
    return int(((eigenvalues > above) & (eigenvalues <= below)).sum())


class TestCount:
    @pytest.mark.parametrize(("steps", "dtype"), [((30,), torch.float32), ((20, 9, 14), torch.float64)])
    def test_covers(self, steps, dtype):
        hits = total = 0
        for eigenvalues in SPECTRA.values():
            size = np.abs(eigenvalues).max()
            ranges = [(level * size, math.inf) for level in LEVELS]
            ranges += [(-math.inf, -level) for level, _ in ranges]
            for seed in range(4):
                spectrum = analyze(eigenvalues, seed, steps, dtype)
                for above, below in [*ranges, (0.01 * size, 0.3 * size)]:
                    low, high = spectrum.count(above, below)
                    hits += low <= true_count(eigenvalues, above, below) <= high
                    total += 1
        assert hits >= 0.95 * total

    def test_of_what_has_converged_is_exact_unless_it_is_the_threshold_or_there_is_no_basis(self):
        eigenvalues = SPECTRA["outliers"]
        spectrum = analyze(eigenvalues)
        for threshold in (9.0, 4.0, 0.5):
            expected = true_count(eigenvalues, threshold, math.inf)
            assert spectrum.count(above=threshold) == (expected, expected)
            assert spectrum.count(below=threshold) == (SMALL - expected, SMALL - expected)
        eigenvalues = np.geomspace(10, 1, 12)
        assert analyze(eigenvalues).count(above=eigenvalues[3]) == (3, 4)
        low, high = analyze(SPECTRA["outliers"], basis="none").count(above=4.0)
        assert low < 4 < high

    @pytest.mark.parametrize("eigenvalues", [np.linspace(-1.0, 1.3, 30), np.array([2.0]), np.array([-1.0, 2.0])])
    def test_of_every_eigenvalue_known(self, eigenvalues):
        spectrum = analyze(eigenvalues)
        for above, below in ((-math.inf, math.inf), (-0.5, 0.7), (0.01, math.inf), (-math.inf, -2.0), (5.0, math.inf)):
            assert spectrum.count(above, below) == (true_count(eigenvalues, above, below),) * 2
        assert spectrum.density_error < 1e-12

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_does_not_depend_on_the_scale(self, scale):
        eigenvalues = SPECTRA["both signs"]
        for level in (0.3, 0.02):
            expected = analyze(eigenvalues, 1).count(above=level)
            assert analyze(scale * eigenvalues, 1).count(above=scale * level) == expected

    def test_more_confidence_is_wider(self):
        intervals = [analyze(SPECTRA["uniform"], confidence=c).count(above=0.5) for c in (0.5, 0.95, 0.9999)]
        lows, highs = zip(*intervals, strict=True)
        assert list(lows) == sorted(lows, reverse=True)
        assert list(highs) == sorted(highs)
        assert len(set(intervals)) == 3

    def test_of_an_empty_interval_is_an_error(self):
        for above, below in ((1.0, 0.0), (1.0, 1.0), (math.nan, 1.0), (0.0, math.nan)):
            with pytest.raises(ValueError, match="`above` must be less than `below`"):
                analyze(SPECTRA["uniform"], steps=(3,)).count(above, below)


def distribution(eigenvalues: np.ndarray, points: np.ndarray, side: str) -> np.ndarray:
    return np.searchsorted(np.sort(eigenvalues), points, side=side) / len(eigenvalues)


class TestCumulativeBand:
    @pytest.mark.parametrize(("steps", "dtype"), [((30,), torch.float32), ((20, 9), torch.float64)])
    def test_covers_and_so_does_the_distance(self, steps, dtype):
        band = near = total = 0
        for eigenvalues in SPECTRA.values():
            for seed in range(3):
                spectrum = analyze(eigenvalues, seed, steps, dtype)
                margin = 3 * spectrum.rounding
                points, low, high = spectrum.cumulative_band
                band += (distribution(eigenvalues, points + margin, "right") >= low - 1e-12).all() and (
                    distribution(eigenvalues, points[1:] - margin, "left") <= high[:-1] + 1e-12
                ).all()
                width = points[-1] - points[0]
                near += wasserstein(spectrum.distribution, eigenvalues) <= spectrum.density_error * width + margin
                total += 1
        assert band >= 0.95 * total
        assert near >= 0.95 * total

    def test_is_a_distribution_that_steps_and_converged_nodes_make_narrower(self):
        points, low, high = analyze(SPECTRA["both signs"], steps=(25, 8)).cumulative_band
        assert (np.diff(points) > 0).all()
        assert (np.diff([low, high]) >= 0).all()
        assert (low <= high).all()
        assert low[-1] == high[-1] == 1
        points, low, high = analyze(SPECTRA["outliers"]).cumulative_band
        between = np.flatnonzero((points[:-1] > 0.9) & (np.diff(points) > 0.1))
        assert len(between) == 8
        np.testing.assert_allclose(low[between], high[between], atol=1e-12)
        few, many = (analyze(SPECTRA["power law"], steps=(m,)).density_error for m in (5, 40))
        plain = analyze(SPECTRA["power law"], basis="none").density_error
        assert many < min(few, plain) / 3

    @pytest.mark.parametrize(
        "eigenvalues", [np.zeros(9), np.full(9, 3.0), np.array([2.0])], ids=["zero", "equal", "one"]
    )
    def test_of_equal_eigenvalues(self, eigenvalues):
        assert analyze(eigenvalues).density_error == 0.0
