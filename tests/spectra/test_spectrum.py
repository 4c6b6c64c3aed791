import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lightning_hesd import Spectrum
from lightning_hesd.spectra import eigenvalue_bounds
from lightning_hesd.spectra.layer_curvature import LayerCurvature
from lightning_hesd.spectra.spectrum_data import STORED_ARRAYS
from lightning_hesd.spectra.validation import FORMAT_VERSION
from tests.spectra.nodes import spectrum as spectrum_of

NAN = math.nan
ARRAYS = ("nodes", "weights", "residuals")


def make(**changes: Any) -> Spectrum:
    """Two probes, of which the second ended after two steps."""
    fields: dict[str, Any] = {
        "nodes": [[-1.0, 0.5, 4.0], [-0.5, 3.0, NAN]],
        "weights": [[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]],
        "residuals": [[0.1, 0.3, 0.2], [0.0, 0.0, 0.0]],
        "steps_per_probe": (3, 2),
        "dimension": 10,
        "num_samples": 64,
        "loss": 0.75,
        "rounding": 0.01,
        "matvecs": 5,
        "seconds": 1.5,
        "verified": "yes",
    }
    return Spectrum(**{**fields, **changes})


def one_probe(nodes: list[float], residuals: list[float] | None = None, **changes: Any) -> Spectrum:
    fields = {"residuals": [residuals or [0.0] * len(nodes)], "rounding": 0.0, "dimension": 10}
    return spectrum_of(*nodes, **{**fields, **changes})


def test_arrays_are_read_only_float64_copies():
    given = np.array([[-1.0, 0.5, 4.0], [-0.5, 3.0, 5.0]], dtype=np.float32)
    spectrum = make(**dict.fromkeys(ARRAYS, given))
    given[0, 0] = 99.0
    for array in (spectrum.nodes, spectrum.weights, spectrum.residuals):
        assert array.dtype == np.float64
        assert array[0, 0] == -1.0
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": [1.0, 2.0]}, r"`nodes` must have shape \(2 probes, steps >= 1\), got \(2,\)"),
        ({"nodes": [[1.0, 2.0, 3.0]]}, r"`nodes` must have shape \(2 probes, .*got \(1, 3\)"),
        ({"nodes": np.zeros((2, 0))}, r"`nodes` must have shape .*got \(2, 0\)"),
        ({"steps_per_probe": (3,)}, r"`nodes` must have shape \(1 probes, .*got \(2, 3\)"),
        ({"weights": [[0.5, 0.5]] * 2}, r"`weights` must have the shape of `nodes`, \(2, 3\), got \(2, 2\)"),
        ({"residuals": [0.0]}, r"`residuals` must have the shape of `nodes`, \(2, 3\), got \(1,\)"),
        ({**dict.fromkeys(ARRAYS, np.zeros((0, 3))), "steps_per_probe": ()}, "`nodes` must have shape"),
    ],
)
def test_shapes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


