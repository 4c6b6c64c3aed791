"""What the density figure shows."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_hesd import Spectrum
from lightning_hesd.plotting import (
    NEGATIVE,
    POSITIVE,
    describe,
    plot_cumulative,
    plot_decomposition,
    plot_densities,
    plot_density,
    plot_layers,
    plot_losses_along,
)
from lightning_hesd.plotting.cumulative import BOTTOM, numbers_beyond
from lightning_hesd.spectra.digits import interval
from tests.example_spectra import SMALL_POPULATION, analyze
from tests.spectra.nodes import spectrum

CASES = {
    "both signs": (-1.0, 0.01, 4.0),
    "all positive": (0.5, 1.0, 4.0),
    "all negative": (-4.0, -1.0),
    "one node": (2.0,),
    "nodes that are one up to rounding": (2.0, np.nextafter(2.0, 3.0)),
    "zero": (0.0,),
    "tiny": (-1e-13, 4e-13),
    "far outlier": (-1e-4, 0.0, 1e4),
}


@pytest.mark.parametrize("nodes", CASES.values(), ids=CASES)
def test_colors_tell_the_sign_and_lines_the_extremes(nodes: tuple[float, ...]) -> None:
    ax = plot_density(spectrum(*nodes))
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    assert 0 < low < high
    curves = {to_hex(line.get_color()).upper(): line for line in ax.lines if line.get_linestyle() == "-"}
    for color, present in ((NEGATIVE, min(nodes) < 0), (POSITIVE, max(nodes) > 0)):
        assert (len(curves[color].get_xdata()) > 1) is (present and len(nodes) > 1)
    if len(nodes) > 1 and min(nodes) < 0 < max(nodes):
        # Colored up to the extremes, not where only the smoothing reaches.
        assert curves[NEGATIVE].get_xdata()[0] == min(nodes)
        assert curves[POSITIVE].get_xdata()[-1] == max(nodes)
    dashed = sorted(line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--")
    assert dashed == [min(nodes), max(nodes)]
    (ticks,) = (line for line in ax.lines if line.get_marker() == "|")
    assert ticks.get_xdata().tolist() == list(nodes)
    ax.figure.draw_without_rendering()  # whatever cannot be drawn warns here


def with_losses(low: float = -2.0, high: float = 8.0) -> Spectrum:
    """A spectrum of a loss 3 − 0.5t + ½λt², with a cubic term along the eigenvector of λ_max."""
    lines = []
    for value, farthest, cubic in ((low, 0.5, 0.0), (high, 0.25, 40.0)):
        distances = farthest * np.linspace(-1, 1, 21)
        lines.append((distances, 3 - 0.5 * distances + value * distances**2 / 2 + cubic * distances**3))
    return spectrum(low, high, losses_along=np.array(lines))


def test_losses_along_eigenvectors_and_the_parabolas_they_follow() -> None:
    found = with_losses()
    ax = plot_losses_along(found, title="epoch 3")
    lines = {(to_hex(line.get_color()).upper(), line.get_linestyle()): line for line in ax.lines}
    assert len(lines) == 4
    for (distances, losses), color in zip(found.losses_along, (NEGATIVE, POSITIVE), strict=True):
        assert lines[color, "-"].get_xdata().tolist() == pytest.approx((distances / distances[-1]).tolist())
        assert lines[color, "-"].get_ydata().tolist() == losses.tolist()
    # Between the points next to zero the cubic term changes the slope by little.
    parabolas = [lines[color, "--"].get_ydata() for color in (NEGATIVE, POSITIVE)]
    assert parabolas[0] == pytest.approx(found.losses_along[0, 1])
    assert parabolas[1][10] == 3
    assert parabolas[1][-1] == pytest.approx(3 - (0.5 - 40 * 0.025**2) * 0.25 + 4 * 0.25**2)
    assert ax.get_title() == "epoch 3"
    assert ax.get_legend().get_texts()[0].get_text() == r"$\lambda_{\min}$ = −2, $t \leq$ 0.5"


def test_losses_that_are_absent_infinite_or_equal() -> None:
    with pytest.raises(ValueError, match="`loss_along_eigenvectors=True`"):
        plot_losses_along(spectrum(-1.0, 4.0))
    some = with_losses().losses_along.copy()
    some[1, 1, -3:] = math.inf, math.nan, math.nan
    equal, none = some.copy(), some.copy()
    equal[:, 1], none[:, 1] = 2.5, math.nan
    for losses in (some, equal, none):
        ax = plot_losses_along(spectrum(-2.0, 8.0, losses_along=losses))
        assert np.isfinite(ax.get_ylim()).all()
        ax.figure.draw_without_rendering()


@pytest.mark.parametrize(("plot", "count"), [(plot_density, 1), (plot_cumulative, 1), (plot_decomposition, 3)])
def test_draws_on_the_axes_it_is_given(plot: Any, count: int) -> None:
    ax = Figure().add_subplot()
    assert plot(*[spectrum(0.0)] * count, ax) is ax
    assert len(ax.lines) > 0


def test_title_tells_type_and_interval() -> None:
    assert describe(spectrum(-1.0, 4.0), "epoch 3") == "epoch 3   MP-HESD\n$C_t$ = −0.25  [−0.25, −0.25]"
    low, high = (uncertain := spectrum(-2.0, 4.0, residual=1.0)).c_t_interval
    assert low < -0.6 < -0.5 < high
    assert describe(uncertain) == f"MP-HESD (uncertain)\n$C_t$ = −0.5  {interval(low, high)}"
    assert describe(spectrum(0.0, reason="none"), "start") == "start\n$C_t$ undefined: no curvature"


def test_all_extremes_of_several_densities_are_within_the_axes() -> None:
    ax = plot_decomposition(spectrum(-1.0, 0.0, 40.0), spectrum(0.0, 0.1, 38.0), spectrum(-5.0, 0.0, 3.0))
    left, right = ax.get_xlim()
    assert left < -5 < 40 < right
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["Hessian, up to 40", "Gauss-Newton, up to 38", "residual, up to 3"]
    for line, highest in zip(ax.lines, (40.0, 38.0, 3.0), strict=True):
        x, y = line.get_data()
        assert y[np.abs(x - highest).argmin()] > ax.get_ylim()[0]


def test_densities_of_very_different_widths_are_both_legible() -> None:
    ax = plot_densities({"training": spectrum(-0.01, 1.0), "generalization": spectrum(-15.0, 549.0)})
    places = ax.transAxes.inverted().transform(ax.transData.transform([(-0.01, 1), (0, 1), (1, 1), (549, 1)]))[:, 0]
    assert 0 < places[0] < places[1] < places[2] - 0.2 < places[3] - 0.3 < 0.7
    with pytest.raises(ValueError, match="pass at least one"):
        plot_densities({})


class TestCumulative:
    weights = ((0.1, 0.1, 0.5, 0.2, 0.1),)
    nodes = (-3.0, -2.0, 0.5, 1.0, 4.0)

    def test_lines_are_the_numbers_beyond_each_threshold(self):
        found = spectrum(*self.nodes, weights=self.weights, residual=0.1)
        assert not found.converged_nodes.any()
        drawn = [line for line in plot_cumulative(found).lines if line.get_drawstyle() == "steps-post"]
        sides = {to_hex(line.get_color()).upper(): line for line in drawn}
        points = found.cumulative_band[0]
        below, above = sides[NEGATIVE], sides[POSITIVE]
        assert {*points[points < 0], -2.0, 0.0} <= set(below.get_xdata().tolist())
        assert {0.0, *points[points > 0], 0.5} <= set(above.get_xdata().tolist())
        # Cells reach 0.1 to both sides of the nodes between the extremes.
        numbers = {-3.5: BOTTOM, -2.5: 10, -2.0: 15, -1.0: 20, 0.2: 80, 0.5: 55, 0.75: 30, 2.5: 10, points[-1]: BOTTOM}
        for threshold, number in numbers.items():
            x, y = (below if threshold < 0 else above).get_data()
            assert y[np.searchsorted(x, threshold, side="right") - 1] == pytest.approx(number), threshold

    @pytest.mark.parametrize("is_above", [False, True])
    def test_lines_are_within_the_bands_and_follow_the_distribution(self, is_above):
        for name, eigenvalues in SMALL_POPULATION.items():
            found = analyze(eigenvalues)
            thresholds, (least, line, most) = numbers_beyond(found, is_above=is_above)
            assert ((least <= line) & (line <= most)).all(), name
            shares = found.distribution.cumulative(thresholds)
            expected = found.dimension * (1 - shares if is_above else shares)
            inside = (least < expected) & (expected < most) & (thresholds != 0)
            np.testing.assert_allclose(line[inside], expected[inside], atol=1e-9)

    def test_converged_nodes_have_narrow_bands_and_zero_is_beyond_it_on_neither_side(self):
        found = spectrum(-1.0, 0.0, 2.0, dimension=3)
        for is_above, at in ((False, -1), (True, 0)):
            thresholds, numbers = numbers_beyond(found, is_above=is_above)
            assert thresholds[at] == 0.0
            assert numbers[1, at] == pytest.approx(1.0)
        exact = spectrum(-1.0, 0.5, 2.0, dimension=3)
        for is_above, expected in ((False, {0, 1}), (True, {0, 1, 2})):
            thresholds, (least, found, most) = numbers_beyond(exact, is_above=is_above)
            wide = np.diff(thresholds, append=2 * thresholds[-1] if is_above else 0.0) > 1e-6
            assert least[wide] == pytest.approx(most[wide])
            assert least[wide] == pytest.approx(found[wide])
            assert set(found[wide].round()) <= expected

    def test_bands_are_the_bounds(self):
        found = spectrum(*self.nodes, weights=self.weights, residual=0.1)
        drawn = plot_cumulative(found).collections
        bands = {to_hex(band.get_facecolor()).upper(): band.get_paths()[0].vertices for band in drawn}
        points, low, high = found.cumulative_band
        for color, is_above in ((NEGATIVE, False), (POSITIVE, True)):
            numbers = numbers_beyond(found, is_above=is_above)[1]
            assert (numbers[0] <= numbers[2]).all()
            corners = {(float(x), round(float(y), 6)) for x, y in bands[color]}
            for at, least, most in zip(points, low, high, strict=True):
                if (at > 0) is is_above:
                    ends = (100 * (1 - most), 100 * (1 - least)) if is_above else (100 * least, 100 * most)
                    assert {(float(at), round(max(end, BOTTOM), 6)) for end in ends} <= corners

    @pytest.mark.parametrize("nodes", CASES.values(), ids=CASES)
    def test_every_kind_of_spectrum_can_be_drawn(self, nodes: tuple[float, ...]) -> None:
        found = spectrum(*nodes, residual=1e-12)
        ax = plot_cumulative(found, title="start")
        low, high = found.negative_count
        count = low if low == high else f"{low} to {high}"
        assert ax.get_title() == f"start\n{count} of 100 eigenvalues are negative"
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left < min(nodes)
        assert max(nodes) < right
        assert (0 < bottom < 1, top > 100) == (True, True)
        ax.figure.draw_without_rendering()

    def test_without_a_spectrum(self):
        with pytest.raises(ValueError, match="there is no density, because nothing was computed"):
            plot_cumulative(spectrum(0.0, verified="no", reason="the products are not those of the loss"))


class TestLayers:
    layers: ClassVar[dict[int, dict[str, Spectrum]]] = {
        -1: {"a": spectrum(-1.0, 2.0), "b": spectrum(-0.5, 0.1)},
        4: {"a": spectrum(-1.0, 20.0), "b": spectrum(-1.0, -0.5)},
    }

    def test_rows_are_layers_and_columns_reach_halfway_to_their_neighbors(self):
        ax = plot_layers(self.layers)
        mesh = ax.collections[0]
        assert mesh.get_array().tolist() == [[2.0, 20.0], [0.1, -0.5]]
        assert mesh.get_coordinates()[0, :, 0].tolist() == [-3.5, 1.5, 6.5]
        assert ax.get_ylim() == (1.5, -0.5)  # the first layer is at the top
        assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["start", "4"]
        # Another quantity, and mistakes.
        ax = plot_layers(self.layers, "c_t", Figure().add_subplot(), xlabel="step")
        assert ax.collections[0].get_array().tolist() == [[-0.5, -0.05], [-5.0, None]]  # infinity has no color
        assert ax.get_xlabel() == "step"
        with pytest.raises(ValueError, match=r"`quantity` must be one of c_t, lambda_max, .*got 'size'"):
            plot_layers(self.layers, "size")
        with pytest.raises(ValueError, match="`history` has no values of layers"):
            plot_layers({})

    def test_colors_are_logarithmic_or_a_root_that_keeps_signs(self):
        signed = plot_layers(self.layers).collections[0].norm
        assert signed(np.array([-0.5, 20.0])).tolist() == [0.0, 1.0]
        assert signed(0.0) == pytest.approx(math.sqrt(0.5) / (math.sqrt(0.5) + math.sqrt(20.0)))
        positive = {0: {"a": spectrum(1.0), "b": spectrum(100.0)}}
        assert plot_layers(positive).collections[0].norm(10.0) == pytest.approx(0.5)

    def test_what_all_names_begin_with_is_the_label_and_a_later_layer_is_empty_before(self):
        layers = {0: {"net.block.0.fc": spectrum(1.0), "net.block.1": spectrum(2.0)}}
        ax = plot_layers(layers)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0.fc", "1"]
        assert ax.get_ylabel() == "layer of net.block"
        layers = {0: {"a": spectrum(1.0)}, 1: {"a": spectrum(2.0), "b": spectrum(3.0)}}
        assert plot_layers(layers).collections[0].get_array().tolist() == [[1.0, 2.0], [None, 3.0]]

    def test_colors_of_shares_end_at_0_and_1(self):
        layers = {0: {"a": spectrum(1.0), "b": spectrum(3.0)}, 1: {"a": spectrum(-3.0), "b": spectrum(4.0)}}
        image = plot_layers(layers, "trace_share").collections[0]
        assert image.get_array().tolist() == [[0.25, -3.0], [0.75, 4.0]]
        assert image.get_clim() == (0.0, 1.0)
        assert plot_layers({0: layers[0]}, "trace_share").collections[0].get_clim() == (0.25, 0.75)
        undefined = plot_layers({0: {"a": spectrum(-1.0)}}, "trace_share")  # no share of a trace that is not positive
        assert undefined.collections[0].get_array().mask.all()
        undefined.figure.draw_without_rendering()
