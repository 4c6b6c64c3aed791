"""Loss differences: identities that hold exactly, errors that are what they say, and the figure."""

import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from lightning_hesd.sample_size.loss_differences import differences_of, loss_differences
from lightning_hesd.sample_size.sample_losses import per_sample_losses
from tests.cases import cross_entropy
from tests.sample_size.test_increments import lognormal
from tests.sample_size.test_sample_losses import batches, each, network


def all_orders(losses: np.ndarray) -> np.ndarray:
    """|L_{k+1} − L_k| for every order there is, by definition, shape (N!, N − 1)."""
    orders = np.array(list(itertools.permutations(losses)))
    return np.abs(np.diff(np.cumsum(orders, axis=1) / np.arange(1, len(losses) + 1), axis=1))


class TestAgainstAllOrders:
    def test_mean_standard_error_and_expected_rms(self) -> None:
        found, true = differences_of(lognormal(6), orders=4000), all_orders(lognormal(6))
        assert (np.abs(found.mean - true.mean(axis=0)) < 4 * found.standard_error).all()
        np.testing.assert_allclose(found.standard_error, true.std(axis=0) / math.sqrt(4000), rtol=0.1)
        np.testing.assert_allclose(found.expected_rms, np.sqrt((true**2).mean(axis=0)), rtol=1e-12)

    def test_bands_cover_as_often_as_they_say(self) -> None:
        truth = all_orders(lognormal(6)).mean(axis=0)
        inside = []
        for seed in range(300):
            low, high = differences_of(lognormal(6), orders=20, seed=seed, confidence=0.8).band
            inside.append((low <= truth) & (truth <= high))
        # Twenty skewed differences: the coverage of Student's interval is right to a few percent.
        np.testing.assert_allclose(np.mean(inside, axis=0), 0.8, atol=0.08)


def test_the_band_is_student_s() -> None:
    found = differences_of(lognormal(6), orders=3, confidence=0.9)
    low, high = found.band
    half = stats.t.ppf(0.95, 2) * found.standard_error
    np.testing.assert_allclose(high, found.mean + half, rtol=1e-4)
    np.testing.assert_allclose(low, np.maximum(found.mean - half, 0.0), rtol=1e-3)
    assert (low == 0).any()  # an absolute difference is not below 0


class TestRate:
    @pytest.mark.parametrize("draw", ["lognormal", "uniform"])
    def test_is_minus_one_and_the_constant_the_mean_absolute_deviation_whatever_the_losses(self, draw: str) -> None:
        losses = getattr(np.random.default_rng(1), draw)(size=2000)
        found = differences_of(losses)
        assert found.rate == pytest.approx(-1.0, abs=0.02)
        assert 0.001 < found.rate_error < 0.01
        assert found.constant == pytest.approx(np.abs(losses - losses.mean()).mean(), rel=0.01)

    def test_scale_and_shift(self) -> None:
        plain, other = differences_of(lognormal(50)), differences_of(5 - 3 * lognormal(50))
        np.testing.assert_allclose(other.mean, 3 * plain.mean, rtol=1e-12)
        np.testing.assert_allclose(other.standard_error, 3 * plain.standard_error, rtol=1e-11)
        assert other.rate == pytest.approx(plain.rate, rel=1e-12)

    def test_losses_that_do_not_differ_have_none(self) -> None:
        found = differences_of([2.0] * 5)
        assert (found.mean == found.expected_rms).all()
        assert math.isnan(found.rate)


class TestSmoothed:
    def test_is_the_paper_s(self) -> None:
        found = differences_of(lognormal(30))
        expected = [found.mean[0]]
        for value in found.mean[1:]:
            expected.append(0.99 * expected[-1] + (1 - 0.99) * value)
        np.testing.assert_allclose(found.smoothed(0.99), expected, rtol=1e-13)
        np.testing.assert_array_equal(found.smoothed(), found.smoothed(0.99))
        np.testing.assert_array_equal(found.smoothed(0.0), found.mean)
        for factor in (1.0, -0.1, math.nan):
            with pytest.raises(ValueError, match="`factor` must be at least 0 and less than 1, got"):
                found.smoothed(factor)


class TestOfANetwork:
    @pytest.mark.parametrize("loss_fn", [each, cross_entropy])
    def test_is_that_of_its_losses(self, loss_fn: Any) -> None:
        found = loss_differences(network(), batches(), loss_fn, orders=7, seed=3, confidence=0.5)
        expected = differences_of(per_sample_losses(network(), batches(), each), orders=7, seed=3, confidence=0.5)
        assert (found.num_samples, found.orders, found.seed, found.confidence) == (9, 7, 3, 0.5)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        assert found.rate == pytest.approx(expected.rate, rel=1e-10)
        assert found.sample_sizes.tolist() == list(range(1, 9))

    def test_is_taken_in_the_mode_asked_for(self) -> None:
        found, evaluated = (loss_differences(network(), batches(), each, mode=mode) for mode in ("train", "eval"))
        expected = differences_of(per_sample_losses(network(), batches(), each, mode="train"))
        np.testing.assert_array_equal(found.mean, expected.mean)
        assert (found.mean != evaluated.mean).any()

    @pytest.mark.parametrize(
        ("name", "wrong", "wanted"),
        [("orders", 1, "must be"), ("seed", -1, "must be"), ("confidence", 1.0, "must lie between 0 and 1, got")],
    )
    def test_checks_its_arguments_before_it_works(self, name: str, wrong: Any, wanted: str) -> None:
        with pytest.raises(ValueError, match=f"`{name}` {wanted}"):
            loss_differences(network(), batches(), None, **{name: wrong})


class TestPlot:
    def test_shows_mean_moving_average_fit_and_bounds(self) -> None:
        found = differences_of(lognormal(40))
        declining = 9 / (found.sample_sizes + 1)
        ax = Figure().add_subplot()
        assert found.plot(ax, bounds={"flat": 2.0, "declining": declining}) is ax
        assert ax.get_yscale() == "log"
        assert len(ax.collections) == 1  # the band
        image = io.BytesIO()
        ax.get_figure().savefig(image)  # whatever cannot be drawn warns here
        assert image.tell() > 5000
        curves = {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}
        np.testing.assert_array_equal(curves["mean of 100 orders"], found.mean)
        np.testing.assert_array_equal(curves["moving average (0.99)"], found.smoothed())
        fit = curves[f"{found.constant:.3g}/k"]
        np.testing.assert_allclose(fit * np.sqrt(found.sample_sizes * (found.sample_sizes + 1.0)), found.constant)
        assert (curves["flat"] == 2.0).all()
        np.testing.assert_array_equal(curves["declining"], declining)
