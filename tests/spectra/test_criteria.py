import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_hesd.spectra import criteria

# Derandomized: the suite gives the same verdict every time.
reproducibly = settings(derandomize=True, deadline=None, max_examples=100, database=None)

SIZES = st.floats(min_value=1e-30, max_value=1e30)
EIGENVALUES = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda size: -size))
FRACTIONS = st.floats(min_value=0.0, max_value=1.0)


def ends(draw_low: float, draw_high: float) -> tuple[float, float]:
    return min(draw_low, draw_high), max(draw_low, draw_high)


class TestCt:
    @pytest.mark.parametrize(
        ("lambda_min", "lambda_max", "rounding", "expected"),
        [
            (-1.0, 4.0, 0.0, -0.25),
            (-4.0, 1.0, 0.0, -4.0),
            (0.5, 4.0, 0.0, 0.0),  # no negative eigenvalue
            (0.0, 4.0, 0.0, 0.0),  # zero is not negative
            (-1.0, -0.5, 0.0, -math.inf),  # no positive eigenvalue
            (-1.0, 0.0, 0.0, -math.inf),  # zero is not positive
            (-0.5, 4.0, 0.5, 0.0),  # up to the rounding threshold there is no sign
            (math.nextafter(-0.5, -1), 4.0, 0.5, math.nextafter(-0.5, -1) / 4.0),
            (-4.0, 0.5, 0.5, -math.inf),
            (-4.0, math.nextafter(0.5, 1), 0.5, -4.0 / math.nextafter(0.5, 1)),
        ],
    )
    def test_is_the_ratio_of_the_extremes_with_defined_edge_cases(self, lambda_min, lambda_max, rounding, expected):
        assert criteria.c_t(lambda_min, lambda_max, rounding) == expected

    def test_is_undefined_without_any_curvature_and_zero_is_positive(self):
        assert math.isnan(criteria.c_t(0.0, 0.0))
        assert math.isnan(criteria.c_t(-1e-9, 1e-9, rounding=1e-8))
        # -0.0 would print as "-0.0" in every log.
        assert math.copysign(1.0, criteria.c_t(0.5, 4.0)) == 1.0
        assert math.copysign(1.0, criteria.c_t(-1e-9, 4.0, rounding=1e-8)) == 1.0


class TestInterval:
    @pytest.mark.parametrize(
        ("lambda_min", "lambda_max", "error_min", "error_max", "rounding", "expected"),
        [
            (-1.0, 4.0, 0.2, 1.0, 0.0, (-1.2 / 4.0, -1.0 / 5.0)),
            (-1.0, 4.0, 0.25, 1.25, 0.25, (-1.25 / 3.75, -0.75 / 5.25)),  # inward only by the rounding
            (0.5, 4.0, 0.25, 1.0, 0.0, (0.0, 0.0)),  # not even the error makes it negative
            (0.5, 4.0, 1.0, 1.0, 0.0, (-0.5 / 4.0, 0.0)),  # perhaps negative
            (-0.1, 4.0, 0.1, 1.0, 0.1, (-0.2 / 3.9, 0.0)),  # zero within rounding
            (-2.0, -1.0, 0.5, 0.5, 0.0, (-math.inf, -math.inf)),  # not even the error makes it positive
            (-2.0, -1.0, 0.5, 2.0, 0.0, (-math.inf, -2.0)),  # perhaps positive
        ],
    )
    def test_against_hand_computed_ends(self, lambda_min, lambda_max, error_min, error_max, rounding, expected):
        assert criteria.c_t_interval(lambda_min, lambda_max, error_min, error_max, rounding) == pytest.approx(
            expected, rel=1e-15, abs=0.0
        )

    def test_is_undefined_where_the_point_is(self):
        assert all(math.isnan(end) for end in criteria.c_t_interval(0.0, 0.0, 1.0, 1.0, 0.0))

    @reproducibly
    @given(
        first=EIGENVALUES,
        second=EIGENVALUES,
        errors=st.tuples(st.one_of(st.just(0.0), SIZES), st.one_of(st.just(0.0), SIZES)),
        rounding=st.one_of(st.just(0.0), SIZES),
        moves=st.tuples(FRACTIONS, FRACTIONS),
    )
    def test_contains_the_point_and_every_outward_move_within_the_errors(self, first, second, errors, rounding, moves):
        low, high = ends(first, second)
        # As the record states them: the residual bound plus the rounding.
        error_min, error_max = (error + rounding for error in errors)
        point = criteria.c_t(low, high, rounding)
        assume(not math.isnan(point))
        bottom, top = criteria.c_t_interval(low, high, error_min, error_max, rounding)
        assert bottom <= point <= top <= 0
        moved = criteria.c_t(low - moves[0] * error_min, high + moves[1] * error_max, rounding)
        # The two sides round differently by an ulp or so.
        assert bottom * (1 + 1e-14) <= moved <= top * (1 - 1e-14)


class TestType:
    @pytest.mark.parametrize(
        ("c_t", "threshold", "expected"),
        [
            (-0.6, None, "MN"),  # the paper's threshold itself
            (math.nextafter(-0.6, 0), None, "MP"),
            (0.0, None, "MP"),
            (-math.inf, None, "MN"),
            (-0.3, -0.2, "MN"),
            (-0.7, -0.8, "MP"),
        ],
    )
    def test_is_mainly_negative_up_to_the_threshold(self, c_t, threshold, expected):
        assert criteria.hesd_type(c_t, *([] if threshold is None else [threshold])) == expected

    def test_nan_has_no_type(self):
        with pytest.raises(ValueError, match=r"NaN.*undefined"):
            criteria.hesd_type(math.nan)

    @pytest.mark.parametrize(
        ("interval", "certain"),
        [
            ((-0.5, -0.4), True),
            ((-0.8, -0.7), True),
            ((-0.7, -0.5), False),
            ((-0.6, -0.5), False),  # -0.6 is MN, the rest MP
            ((-0.7, -0.6), True),  # all MN
            ((-math.inf, -math.inf), True),
            ((-math.inf, -0.1), False),
            ((math.nan, math.nan), False),
        ],
    )
    def test_is_certain_where_the_whole_interval_agrees(self, interval, certain):
        assert criteria.type_certain(interval) is certain
        assert criteria.type_certain((-0.5, -0.4), threshold=-0.45) is False


