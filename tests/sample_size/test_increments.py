"""Increments of means over random orders, against all orders there are."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from lightning_hesd.sample_size.increments import check_orders, checked_losses, fit_rate, increments, scale_of_sizes


def by_definition(ordered: np.ndarray) -> np.ndarray:
    means = [ordered[:k].mean(axis=0) for k in range(1, len(ordered) + 1)]
    return np.diff(means, axis=0)


def lognormal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(size=count)


def all_orders(values: np.ndarray) -> np.ndarray:
    return np.array([by_definition(values[list(order)]) for order in itertools.permutations(range(len(values)))])


class TestIncrements:
    def test_are_differences_of_means_in_orders_that_are_equally_likely(self) -> None:
        values = lognormal(4)
        possible = all_orders(values)
        counts = np.zeros(len(possible))
        for curve in increments(values[:, None], 2400, seed=3):
            matches = np.isclose(curve[:, 0], possible, rtol=1e-12, atol=0).all(axis=1)
            assert matches.sum() == 1
            counts += matches
        # χ² with 23 degrees of freedom exceeds 49.7 once in a thousand times.
        assert ((counts - 100) ** 2 / 100).sum() < 49.7

    def test_a_common_shift_costs_no_digits(self) -> None:
        # Multiples of 2⁻²⁰, so that the shifted values, and their means over 64, are exact.
        values = np.random.default_rng(0).integers(0, 2**20, (64, 1)) / 2.0**20
        for plain, shifted in zip(increments(values, 3, 0), increments(values + 2.0**24, 3, 0), strict=True):
            np.testing.assert_array_equal(plain, shifted)


class TestFitRate:
    @pytest.mark.parametrize("exponent", [-2.0, -1.0, -0.5])
    def test_finds_powers(self, exponent: float) -> None:
        curve = 3 * scale_of_sizes(50) ** exponent
        found, error = fit_rate([0.5 * curve, 1.5 * curve], curve)
        assert found == pytest.approx(exponent, rel=1e-12)
        assert error == pytest.approx(0.0, abs=1e-12)

    def test_the_stated_error_is_the_standard_deviation_over_sets_of_orders(self) -> None:
        values = lognormal(60)[:, None]
        found = []
        for seed in range(300):
            curves = [np.abs(curve[:, 0]) for curve in increments(values, 30, seed)]
            found.append(fit_rate(curves, np.mean(curves, axis=0)))
        rates, errors = np.array(found).T
        # A standard deviation of 300 is good to 4 %; the linearization is off by the relative error of a mean of 30.
        assert rates.std(ddof=1) == pytest.approx(errors.mean(), rel=0.15)

    def test_leaves_out_what_has_no_logarithm(self) -> None:
        curve = 2 / scale_of_sizes(9)
        curve[3] = 0.0
        assert fit_rate([curve, curve], curve)[0] == pytest.approx(-1.0, rel=1e-12)
        nothing = np.where(np.arange(8) == 2, curve, 0.0)
        assert all(math.isnan(value) for value in fit_rate([nothing, nothing], nothing))


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        *((checked_losses, (v,), r"shape \(N,\) with N at least 3, got \(") for v in ([1.0] * 2, [[1.0] * 3], 1.0)),
        (checked_losses, ([1.0, 2.0, math.nan],), "`losses` must be finite, got nan for sample 2"),
        (checked_losses, ([1.0, 2.0, math.inf],), "`losses` must be finite, got inf for sample 2"),
        *((check_orders, (n, 0), "`orders` must be an integer of at least 2, got") for n in (1, 2.0, True, None)),
        *((check_orders, (2, seed), "`seed` must be a non-negative integer, got") for seed in (-1, 0.0, True, None)),
    ],
)
def test_refusals(check: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*arguments)
