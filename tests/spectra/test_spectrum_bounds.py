"""`spectrum_bounds`: what Lanczos may have missed, against the polynomials themselves and against its own theorem."""

import functools
import itertools
import math

import numpy as np
import pytest

from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra.eigenvalue_bounds import log_excess, spectrum_bounds
from lightning_hesd.spectra.quadrature import stack_rules

Tridiagonal = tuple[np.ndarray, np.ndarray]

SPECTRA: dict[str, np.ndarray] = {
    "uniform": np.linspace(-1.0, 2.0, 120),
    "outlier": np.concatenate([np.linspace(-1.0, 1.0, 119), [6.0]]),
    "lone negative": np.concatenate([[-0.5], np.linspace(0.0, 4.0, 119) ** 2]),
    "close top": np.concatenate([np.linspace(-1.0, 0.0, 118), [0.99, 1.0]]),
    "positive": np.geomspace(1e-3, 10.0, 120),
    "negative": -np.geomspace(1e-3, 10.0, 120),
}
FAILURES = (0.15, 0.025)


def make_start(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def tridiagonal(spectrum: np.ndarray, start: np.ndarray, steps: int) -> Tridiagonal:
    """Lanczos on a diagonal matrix, reorthogonalized without thrift."""
    basis = [start / np.linalg.norm(start)]
    alphas, betas = [], []
    for _ in range(steps):
        vector = spectrum * basis[-1]
        alphas.append(basis[-1] @ vector)
        for _ in range(2):
            vector = vector - np.array(basis).T @ (np.array(basis) @ vector)
        betas.append(np.linalg.norm(vector))
        basis.append(vector / (betas[-1] or 1.0))
    return np.array(alphas), np.array(betas)


def bounds(probes: list[Tridiagonal], dimension: int, failure: float) -> tuple[float, float]:
    return spectrum_bounds(*stack_rules([gauss_quadrature(*probe) for probe in probes]), dimension, failure)


def kernel(probe: Tridiagonal, x: float) -> float:
    """K(x) = Σ_j p_j(x)², j = 0, ..., m, by the three-term recurrence, in extended precision."""
    previous, current = np.longdouble(0), np.longdouble(1)
    total, beta_before = current**2, np.longdouble(0)
    for alpha, beta in zip(*probe, strict=True):
        previous, current = current, ((np.longdouble(x) - alpha) * current - beta_before * previous) / beta
        beta_before = np.longdouble(beta)
        total += current**2
    return float(total)


@functools.cache
def largest_density(n: int) -> float:
    """The density of |one coordinate| of a unit vector uniform on the sphere, at zero, where it is largest (n >= 3)."""
    t = np.linspace(-1.0, 1.0, 200_001)
    return 2 / float(np.trapezoid((1 - t**2) ** ((n - 3) / 2), t))


class TestLogExcess:
    """The test that comes before the bounds, at given limits."""

    @pytest.mark.parametrize(("steps", "failure"), [(1, 0.15), (5, 0.025), (12, 1e-4)])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_is_the_kernel_at_the_nearer_limit(self, name, steps, failure):
        probe = tridiagonal(SPECTRA[name], make_start(120, 0), steps)
        nodes = gauss_quadrature(*probe)[0]
        limits = nodes[0] - 0.1 * np.ptp(SPECTRA[name]), nodes[-1] + 0.01 * np.ptp(SPECTRA[name])
        smallest = min(kernel(probe, limit) for limit in limits)
        expected = math.log(max(largest_density(120), 1.0) / math.sqrt(smallest) / failure)
        assert log_excess(*probe, limits, 120, failure) == pytest.approx(expected, rel=1e-6, abs=1e-6)

    def test_infinite_limits_limit_nothing_and_limits_inside_are_never_kept(self):
        probe = tridiagonal(SPECTRA["outlier"], make_start(120, 0), 12)
        assert log_excess(*probe, (-math.inf, math.inf), 120, 0.025) == -math.inf
        assert log_excess(*probe, (-math.inf, 5.0), 120, 0.025) == math.inf
        assert log_excess(*probe, (0.0, math.inf), 120, 0.025) == math.inf


class TestAgainstTheRecurrence:
    @pytest.mark.parametrize(("steps", "failure"), [(1, 0.15), (2, 1e-4), (5, 0.025), (12, 1e-4)])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_there_the_start_vector_becomes_as_improbable_as_failure(self, name, steps, failure):
        spectrum = SPECTRA[name]
        n = len(spectrum)
        for sign in (1.0, -1.0):
            probe = tridiagonal(sign * spectrum, make_start(n, 3), steps)
            nodes, weights, _ = gauss_quadrature(*probe)
            low, high = bounds([probe], n, failure)
            for end, mirror, weight in ((high, 1.0, weights[-1]), (low, -1.0, weights[0])):
                outermost = mirror * (mirror * nodes).max()
                unlucky = min(1.0, largest_density(n) * math.sqrt(weight))  # how improbable the start is in any case

                def probability(share: float, end: float = end, outermost: float = outermost, probe=probe) -> float:
                    x = outermost + share * (end - outermost)
                    return min(1.0, largest_density(n) / math.sqrt(kernel(probe, x)))

                # The distance is found to a thousandth.
                assert probability(1.0 + 1e-6) <= failure * unlucky <= probability(1.0 - 2e-3)

    def test_an_unlucky_start_is_allowed_for(self):
        # The outlier was found although the start vector had next to nothing of it. `failure` is then that of what may
        # lie beyond, relative to that of such a start; or the bound would be the node itself.
        spectrum, failure = SPECTRA["outlier"], 0.025
        probe = tridiagonal(spectrum, with_component(120, 119, 1e-4, seed=2), 10)
        nodes, weights, _ = gauss_quadrature(*probe)
        assert nodes[-1] == pytest.approx(6.0, rel=1e-3)
        unlucky = largest_density(120) * math.sqrt(weights[-1])
        assert unlucky < failure / 10
        _, high = bounds([probe], 120, failure)
        assert high > nodes[-1]
        below, beyond = (kernel(probe, nodes[-1] + share * (high - nodes[-1])) for share in (1.0 - 2e-3, 1.0 + 1e-6))
        assert largest_density(120) / math.sqrt(beyond) <= failure * unlucky <= largest_density(120) / math.sqrt(below)

    @pytest.mark.parametrize("count", [2, 3])
    def test_several_starts_are_as_improbable_together(self, count):
        # Products of uniform random numbers fall below q with probability q·Σ(−log q)ʲ/j!.
        n, failure = 120, 0.025
        probes = [tridiagonal(SPECTRA["uniform"], make_start(n, seed), 6) for seed in range(count)]
        largest = max(gauss_quadrature(*probe)[0][-1] for probe in probes)
        _, high = bounds(probes, n, failure)

        def together(x: float) -> float:
            q = math.prod(min(1.0, largest_density(n) / math.sqrt(kernel(probe, x))) for probe in probes)
            return q * sum((-math.log(q)) ** j / math.factorial(j) for j in range(count))

        assert together(largest + 1e-9) == pytest.approx(1.0)  # no unlucky start among these
        assert together(high + 1e-6) <= failure <= together(largest + (1 - 2e-3) * (high - largest))

    def test_one_step_in_closed_form(self):
        # K(x) = 1 + ((x − α)/β)².
        low, high = bounds([(np.array([0.5]), np.array([2.0]))], 100, 0.1)
        distance = 2.0 * math.sqrt((largest_density(100) / 0.1) ** 2 - 1)
        assert (low, high) == pytest.approx((0.5 - distance, 0.5 + distance), rel=2e-3)
        # On small spheres: in three dimensions one coordinate is uniform (Archimedes), in two more likely to be large.
        for dimension in (2, 3):
            _, high = bounds([(np.array([0.0]), np.array([1.0]))], dimension, 0.1)
            assert high == pytest.approx(math.sqrt(1 / 0.1**2 - 1), rel=2e-3)

    @pytest.mark.parametrize("spectrum", [[2.0], [-1.0, 3.0], [-1.0, 0.5, 3.0]], ids=len)
    def test_as_many_steps_as_dimensions_leave_nothing_outside(self, spectrum):
        n = len(spectrum)
        alphas, betas = tridiagonal(np.array(spectrum), np.arange(1.0, n + 1), n)
        betas[-1] = 0.0
        low, high = bounds([(alphas, betas)], n, 0.01)
        assert (low, high) == pytest.approx((spectrum[0], spectrum[-1]), rel=1e-14)


@pytest.mark.parametrize(("scale", "shift"), [(1e-100, 0.0), (1e100, 0.0), (1.0, 20.0)])
def test_scales_and_shifts_with_the_matrix(scale, shift):
    alphas, betas = tridiagonal(SPECTRA["uniform"], make_start(120, 1), 10)
    expected = scale * np.array(bounds([(alphas, betas)], 120, 0.05)) + shift
    found = np.array(bounds([(scale * alphas + shift, scale * betas)], 120, 0.05))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * scale)