class TestProperties:
    def test_extremes_are_over_all_probes_with_their_own_residuals(self):
        spectrum = make()
        assert (spectrum.steps, spectrum.lambda_min, spectrum.lambda_max) == (3, -1.0, 4.0)
        assert (spectrum.lambda_min_error, spectrum.lambda_max_error) == pytest.approx((0.11, 0.21), rel=1e-15)
        # The second probe holds both extremes now.
        other = make(nodes=[[-1.0, 0.5, 4.0], [-2.0, 5.0, NAN]], residuals=[[0.1, 0.3, 0.2], [0.4, 0.5, 0.0]])
        assert (other.lambda_min, other.lambda_max) == (-2.0, 5.0)
        assert (other.lambda_min_error, other.lambda_max_error) == pytest.approx((0.41, 0.51), rel=1e-15)

    def test_c_t_and_its_interval(self):
        spectrum = make()
        assert (spectrum.c_t, spectrum.r_e, spectrum.hesd_type) == (-0.25, 0.25, "MP")
        # The second probe ran until nothing was left, so nothing is outside: rounding only.
        assert spectrum.extreme_bounds == pytest.approx((-1.01, 4.01), rel=1e-14)
        assert spectrum.c_t_interval == pytest.approx((-1.01 / 3.99, -0.99 / 4.01), rel=1e-14)
        assert spectrum.c_t_error == pytest.approx(1.01 / 3.99 - 0.25, rel=1e-13)
        assert spectrum.type_certain is True

    def test_the_interval_follows_from_the_bounds_of_the_quadrature(self):
        spectrum = make(residuals=[[0.1, 0.3, 0.2], [1e-9, 2e-9, 0.0]], confidence=0.9)
        low, high = eigenvalue_bounds.spectrum_bounds(
            spectrum.nodes, spectrum.weights, spectrum.residuals, dimension=10, failure=0.05
        )
        assert low < -1.0
        assert high > 4.0
        assert spectrum.extreme_bounds == (low - 0.01, high + 0.01)
        # Outward by the bounds and rounding, inward by rounding.
        expected = ((low - 0.01) / 3.99, -0.99 / (high + 0.01))
        assert spectrum.c_t_interval == pytest.approx(expected, rel=1e-14)
        assert spectrum.c_t_error == pytest.approx(max(-0.25 - expected[0], expected[1] + 0.25), rel=1e-14)

    def test_the_total_error_adds_that_of_the_sample(self):
        assert make().c_t_total_error is None
        spectrum = make(c_t_sampling_error=0.125)
        assert spectrum.c_t_total_error == pytest.approx(spectrum.c_t_error + 0.125, rel=1e-15)
        assert "± 0.12 (sampling)" in str(spectrum)

    def test_rounding_decides_what_is_negative_and_a_reason_leaves_c_t_undefined(self):
        assert [one_probe([-0.01, 4.0], rounding=rounding).c_t for rounding in (0.01, 0.009)] == [0.0, -0.0025]
        spectrum = make(reason="no curvature")
        assert all(math.isnan(value) for value in (spectrum.c_t, spectrum.r_e, *spectrum.c_t_interval))
        assert (spectrum.hesd_type, spectrum.type_certain, spectrum.converged) == (None, False, False)

    def test_k_h_is_the_mean_over_probes_with_its_standard_error(self):
        spectrum = make()
        values = [0.5 / (0.5 + 1.0), 0.5 / math.sqrt(1.5)]
        assert spectrum.k_h() == pytest.approx(np.mean(values), rel=1e-14)
        assert spectrum.k_h_error() == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-14)
        assert spectrum.k_h(1.0) == pytest.approx((0.25 / 1.25 + 0.25 / 1.5) / 2, rel=1e-14)
        assert spectrum.k_h_error(1.0) == pytest.approx((0.25 / 1.25 - 0.25 / 1.5) / 2, rel=1e-14)
        assert one_probe([-0.01, 1.0, 1.0, 1.0], rounding=0.01).k_h() == 0.0  # no sign within rounding
        assert one_probe([-1.0, 4.0]).k_h_error() is None  # a single probe
        assert math.isnan(make(nodes=[[-1.0, 0.5, 4.0], [-0.5, -0.1, NAN]]).k_h())  # a probe without positive node

    def test_moments_and_trace_in_which_an_eigenvalue_counts_as_one(self):
        spectrum = make(basis="none")
        # Probes: −¼ + ¼ + 1 = 1 and −¼ + 3/2 = 5/4;  squares: ¼ + ⅛ + 4 and ⅛ + 9/2
        assert [spectrum.moment(k) for k in (0, 1, 2)] == [1.0, 1.125, 4.5]
        assert spectrum.trace == 11.25
        # The second probe has found the eigenvalue 3; the other one is not told from zero by so large a rounding.
        spectrum = make()
        assert spectrum.converged_nodes.tolist() == [[False] * 3, [False, True, False]]
        np.testing.assert_allclose(spectrum.density_weights, [[0.25, 0.5, 0.25], [0.9, 0.1, 0.0]], rtol=1e-15)
        assert spectrum.trace == pytest.approx((10.0 + (3.0 - 9 * 0.5)) / 2, rel=1e-15)
        assert not make(basis="none").converged_nodes.any()

    def test_trace_error(self):
        # Second and fourth moments of the probes, about the means 1 and 5/4, and about zero.
        def expected(factor: float, *moments: tuple[float, float]) -> float:
            return math.sqrt(factor * sum(a + math.sqrt(2 * (b - a * a) / 10) for a, b in moments)) / 2

        plain = {"basis": "none", "rounding": 0.0}
        on_sphere = expected(2 * 100 / 12, (3.375, 24.28125), (3.0625, 3.0625**2))
        of_signs = expected(2 * 10, (4.375, 64.28125), (4.625, 40.53125))
        assert make(**plain).trace_error == pytest.approx(on_sphere, rel=1e-14)
        assert make(**plain, probe="rademacher").trace_error == pytest.approx(of_signs, rel=1e-14)

    def test_miss_probability_is_that_of_the_quadrature_at_the_stated_tolerance(self):
        for given, tolerance in ((None, 0.05), (0.01, 0.01)):
            spectrum = make(dimension=1000, steps_per_probe=(30, 20), tolerance=given)
            assert spectrum.miss_probability == eigenvalue_bounds.miss_probability(1000, (30, 20), tolerance)
        assert make(probe="rademacher").miss_probability is None

    def test_density_and_histogram_are_those_of_the_distribution(self):
        spectrum = make()
        found = spectrum.distribution
        np.testing.assert_array_equal(found.nodes, [-1.0, 0.5, 4.0, -0.5, 3.0])
        np.testing.assert_array_equal(found.weights, spectrum.density_weights[~np.isnan(spectrum.nodes)] / 2)
        for ours, theirs in (
            (spectrum.density(), found.density()),
            (spectrum.density([0.0, 1.0], sigma=0.3), found.density([0.0, 1.0], 0.3)),
            (spectrum.histogram(), found.histogram()),
            (spectrum.histogram([-2.0, 0.0, 5.0]), found.histogram([-2.0, 0.0, 5.0])),
        ):
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])

    def test_prints_its_main_findings_in_one_line(self):
        text = str(make())
        assert "\n" not in text
        for finding in ("C_t = -0.25 [-0.2531, -0.2469]", "MP", "largest eigenvalue 4,", "loss 0.75", "64 samples"):
            assert finding in text