class TestRe:
    def test_is_minus_c_t(self):
        assert criteria.r_e(-0.25) == 0.25
        assert criteria.r_e(-math.inf) == math.inf
        assert math.isnan(criteria.r_e(math.nan))
        assert math.copysign(1.0, criteria.r_e(0.0)) == math.copysign(1.0, criteria.r_e(-0.0)) == 1.0


def plain_k_h(nodes: list[float], weights: list[float], n: float) -> float:
    """The definition, term by term."""
    negative = positive = 0.0
    for theta, tau in zip(nodes, weights, strict=True):
        if theta < 0:
            negative += abs(theta * tau) ** n
        elif theta > 0:
            positive += (theta * tau) ** n
    return negative / positive


class TestKH:
    @pytest.mark.parametrize("n", [0.25, 0.5, 1.0, 2.0])
    def test_each_probe_against_the_definition(self, n):
        rows = [([-3.0, -0.5, 0.25, 2.0], [0.1, 0.2, 0.3, 0.4]), ([-1.0, 0.0, 1.5, 7.0], [0.4, 0.3, 0.2, 0.1])]
        value = criteria.k_h(np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), n)
        assert value == pytest.approx([plain_k_h(*row, n) for row in rows], rel=1e-14)

    def test_padding_does_not_count_and_a_sign_that_is_missing_makes_zero_or_undefined(self):
        # |-4 · 1/4|½ = 1;  (1 · 1/4)½ + (8 · 1/2)½ = ½ + 2
        nodes = np.array([[-4.0, 1.0, 8.0], [-1.0, 4.0, np.nan]])
        weights = np.array([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])
        assert criteria.k_h(nodes, weights) == pytest.approx([0.4, 0.5], rel=1e-15)
        value = criteria.k_h(np.array([[-2.0, -1.0], [-1.0, 1.0], [1.0, 2.0]]), np.full((3, 2), 0.5))
        assert value == pytest.approx([math.nan, 1.0, 0.0], abs=0.0, nan_ok=True)

    def test_nodes_within_rounding_have_no_sign(self):
        nodes, weights = np.array([[-0.5, 0.5, 4.0, -4.0]]), np.full((1, 4), 0.25)
        assert criteria.k_h(nodes, weights, 1.0, rounding=0.5).tolist() == [1.0]
        assert criteria.k_h(nodes[:, :2], weights[:, :2], 1.0, rounding=0.4).tolist() == [1.0]
        assert math.isnan(criteria.k_h(nodes[:, :2], weights[:, :2], 1.0, rounding=0.5)[0])

    def test_the_exponent_must_be_positive(self):
        for n in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=r"`n` must be positive"):
                criteria.k_h(np.array([[1.0]]), np.array([[1.0]]), n)


class TestUndefinedReason:
    EPSILON = 2.0**-23

    def test_no_curvature_or_less_than_the_rounding_of_the_loss(self):
        for loss in (0.0, 1024.0, -1024.0):
            assert "no curvature" in criteria.undefined_reason(0.0, loss, 4.0, self.EPSILON)
        # floor = ε·|loss|/max(1, ‖w‖²) = 2⁻²³·1024/4 = 2⁻¹⁵
        for loss in (1024.0, -1024.0):
            assert criteria.undefined_reason(2.0**-15, loss, 4.0, self.EPSILON) is not None
            assert criteria.undefined_reason(1.001 * 2.0**-15, loss, 4.0, self.EPSILON) is None

    def test_a_step_of_unit_length_or_more_and_errors_larger_than_all_eigenvalues(self):
        reason = criteria.undefined_reason(1e-9, 1.0, 1e-6, self.EPSILON)
        assert all(figure in reason for figure in ("1e-09", f"{self.EPSILON:.3g}"))
        assert criteria.undefined_reason(2.0**-23, 1.0, 1e-6, self.EPSILON) is not None
        assert criteria.undefined_reason(1.001 * 2.0**-23, 1.0, 1e-6, self.EPSILON) is None
        assert criteria.undefined_reason(2.0, 1.0, 1.0, self.EPSILON, rounding=1.9) is None
        reason = criteria.undefined_reason(2.0, 1.0, 1.0, self.EPSILON, rounding=3.5)
        assert "2 in size, and the error of the products is 3.5" in reason


def test_rounding_threshold_is_relative_to_norm_and_arithmetic_and_grows_with_the_root_of_large_dimensions():
    reference = criteria.rounding_threshold(2.0, 1e-7, 100)
    assert reference == pytest.approx(criteria.ROUNDING_UNITS * 2e-7, rel=1e-15)
    assert criteria.rounding_threshold(0.0, 1e-7, 100) == 0.0
    assert criteria.rounding_threshold(2.0, 1e-7, 10**6) == pytest.approx(50 * 2e-7, rel=1e-15)
    assert criteria.rounding_threshold(2.0, 1e-7, 4 * 10**6) == pytest.approx(100 * 2e-7, rel=1e-15)