class TestBreakdown:
    def test_one_dimension_and_a_zero_matrix_have_nothing_outside(self):
        rule = (np.array([[1.0]]), np.array([[1.0]]), np.array([[1e-9]]))
        assert spectrum_bounds(*rule, 1, 0.05) == pytest.approx((1.0, 1.0), abs=1e-6)
        assert bounds([(np.zeros(1), np.zeros(1))], 50, 0.05) == (0.0, 0.0)

    def test_one_invariant_space_leaves_nothing_outside(self):
        whole = (np.array([1.0, 2.0]), np.array([0.5, 0.0]))
        unfinished = (np.array([1.5]), np.array([3.0]))
        nodes, _, _ = gauss_quadrature(*whole)
        for probes in ([whole], [whole, unfinished], [unfinished, whole]):
            assert bounds(probes, 1000, 1e-6) == (nodes[0], nodes[-1])

    def test_a_hundred_probes_are_no_trouble(self):
        # Their probabilities multiply, and factorials of their number are no longer floats. That the bound still moves
        # inwards shows that no term of the sum was lost.
        probes = [tridiagonal(SPECTRA["outlier"], make_start(120, k), 4) for k in range(300)]
        lows, highs = zip(*(bounds(probes[:count], 120, 0.025) for count in (100, 140, 200, 300)), strict=True)
        assert list(lows) == sorted(lows)
        assert list(highs) == sorted(highs, reverse=True)

    @pytest.mark.parametrize("beta", [1e-8, 1e-14, 1e-200])
    def test_an_almost_invariant_space_leaves_almost_nothing(self, beta):
        nearly = (np.array([1.0, 2.0]), np.array([0.5, beta]))
        nodes, _, _ = gauss_quadrature(*nearly)
        low, high = bounds([nearly], 1000, 1e-3)
        scale = largest_density(1000) / 1e-3  # |x − θ| = β·this at the end of one converged node
        assert nodes[0] - 2 * scale * beta <= low <= nodes[0]
        assert nodes[-1] <= high <= nodes[-1] + 2 * scale * beta + 1e-15