def relative_error(spectrum: Spectrum) -> float:
    return spectrum.c_t_error / max(abs(spectrum.c_t), 1e-3)


class TestConverged:
    """Residuals shrink: at some point the interval is narrow enough."""

    @pytest.mark.parametrize("tolerance", [None, 0.3, 0.01])
    def test_compares_the_error_with_the_tolerance(self, tolerance):
        seen = set()
        for residual in np.geomspace(1e-8, 1.0, 40):
            spectrum = one_probe([-1.0, 1.0], [residual, residual], tolerance=tolerance)
            assert spectrum.converged is (relative_error(spectrum) <= (tolerance or 0.05))
            seen.add(spectrum.converged)
        assert seen == {True, False}

    def test_small_values_are_judged_on_the_scale_of_a_thousandth(self):
        # At 5 % the allowed error is 5e-5, and not 5e-7.
        seen = set()
        for residual in np.geomspace(1e-12, 1e-2, 40):
            spectrum = one_probe([-2e-6, 0.2], [residual, residual])
            assert spectrum.c_t == pytest.approx(-1e-5, rel=1e-12)
            assert spectrum.converged is (spectrum.c_t_error <= 5e-5)
            seen.add((spectrum.converged, relative_error(spectrum) * 1e-3 > 0.05 * 1e-5))
        assert seen == {(True, False), (True, True), (False, True)}

    def test_a_type_is_enough_if_that_was_asked_for(self):
        spectrum = one_probe([-0.1, 1.0], [1e-3, 1e-3], tolerance="type")
        assert relative_error(spectrum) > 0.05
        assert spectrum.type_certain
        assert spectrum.converged
        straddling = one_probe([-0.5999, 1.0], [1e-3, 1e-3], tolerance="type")
        assert not straddling.type_certain
        assert not straddling.converged

    def test_a_quarter_of_the_sampling_error_is_enough_if_that_was_asked_for(self):
        error = one_probe([-0.5, 1.0], [1e-2, 1e-2]).c_t_error
        assert one_probe([-0.5, 1.0], [1e-2, 1e-2], tolerance="auto", c_t_sampling_error=4.01 * error).converged
        assert not one_probe([-0.5, 1.0], [1e-2, 1e-2], tolerance="auto", c_t_sampling_error=3.99 * error).converged
        assert not one_probe([-0.5, 1.0], [1e-2, 1e-2], tolerance="auto").converged  # nobody knows yet

    @pytest.mark.parametrize(
        ("nodes", "residual", "low", "converged"),
        [
            ([1.0, 2.0], 0.0, 0.0, True),  # an exact zero
            ([1.0, 2.0], 0.5, -0.5, False),  # a node of positive curvature does not prove that there is no negative one
            ([-2.0, -1.0], 1e-6, -math.inf, True),  # certainly no positive eigenvalue
            ([-2.0, -0.1], 0.2, -math.inf, False),  # from −∞ to some number: as wide as an interval can be
        ],
    )
    def test_where_an_extreme_has_no_sign(self, nodes, residual, low, converged):
        spectrum = one_probe(nodes, [residual, residual])
        assert spectrum.c_t_interval[0] <= low
        assert spectrum.converged is converged


