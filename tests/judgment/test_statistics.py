"""P-values and intervals of several rules over runs, against other computations and against simulations."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lightning_hesd.judgment.statistics import MAX_ENUMERATED_RUNS, PairedComparison, compare, runs_needed


def noise(runs: int, rules: int, seed: int = 0) -> NDArray[np.float64]:
    """Gains of correlated rules without an effect."""
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(runs, 1)) + generator.normal(size=(runs, rules))) / math.sqrt(2)


def student(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(values.mean(axis=0)) / (values.std(axis=0, ddof=1) / math.sqrt(len(values)))


# P-values -------------------------------------------------------------------------------------------------------------


def test_the_p_values_are_those_of_all_flips_of_students_t() -> None:
    gains = noise(8, 3) + np.array([0.0, 0.4, 1.5])
    flips = [np.array(signs)[:, None] for signs in itertools.product((1, -1), repeat=8)]
    largest = np.array([student(signs * gains).max() for signs in flips])
    expected = [(largest >= t * (1 - 1e-9)).mean() for t in student(gains)]
    assert compare(gains).p_values == pytest.approx(expected, abs=1e-12)
    # Of many runs random flips give nearly the same.
    gains = noise(MAX_ENUMERATED_RUNS + 1, 1) + 0.4
    exact = stats.permutation_test(
        (gains[:, 0],), np.mean, permutation_type="samples", n_resamples=10**6, alternative="two-sided"
    )
    [ours] = compare(gains).p_values
    assert 0.01 < ours < 0.5
    assert ours == pytest.approx(exact.pvalue, abs=4 * math.sqrt(exact.pvalue / 9999))


def test_equal_rules_need_no_correction_and_order_and_unit_make_no_difference() -> None:
    gains = noise(10, 1) + 0.8
    [alone] = compare(gains).p_values
    assert compare(np.hstack([gains] * 20)).p_values == pytest.approx(alone)
    assert compare(np.hstack([gains, noise(10, 5, seed=1)])).p_values[0] > alone
    gains = noise(9, 4) + 0.5
    ours, other = compare(gains), compare(gains[::-1, ::-1] * 1e-6)
    assert other.p_values[::-1] == pytest.approx(ours.p_values)
    assert compare(1e6 * gains).low == pytest.approx(1e6 * ours.low)


def test_a_rule_that_rarely_picks_does_not_hide_the_others() -> None:
    gains = np.hstack([noise(12, 1) + 2.0, np.full((12, 1), math.nan)])
    before = compare(gains).p_values[0]
    gains[:3, 1] = 1.0, 1.001, 0.999  # an enormous t with two degrees of freedom
    found = compare(gains)
    assert before <= 0.05
    assert found.p_values[0] == before
    assert found.p_values[1] > 0.05
    assert np.isnan(found.low[1])


# Few runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_few_runs_never_claim_anything(runs: int) -> None:
    gains = 1 + 1e-3 * noise(runs, 3)
    found = compare(gains)
    assert found.p_values.min() >= 2.0 ** (1 - runs) > found.level
    assert np.isnan([found.low, found.high]).all()
    assert not (found.better | found.worse).any()
    assert compare(1 + 1e-3 * noise(6, 1)).better.all()  # while six can
    for level in (0.3, 0.05, 0.01, 0.001):
        needed = runs_needed(level)
        assert 2.0 ** (1 - needed) <= level < 2.0 ** (2 - needed)


def test_no_runs_no_rules_and_bad_arguments() -> None:
    assert compare(np.zeros((0, 2))).p_values == pytest.approx([math.nan] * 2, nan_ok=True)
    assert compare(np.zeros((7, 0))).p_values.shape == (0,)
    with pytest.raises(ValueError, match=r"of shape \(runs, rules\); got the shape \(3,\)"):
        compare(np.zeros(3))
    with pytest.raises(ValueError, match="must be finite or NaN"):
        compare(np.full((3, 1), math.inf))
    with pytest.raises(ValueError, match=r"`level` must be between 0 and 0.5, got 1"):
        compare(np.zeros((3, 1)), level=1)


def test_evidence_needs_both_the_interval_and_the_p_value() -> None:
    ends = np.array([[0.1, 0.1, -0.1, -0.9, -0.9], [0.9, 0.9, 0.9, -0.1, -0.1]])
    found = PairedComparison(np.ones((9, 5)), *ends, p_values=np.array([0.01, 0.06, 0.01, 0.01, 0.06]), level=0.05)
    assert found.better.tolist() == [True, False, False, False, False]
    assert found.worse.tolist() == [False, False, False, True, False]


# Ties -----------------------------------------------------------------------------------------------------------------


def test_wins_ties_and_losses() -> None:
    gains = np.array([[1.0, 0.0], [-1.0, math.nan], [0.0, 0.0], [2.0, -1.0]])
    found = compare(gains)
    assert (found.wins.tolist(), found.ties.tolist(), found.losses.tolist()) == ([2, 0], [1, 2], [1, 1])
    assert found.counts.tolist() == [4, 3]
    assert found.means == pytest.approx([0.5, -1 / 3])


def test_runs_that_hardly_ever_differ_give_no_interval_and_leave_that_of_others_alone() -> None:
    other = noise(8, 1)
    gains = np.hstack([np.zeros((8, 2)), other])
    gains[3, 1] = 1.0
    found = compare(gains)
    assert np.isnan(found.low[:2]).all()
    assert found.p_values[:2].tolist() == [1.0, 1.0]
    alone = compare(other)
    assert found.high[2] - found.low[2] == pytest.approx(alone.high[0] - alone.low[0], rel=0.2)
    # The same gain in every run is evident.
    found = compare(np.full((7, 1), 0.01))
    assert found.low == pytest.approx([0.01])
    assert found.better.all()


# Intervals ------------------------------------------------------------------------------------------------------------


def test_many_normal_gains_give_students_interval() -> None:
    [gains] = noise(300, 1).T
    found = compare(gains[:, None])
    expected = stats.t.interval(0.95, 299, gains.mean(), gains.std(ddof=1) / math.sqrt(300))
    assert (found.low[0], found.high[0]) == pytest.approx(expected, rel=0.05)


def test_the_intervals_of_many_rules_are_wider_unless_the_rules_are_equal() -> None:
    gains = noise(40, 10)
    widths = [float(found.high[0] - found.low[0]) for found in map(compare, (gains[:, :1], gains))]
    assert 1.1 * widths[0] < widths[1] < 1.7 * widths[0]
    equal = compare(np.hstack([gains[:, :1]] * 10))
    assert float(equal.high[0] - equal.low[0]) == pytest.approx(widths[0], rel=0.05)


# Simulations ----------------------------------------------------------------------------------------------------------


def drawn(kind: str, ties: float, runs: int, rules: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Gains of mean zero of correlated rules: normal or exponential, a share of them exactly zero."""
    normal = (generator.normal(size=(runs, 1)) + generator.normal(size=(runs, rules))) / math.sqrt(2)
    gains = normal if kind == "normal" else stats.expon.ppf(stats.norm.cdf(normal)) - 1
    return np.where(generator.random((runs, rules)) < ties, 0.0, gains)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("runs", [6, 12, 30, 90])
