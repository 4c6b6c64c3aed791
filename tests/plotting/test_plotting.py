"""What the density figure shows."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_hesd import Spectrum
from lightning_hesd.plotting import NEGATIVE, POSITIVE, describe, plot_decomposition, plot_density, plot_layers
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
    image = io.BytesIO()
    ax.get_figure().savefig(image, dpi=60)  # whatever cannot be drawn warns here
    assert image.tell() > 1000


@pytest.mark.parametrize(("plot", "count"), [(plot_density, 1), (plot_decomposition, 3)])
def test_draws_on_the_axes_it_is_given(plot: Any, count: int) -> None:
    ax = Figure().add_subplot()
    assert plot(*[spectrum(0.0)] * count, ax) is ax
    assert len(ax.lines) > 0


def test_title_tells_type_and_interval() -> None:
    assert describe(spectrum(-1.0, 4.0), "epoch 3") == "epoch 3   MP-HESD\n$C_t$ = -0.25  [-0.25, -0.25]"
    low, high = (uncertain := spectrum(-2.0, 4.0, residual=1.0)).c_t_interval
    assert low < -0.6 < -0.5 < high
    assert describe(uncertain) == f"MP-HESD (uncertain)\n$C_t$ = -0.5  [{low:.4g}, {high:.4g}]"
    assert describe(spectrum(0.0, reason="none"), "start") == "start\n$C_t$ undefined: no curvature"


def test_all_extremes_of_a_decomposition_are_within_the_axes() -> None:
    ax = plot_decomposition(spectrum(-1.0, 0.0, 40.0), spectrum(0.0, 0.1, 38.0), spectrum(-5.0, 0.0, 3.0))
    left, right = ax.get_xlim()
    assert left < -5 < 40 < right
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["Hessian, up to 40", "Gauss-Newton, up to 38", "residual, up to 3"]
    for line, highest in zip(ax.lines, (40.0, 38.0, 3.0), strict=True):
        x, y = line.get_data()
        assert y[np.abs(x - highest).argmin()] > ax.get_ylim()[0]


class TestLayers:
    layers: ClassVar[dict[int, dict[str, Spectrum]]] = {
        -1: {"a": spectrum(-1.0, 2.0), "b": spectrum(-0.5, 0.1)},
        4: {"a": spectrum(-1.0, 20.0), "b": spectrum(-1.0, -0.5)},
    }

    def test_rows_are_layers_and_columns_epochs(self):
        ax = plot_layers(self.layers)
        image = ax.images[0].get_array()
        assert image.tolist() == [[2.0, 20.0], [0.1, None]]  # no logarithm of what is not positive
        assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["start", "4"]

    def test_other_quantities_are_linear(self):
        ax = plot_layers(self.layers, "c_t", Figure().add_subplot(), xlabel="step")
        assert ax.images[0].get_array().tolist() == [[-0.5, -0.05], [-5.0, None]]  # infinity has no color
        assert ax.get_xlabel() == "step"

    def test_a_layer_that_came_later_is_empty_before(self):
        layers = {0: {"a": spectrum(1.0)}, 1: {"a": spectrum(2.0), "b": spectrum(3.0)}}
        assert plot_layers(layers).images[0].get_array().tolist() == [[1.0, 2.0], [None, 3.0]]

    def test_mistakes(self):
        with pytest.raises(ValueError, match=r"`quantity` must be one of c_t, lambda_max, .*got 'size'"):
            plot_layers(self.layers, "size")
        with pytest.raises(ValueError, match="`history` has no spectra of layers"):
            plot_layers({})