@pytest.mark.parametrize("tolerance", [0.05, "type", "auto"])
def test_steps_that_are_not_fixed_leave_k_h_undefined(tolerance):
    spectrum = make(tolerance=tolerance)
    for ask in (spectrum.k_h, spectrum.k_h_error):
        with pytest.raises(ValueError, match=rf"number of Lanczos steps, and with `tolerance={tolerance!r}`"):
            ask()


class TestStorage:
    FULL: ClassVar[dict[str, Any]] = {
        "gradient_equivalents": 2.1,
        "matrix": "hessian",
        "probe": "rademacher",
        "seed": 7,
        "mode": "keep",
        "strategy": "recompute",
        "strategy_reason": "auto: σ, „quotes“ and\nlines",
        "basis": "none",
        "predicted_memory": 2**40 + 1,
        "confidence": 0.9,
        "tolerance": "auto",
        "reason": "no curvature",
        "c_t_sampling_error": 0.125,
        "c_t_sampling_bias": -0.25,
        "lambda_min_sampling_error": 0.375,
        "lambda_max_sampling_error": 0.5,
        "lambda_min_sampling_bias": -0.625,
        "lambda_max_sampling_bias": 0.75,
        "sampling_groups": 16,
        "subspace_overlap": 0.875,
        "losses_along": np.array([[[-1.0, 0.0, 1.0], [0.5, NAN, 0.25]], [[-0.5, 0.0, 0.5], [1.0, 0.5, math.inf]]]),
        "by_layer": {
            "first": LayerCurvature(7, 1.5, 0.1, 0.75, NAN, 0.9, 0.2, (1.0, 1.25), (-0.5, -0.25)),
            "net.0": LayerCurvature(3, 0.5, 0.2, 0.25, NAN, 0.1, 0.8, (0.0, 0.25), (-0.5, 0.0)),
        },
    }

    @pytest.mark.parametrize(
        "spectrum",
        [
            make(),
            make(**FULL),
            make(loss=math.inf, seconds=1e-300, rounding=5e-324),
            make(nodes=np.arange(6).reshape(2, 3) / 7, residuals=[[-0.0, 1e149, 5e-324]] * 2, steps_per_probe=(3, 3)),
        ],
        ids=["padded", "every field", "odd floats", "arbitrary arrays"],
    )
    def test_a_round_trip_changes_no_bit(self, spectrum, tmp_path):
        spectrum.save(tmp_path / "record.npz")
        loaded = Spectrum.load(tmp_path / "record.npz")
        assert str(loaded.by_layer) == str(spectrum.by_layer)  # as text, in which NaN equals itself
        values, others = spectrum.to_dict(), loaded.to_dict()
        stored_layers = {"layer_names", "layer_numbers"}
        assert set(values) - stored_layers == {field.name for field in dataclasses.fields(Spectrum)} - {"by_layer"}
        for name, value in values.items():
            other = others[name]
            assert type(other) is type(value)
            if isinstance(value, np.ndarray):
                assert (other.tobytes(), other.shape) == (value.tobytes(), value.shape)
            else:
                assert other == value
        assert not any(getattr(loaded, name).flags.writeable for name in ARRAYS)

    def test_the_path_is_taken_as_given_and_the_file_holds_no_pickle(self, tmp_path):
        make(**self.FULL).save(str(tmp_path / "no_suffix"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["no_suffix"]
        assert Spectrum.load(str(tmp_path / "no_suffix")).loss == 0.75
        with np.load(tmp_path / "no_suffix", allow_pickle=False) as archive:
            kinds = {name: archive[name].dtype.kind for name in archive.files}
        assert kinds == {**dict.fromkeys(STORED_ARRAYS, "f"), "header": "U"}

    def test_layers_without_names_and_losses_of_another_shape_are_refused(self):
        values = make(**self.FULL).to_dict()
        with pytest.raises(ValueError, match=r"`layer_numbers` must have shape \(1 layers, 12\), got \(2, 12\)"):
            Spectrum.from_dict({**values, "layer_names": ["first"]})
        with pytest.raises(ValueError, match=r"`losses_along` must have shape \(2, 2, any number\), got \(2, 3\)"):
            Spectrum.from_dict({**values, "losses_along": np.zeros((2, 3))})

    def test_saving_replaces_an_earlier_file_whole_or_not_at_all(self, tmp_path, monkeypatch):
        make().save(tmp_path / "record.npz")
        make(loss=2.5).save(tmp_path / "record.npz")
        assert Spectrum.load(tmp_path / "record.npz").loss == 2.5

        def fail(file: Any, **arrays: Any) -> None:
            file.write(b"half a fi")
            raise OSError("disk full")

        monkeypatch.setattr(np, "savez", fail)
        with pytest.raises(OSError, match="disk full"):
            make(loss=3.5).save(tmp_path / "record.npz")
        assert Spectrum.load(tmp_path / "record.npz").loss == 2.5


def rewrite(path: Path, change: Any) -> None:
    """Change the header or the arrays of a saved record."""
    with np.load(path) as archive:
        contents = {name: archive[name] for name in archive.files}
    header = json.loads(str(contents["header"]))
    header = change(header, contents) or header
    with path.open("wb") as file:
        np.savez(file, **{**contents, "header": np.array(json.dumps(header))})


class TestLoadErrors:
    @pytest.fixture
    def saved(self, tmp_path):
        path = tmp_path / "record.npz"
        make().save(path)
        return path

    def test_a_missing_file_and_files_of_numpy(self, tmp_path):
        path = tmp_path / "record.npz"
        with pytest.raises(FileNotFoundError, match=r"record\.npz"):
            Spectrum.load(path)
        for save, content in ((np.savez, {"other": np.zeros(3)}), (np.save, {"arr": np.zeros(3)})):
            with path.open("wb") as file:
                save(file, **content)
            with pytest.raises(ValueError, match=r"record\.npz is not a spectrum written by `Spectrum.save`"):
                Spectrum.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *((lambda header, _, other=other: other, "") for other in ([0], "text", 3, {"format": FORMAT_VERSION})),
            (lambda header, _: header.update(unheard_of=1), ""),
            (lambda header, _: header.__delitem__("loss"), ".*loss"),
            (lambda _, arrays: arrays.update(weights=np.zeros((2, 2))), ".*`weights` must have the shape"),
        ],
    )
    def test_foreign_contents(self, saved, change, message):
        rewrite(saved, change)
        with pytest.raises(ValueError, match=rf"record\.npz is not a spectrum{message}"):
            Spectrum.load(saved)

    def test_a_newer_format_is_named_although_it_may_hold_other_arrays(self, saved):
        def renew(header: dict[str, Any], arrays: dict[str, Any]) -> None:
            header["format"] = FORMAT_VERSION + 1
            del arrays["residuals"]

        rewrite(saved, renew)
        with pytest.raises(ValueError, match=rf"has version {FORMAT_VERSION + 1}.*update it"):
            Spectrum.load(saved)