# The theorem itself: for every start vector whose component q along the extreme eigenvector is not as improbable as
# `failure`, the bound holds. Nothing here is left to chance, so no single exception is allowed.
COMPONENTS = np.geomspace(1e-6, 0.5, 13)


def with_component(n: int, position: int, component: float, seed: int) -> np.ndarray:
    """A unit vector with this component at `position`, and random ones elsewhere."""
    rest = np.random.default_rng(seed).normal(size=n)
    rest[position] = 0.0
    rest *= math.sqrt(1 - component**2) / np.linalg.norm(rest)
    rest[position] = component
    return rest


class TestGuarantee:
    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_holds_at_every_step_for_every_start_that_is_no_less_probable(self, name, failure):
        spectrum = np.sort(SPECTRA[name])
        n, slack = len(spectrum), 1e-12 * np.abs(spectrum).max()
        density = largest_density(n)
        missed = 0
        for sign, component in itertools.product((1.0, -1.0), COMPONENTS):
            position = n - 1 if sign > 0 else 0
            alphas, betas = tridiagonal(spectrum, with_component(n, position, component, seed=4), 24)
            for steps in (1, 2, 4, 8, 16, 24):
                low, high = bounds([(alphas[:steps], betas[:steps])], n, failure)
                holds = high >= spectrum[-1] - slack if sign > 0 else low <= spectrum[0] + slack
                missed += not holds
                # Its probability is at most this; below `failure` nothing is promised.
                assert holds or density * component <= failure
        if failure == FAILURES[0] and name in {"outlier", "lone negative"}:
            assert missed > 0  # a bound that is never wrong would prove nothing here

    @pytest.mark.parametrize("name", SPECTRA)
    def test_holds_for_several_probes_unless_all_together_are_improbable(self, name):
        spectrum, failure = np.sort(SPECTRA[name]), 0.1
        n, slack = len(spectrum), 1e-12 * np.abs(spectrum).max()
        density = largest_density(n)
        for components in itertools.product(np.geomspace(1e-5, 0.3, 6), repeat=2):
            probes = [
                tridiagonal(spectrum, with_component(n, n - 1, component, seed), 6)
                for seed, component in enumerate(components)
            ]
            product = math.prod(min(1.0, density * component) for component in components)
            # Two uniform random numbers multiply to at most q with probability q(1 − log q).
            if product * (1 - math.log(product)) > failure:
                assert bounds(probes, n, failure)[1] >= spectrum[-1] - slack
