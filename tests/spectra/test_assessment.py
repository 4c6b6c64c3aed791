"""Every branch of Fig. 10 of Gabdullin (2025), and what leaves the verdict undecided."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_hesd import Spectrum, assess_generalization
from lightning_hesd.spectra.assessment import CAVEAT, TITLE, VERDICT_VALUES
from lightning_hesd.spectra.criteria import delta_interval, quasi_singular
from lightning_hesd.spectra.intervals import student_quantile
from lightning_hesd.spectra.record import SpectrumRecord
from tests.spectra import nodes

spectrum = partial(nodes.spectrum, dimension=3, rounding=0.0)
TRAIN = spectrum(-0.1, 0.5, 1.0)


def test_good() -> None:
    assessment = assess_generalization(TRAIN, spectrum(-0.11, 0.5, 1.0))
    assert assessment.verdict == "good"
    assert assessment.applicable
    assert assessment.value == VERDICT_VALUES["good"] == 1.0
    assert assessment.delta_r_e == pytest.approx(1.1)
    # K_H05: the square roots of 0.1, 0.5 and 1, by equal weights.
    assert assessment.delta_k_h05 == pytest.approx(math.sqrt(1.1))
    assert assessment.delta_r_e_interval == pytest.approx((1.1, 1.1))
    assert math.isnan(assessment.delta_k_h05_interval[0])
    assert "MP" in assessment.reasons[0]
    assert "one probe" in assessment.reasons[2]
    assert str(assessment).startswith(f"{TITLE} ({CAVEAT}): hold; on the training data C_t = -0.1")


@pytest.mark.parametrize(
    ("train", "other", "failing"),
    [
        (TRAIN, spectrum(-0.2, 0.5, 1.0), "Δr_e = 2 [2, 2] >= 1.5"),
        # Equal r_e, less positive mass.
        (TRAIN, spectrum(-0.1, 0.05, 1.0), "ΔK_H05 = 1.4 (one probe: its uncertainty is not known) >= 1.2"),
        # The threshold itself is no longer good.
        (spectrum(-0.125, 0.5, 1.0), spectrum(-0.1875, 0.5, 1.0), "Δr_e = 1.5 [1.5, 1.5] >= 1.5"),
        (TRAIN, spectrum(-0.9, 0.5, 1.0), "on the generalization data the spectrum turned MN (C_t = -0.9)"),
        # What fails for sure outweighs a ΔK_H05 that is uncertain.
        (replace(TRAIN, tolerance=0.05), spectrum(-0.3, 0.5, 1.0, tolerance=0.05), "Δr_e = 3 [3, 3] >= 1.5"),
    ],
)
def test_poor(train: Spectrum, other: Spectrum, failing: str) -> None:
    assessment = assess_generalization(train, other)
    assert assessment.verdict == "poor"
    assert assessment.value == 0.0
    assert failing in assessment.reasons


@pytest.mark.parametrize("c_t", [-0.6, -0.73, -1.0, -math.inf])
def test_not_applicable_to_mn(c_t: float) -> None:
    train = spectrum(-1.0, -0.5, -0.2) if c_t == -math.inf else spectrum(c_t, 0.5, 1.0)
    assessment = assess_generalization(train, TRAIN)
    assert assessment.verdict == "not applicable"
    assert assessment.applicable is False
    assert assessment.value == -1.0
    assert "MN" in assessment.reasons[0]
    assert "gradients that were manipulated" in assessment.reasons[1]
    assert "ResNet18" in assessment.reasons[1]


def test_thresholds_are_parameters() -> None:
    other = spectrum(-0.2, 0.5, 1.0)
    assert assess_generalization(TRAIN, other, delta_r_e_threshold=2.1, delta_k_h05_threshold=1.5).verdict == "good"
    assert assess_generalization(TRAIN, other, mp_threshold=-0.05).verdict == "not applicable"
    assert assess_generalization(TRAIN, TRAIN, delta_k_h05_threshold=0.9).verdict == "poor"


def uncertain(c_t: float) -> Spectrum:
    """A spectrum whose smallest node has not converged."""
    return spectrum(c_t, 0.5, 1.0, residuals=[[0.05, 0.0, 0.0]])


def test_undecided_where_a_ratio_may_be_on_either_side() -> None:
    other = uncertain(-0.14)
    assessment = assess_generalization(TRAIN, other)
    low, high = assessment.delta_r_e_interval
    bounds = [-bound / 0.1 for bound in other.c_t_interval]
    assert (low, high) == pytest.approx((bounds[1], bounds[0]))
    assert low < 1.4 < 1.5 < high
    assert assessment.verdict == "undecided"
    assert f"Δr_e = 1.4 [{low:.3g}, {high:.3g}]" in assessment.reasons[1]


def test_sampling_errors_widen_the_interval() -> None:
    train = replace(TRAIN, c_t_sampling_error=0.01)
    other = spectrum(-0.12, 0.5, 1.0, c_t_sampling_error=0.02)
    assessment = assess_generalization(train, other, delta_k_h05_threshold=9)
    low, high = assessment.delta_r_e_interval
    assert low == pytest.approx((0.12 - 0.02 * 1.959964) / (0.1 + 0.01 * 1.959964), rel=1e-6)
    assert high == pytest.approx((0.12 + 0.02 * 1.959964) / (0.1 - 0.01 * 1.959964), rel=1e-6)
    assert assessment.verdict == "undecided"


FLAT = replace(TRAIN, reason="no curvature: all is flat")


@pytest.mark.parametrize(
    ("train", "other", "reasons"),
    [
        (uncertain(-0.59), TRAIN, ["may be on either side of -0.6"]),
        (spectrum(0.1, 0.5, 1.0), TRAIN, [f"{ratio} = 0 on the training data" for ratio in ("r_e", "K_H05")]),
        (FLAT, TRAIN, ["no curvature: all is flat"]),
        (TRAIN, FLAT, ["no curvature: all is flat"]),
    ],
    ids=["type", "no negative part", "flat on training data", "flat on the others"],
)
def test_undecided(train: Spectrum, other: Spectrum, reasons: list[str]) -> None:
    assessment = assess_generalization(train, other)
    assert (assessment.verdict, assessment.value) == ("undecided", 0.5)
    for reason in reasons:
        assert any(reason in said for said in assessment.reasons)


@pytest.mark.parametrize(
    ("train", "other", "why"),
    [
        (replace(TRAIN, tolerance=0.05), TRAIN, "without `tolerance`"),
        (TRAIN, replace(TRAIN, tolerance="type"), "without `tolerance`"),
        (TRAIN, spectrum(-0.1, 0.2, 0.5, 1.0), "the numbers of Lanczos steps differ, (3,) on the training"),
    ],
)
def test_k_h05_of_unlike_steps_is_left_out(train: Spectrum, other: Spectrum, why: str) -> None:
    assessment = assess_generalization(train, other)
    assert math.isnan(assessment.delta_k_h05)
    assert assessment.verdict == "undecided"
    assert why in assessment.reasons[2]


def test_error_of_k_h05_comes_from_probes_in_pairs() -> None:
    weights = [[0.3, 0.3, 0.4], [0.2, 0.4, 0.4], [0.25, 0.35, 0.4]]
    train, other = spectrum(-0.1, 0.5, 1.0, weights=weights), spectrum(-0.11, 0.5, 1.0, weights=weights)
    assessment = assess_generalization(train, other)
    low, high = assessment.delta_k_h05_interval
    assert assessment.delta_k_h05 == pytest.approx(math.sqrt(1.1))
    assert low <= assessment.delta_k_h05 <= high
    assert high - low < 1e-12  # the same probes on proportional spectra: no noise is left
    unlike = spectrum(-0.11, 0.5, 1.0, weights=weights[::-1])
    low, high = assess_generalization(train, unlike).delta_k_h05_interval
    ours, theirs = (
        np.sqrt([[w[0] * x, w[1] * 0.5, w[2]] for w in rows]) for rows, x in ((weights, 0.1), (weights[::-1], 0.11))
    )
    k, k_other = (values[:, 0] / values[:, 1:].sum(1) for values in (ours, theirs))
    ratio = k_other.mean() / k.mean()
    half = stats.t.ppf(0.975, 2) * np.std(k_other - ratio * k, ddof=1) / math.sqrt(3) / k.mean()
    assert (low, high) == pytest.approx((ratio - half, ratio + half), rel=1e-5)
    assert "may be on either side" in assess_generalization(train, unlike).reasons[2]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"probe": "rademacher"}, {"mode": "train"}, {"matrix": "ggn"}, {"dimension": 4}]
)
def test_spectra_that_cannot_be_compared(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"`{name}` is .* on the training data and {change[name]!r} on the"):
        assess_generalization(TRAIN, replace(TRAIN, **change))


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 49, 99])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_quantile(confidence: float, degrees: int) -> None:
    assert student_quantile(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-4)


def test_delta_interval() -> None:
    assert delta_interval((0.1, 0.2), (0.05, 0.1)) == pytest.approx((1.0, 4.0))
    assert delta_interval((0.1, 0.2), (0.0, 0.1)) == pytest.approx((1.0, math.inf))
    assert np.isnan(delta_interval((0.1, 0.2), (0.0, 0.0))).all()


@pytest.mark.parametrize(
    ("lambda_max", "metric", "singular"),
    [
        ([40.0, 20.0, 4.0], [0.99, 0.99, 0.99], True),
        ([40.0, 20.0, 4.1], [0.99, 0.99, 0.99], False),  # not by the factor
        ([40.0, 20.0, 4.0], [0.5, 0.99, 0.99], False),  # the peak belongs to the training proper
        ([0.0, 0.0], [0.99, 0.99], False),
        ([4.0], [0.99], False),
    ],
)
def test_quasi_singular(lambda_max: list[float], metric: list[float], singular: bool) -> None:
    assert quasi_singular(lambda_max, metric, tolerance=0.01) is singular


@pytest.mark.parametrize(
    ("epoch", "first", "reason"),
    [
        (-1, None, "the weights are those before the first step"),
        (4, 0.55, "the loss, 0.5, is near that of the first analysis, 0.55"),
        (4, 0.45, "the loss, 0.5, is near that of the first analysis, 0.45"),
        (4, 0.56, None),
        (0, None, None),
    ],
)
def test_untrained_weights_get_no_verdict(epoch: int, first: float | None, reason: str | None) -> None:
    other = spectrum(-0.11, 0.5, 1.0)
    record = SpectrumRecord(epoch, 40, replace(TRAIN, loss=0.5), generalization=other, first_loss=first)
    found = record.assessment
    assert found is not None
    assert found.verdict == ("good" if reason is None else "not applicable")
    assert (found.reasons[0] == reason) == (reason is not None)
    assert found.delta_r_e == assess_generalization(TRAIN, other).delta_r_e