@pytest.mark.parametrize(("kind", "ties"), list(itertools.product(["normal", "skew"], [0.0, 0.5, 0.8])))
def test_false_alarms_and_coverage_of_eight_rules(kind: str, ties: float, runs: int) -> None:
    """The table of the theory page: `pytest --slow -s`."""
    generator, repetitions = np.random.default_rng(1), 400
    alarms = by_test = missed = 0
    for seed in range(repetitions):
        found = compare(drawn(kind, ties, runs, 8, generator), resamples=999, seed=seed)
        alarms += bool((found.better | found.worse).any())
        by_test += bool((found.p_values <= 0.05).any())
        missed += bool(((found.low > 0) | (found.high < 0)).any())
    shares = [count / repetitions for count in (alarms, by_test, missed)]
    figures = f"claims {shares[0]:.3f}, tests {shares[1]:.3f}, intervals {shares[2]:.3f}"
    print(f"\n{runs} runs, {kind}, {ties:.0%} ties: {figures}")  # noqa: T201 - for the theory page
    error = math.sqrt(0.05 * 0.95 / repetitions)
    assert shares[0] <= (0.05 + 3 * error if kind == "normal" else 0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("runs", "effect", "power"), [(6, 2.0, 0.15), (12, 1.5, 0.8), (30, 1.0, 0.9), (90, 0.5, 0.9)])
def test_power_of_eight_rules(runs: int, effect: float, power: float) -> None:
    """An effect on one of the rules, in standard deviations of its gains, is found with this probability at least."""
    generator, repetitions = np.random.default_rng(1), 200
    planted = np.array([effect, *[0.0] * 7])
    gains = [drawn("normal", 0.0, runs, 8, generator) + planted for _ in range(repetitions)]
    share = np.mean([compare(one, resamples=999, seed=seed).better[0] for seed, one in enumerate(gains)])
    print(f"\n{runs} runs, effect {effect}: found {share:.2f}")  # noqa: T201 - for the theory page
    assert share >= power


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("runs", [6, 12, 30, 90])
def test_coverage_of_one_interval_beside_those_of_other_methods(runs: int) -> None:
    """How often intervals at 95 % contain the mean, where the sample has differences; the table of the theory page."""
    generator, repetitions = np.random.default_rng(2), 400
    covered: dict[str, list[float]] = {}
    for kind, ties in itertools.product(["normal", "skew"], [0.0, 0.5, 0.8]):
        effect = 0.5 if kind == "normal" else 1.0
        inside: dict[str, list[bool]] = {}
        for seed in range(repetitions):
            moved = drawn(kind, 0.0, runs, 1, generator) + effect
            gains = np.where(generator.random(moved.shape) < ties, 0.0, moved)
            if np.ptp(gains) == 0:
                continue
            for method, (low, high) in intervals(gains, seed).items():
                inside.setdefault(method, []).append(not (low > effect * (1 - ties) or high < effect * (1 - ties)))
        for method, found in inside.items():
            covered.setdefault(method, []).append(float(np.mean(found)))
    for method, shares in covered.items():
        print(f"\n{runs} runs, {method}: {min(shares):.2f} to {max(shares):.2f}")  # noqa: T201 - for the theory page
    assert min(covered["ours"]) >= 0.88
    assert min(covered["ours"]) > max(min(covered[method]) for method in ("percentile", "BCa", "Student"))


def intervals(gains: NDArray[np.float64], seed: int) -> dict[str, tuple[float, float]]:
    """Intervals of the mean by several methods."""
    ours = compare(gains, resamples=999, seed=seed)
    mean, error = gains.mean(), gains.std(ddof=1) / math.sqrt(len(gains))
    found = {
        "Student": stats.t.interval(0.95, len(gains) - 1, mean, error),
        "ours": (ours.low[0], ours.high[0]),  # NaN, where there is none, excludes nothing
    }
    for method in ("percentile", "BCa"):
        bootstrap = stats.bootstrap((gains[:, 0],), np.mean, n_resamples=999, method=method, rng=seed)
        found[method] = tuple(bootstrap.confidence_interval)
    return found
