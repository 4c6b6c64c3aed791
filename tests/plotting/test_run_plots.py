"""What the figures of a run show."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_hesd.plotting import NEGATIVE, POSITIVE, plot_c_t, plot_density_evolution, plot_layers, plot_scalar
from lightning_hesd.plotting.decades import MIN_SHARE_OF_ONE, SMOOTHING
from lightning_hesd.plotting.style import BOTTOM, RunAxis, linear_threshold
from lightning_hesd.spectra.record import SpectrumRecord
from tests.spectra.nodes import spectrum


def record(epoch: int, *nodes: float, step: int | None = None, **arguments: Any) -> SpectrumRecord:
    return SpectrumRecord(epoch, (epoch + 1) * 10 if step is None else step, spectrum(*nodes, **arguments))


FAILED = SpectrumRecord(1, 20, None, "RuntimeError: no luck")
RUN = [record(-1, -0.9, 1.0), record(0, -0.5, 2.0), FAILED, record(2, -0.1, 4.0), record(5, -0.2, 2.5)]
KINDS = {
    "usual": RUN,
    "one": RUN[1:2],
    "failures only": [FAILED, replace(FAILED, epoch=2)],
    "steps": [record(0, -0.1, 1.0, step=3), record(0, -0.2, 1.0, step=6)],
    "positive": [record(epoch, 0.1, 1.0) for epoch in range(60)],
    "negative": [record(0, -2.0, -0.1), record(1, -1.0, 2.0)],
    "deep": [record(0, -1e6, 1.0), record(1, -1e-9, 1.0)],
    "zero": [record(0, 0.0, reason="no curvature"), record(1, -0.1, 1.0)],
    "nothing": [record(0, 0.0, reason="no curvature")],
}


def drawn(ax: Any) -> None:
    """Draw the figure; whatever cannot be drawn warns here."""
    ax.figure.draw_without_rendering()


def line(ax: Any, label: str) -> Any:
    [found] = [line for line in ax.lines if line.get_label() == label]
    return found


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def names(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_can_be_drawn(kind: str) -> None:
    drawn(plot_c_t(KINDS[kind]))
    if kind == "failures only":
        with pytest.raises(ValueError, match="all analyses failed"):
            plot_density_evolution(KINDS[kind])
    else:
        drawn(plot_density_evolution(KINDS[kind]))


@pytest.mark.parametrize("plot", [plot_c_t, plot_density_evolution])
def test_draws_on_the_axes_it_is_given_but_no_empty_run(plot: Any) -> None:
    ax = Figure().subplots(1, 2)[1]
    assert plot(RUN, ax) is ax
    assert ax.lines
    with pytest.raises(ValueError, match="the history has no record"):
        plot([])


# The axis along the run -----------------------------------------------------------------------------------------------


class TestRunAxis:
    def test_epochs_or_steps_and_edges_half_way(self):
        assert RunAxis.of(RUN) == RunAxis((-1, 0, 1, 2, 5), "epoch")
        assert RunAxis.of(KINDS["steps"]) == RunAxis((3, 6), "step")
        assert RunAxis((-1, 0, 4), "epoch").edges().tolist() == [-1.5, -0.5, 2.0, 6.0]
        assert RunAxis((7,), "epoch").edges().tolist() == [6.5, 7.5]

    def test_many_have_round_numbers_and_the_start_apart(self):
        axis = RunAxis((-1, *range(60)), "epoch")
        assert axis.ticks() == [-1, 10, 20, 30, 40, 50]
        assert axis.name(-1) == "start"
        assert RunAxis(tuple(range(60)), "epoch").ticks()[0] == 0
        assert RunAxis((-1, 30, 60, 90), "step").name(-1) == "-1"
        assert RunAxis((-1, 0, 99), "epoch").ticks()[:2] == [-1, 15]  # two that are close do not collide


def test_linear_threshold() -> None:
    assert linear_threshold([-3.0, 0.02, 0.0]) == pytest.approx(0.01)
    assert linear_threshold([0.01]) == pytest.approx(0.01)
    assert linear_threshold([1e-12, 5.0]) == pytest.approx(1e-5)  # far below the largest there is nothing to see
    assert linear_threshold([0.0, math.inf]) == 1.0


# C_t ------------------------------------------------------------------------------------------------------------------


class TestC_t:
    def test_values_and_interval(self):
        run = [record(0, -0.5, 2.0, residual=0.05), record(1, -0.4, 2.0, residual=0.2)]
        ax = plot_c_t(run)
        assert line(ax, "$C_t$ and its interval").get_xydata().tolist() == [[0, -0.25], [1, -0.2]]
        [band] = [c for c in ax.collections if type(c).__name__ in {"PolyCollection", "FillBetweenPolyCollection"}]
        corners = {tuple(point) for point in band.get_paths()[0].vertices}
        bounds = [(r.epoch, bound) for r in run for bound in r.spectrum.c_t_interval]
        assert {(x, max(y, ax.get_ylim()[0])) for x, y in bounds} <= corners
        [bars] = [c for c in ax.collections if type(c).__name__ == "LineCollection"]
        assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[0, 0], [1, 1]]

    def test_threshold_and_sides(self):
        ax = plot_c_t(RUN)
        [threshold] = [line for line in ax.lines if line.get_linestyle() == ":"]
        assert threshold.get_ydata() == [-0.6, -0.6]
        heights = {}
        for patch in ax.patches:
            corners = patch.get_patch_transform().transform(patch.get_path().vertices)
            heights[to_hex(patch.get_facecolor()).upper()] = (corners[:, 1].min(), corners[:, 1].max())
        bottom, top = ax.get_ylim()
        assert heights == {POSITIVE: pytest.approx((-0.6, top)), NEGATIVE: pytest.approx((bottom, -0.6))}
        assert {text.get_text() for text in ax.texts} == {"MP", "MN"}

    def test_logarithmic_only_if_there_are_values_near_zero(self):
        for smallest, scale in ((0.2, "linear"), (0.01, "symlog")):
            ax = plot_c_t([record(0, -0.9, 1.0), record(1, -smallest, 1.0)])
            assert ax.get_yscale() == scale
            assert ax.get_ylim()[0] < -1 < -smallest < 0 < ax.get_ylim()[1]

    def test_marks_of_values_that_are_missing_uncertain_or_beyond_the_axis(self):
        ax = plot_c_t([*RUN, record(6, 0.0, reason="no curvature")])
        assert line(ax, "failed").get_xdata().tolist() == [1]
        assert line(ax, "undefined").get_xdata().tolist() == [6]
        curve = line(ax, "$C_t$ and its interval").get_ydata()
        assert np.isnan(curve).tolist() == [False, False, True, False, False, True]  # a gap, and no line across it
        assert {"failed", "undefined"} <= set(labels(ax))
        assert not {"failed", "undefined"} & set(labels(plot_c_t(RUN[:2])))
        ax = plot_c_t([record(0, -0.1, 1.0), record(1, -0.55, 1.0, residual=0.2)])
        hollow = line(ax, "type uncertain")
        assert hollow.get_xydata().tolist() == [[1, -0.55]]
        assert hollow.get_markerfacecolor() == "white"
        # Without positive curvature C_t is minus infinity: at the bottom, with a mark of its own.
        ax = plot_c_t(KINDS["negative"])
        assert line(ax, "further down").get_xydata().tolist() == [[0, ax.get_ylim()[0]]]

    def test_generalization_beside(self):
        run = [replace(record(0, -0.1, 1.0), generalization=spectrum(-0.3, 1.0)), record(1, -0.2, 1.0)]
        ax = plot_c_t(run)
        assert line(ax, "training").get_ydata().tolist() == [-0.1, -0.2]
        other = line(ax, "generalization").get_ydata()
        assert other[0] == -0.3
        assert math.isnan(other[1])
        assert line(ax, "training").get_color() != line(ax, "generalization").get_color()

    def test_the_legend_hides_no_mark(self):
        run = [record(epoch, -0.1 - 0.04 * epoch, 1.0) for epoch in range(4)]
        run += [replace(FAILED, epoch=epoch) for epoch in (4, 5)]
        ax = plot_c_t(run)
        drawn(ax)
        legend = ax.get_legend().get_window_extent()
        marks = ax.get_xaxis_transform().transform([(4, BOTTOM), (5, BOTTOM)])
        points = ax.transData.transform([(r.epoch, r.spectrum.c_t) for r in run[:4]])
        assert not any(legend.contains(*point) for point in [*marks, *points])

    def test_picks_are_among_equal_losses_and_mp(self):
        ax = plot_c_t(RUN)
        assert line(ax, "highest $C_t$: epoch 2").get_xydata().tolist() == [[2, -0.025]]
        assert line(ax, r"lowest $\lambda_{\max}$: epoch 0").get_xydata().tolist() == [[0, -0.25]]
        assert not any("est $" in label for label in labels(plot_c_t(RUN, tolerance=None)))
        low_loss = replace(record(7, -0.5, 1.0), spectrum=replace(spectrum(-0.5, 1.0), loss=0.1))
        assert "highest $C_t$: epoch 7" in labels(plot_c_t([*RUN, low_loss]))
        assert "highest $C_t$: epoch 2" in labels(plot_c_t([*RUN, low_loss], tolerance=1.0))
        assert not any("highest" in label for label in labels(plot_c_t([record(0, -0.9, 1.0)])))


# Densities ------------------------------------------------------------------------------------------------------------


def mesh(ax: Any) -> Any:
    [found] = [collection for collection in ax.collections if type(collection).__name__ == "QuadMesh"]
    return found


class TestEvolution:
    def test_lines_are_the_extremes_and_the_axes_hold_them(self):
        ax = plot_density_evolution(RUN)
        assert line(ax, r"$\lambda_{\max}$").get_xdata().tolist() == [-1, 0, 1, 2, 5]
        np.testing.assert_array_equal(line(ax, r"$\lambda_{\max}$").get_ydata(), [1.0, 2.0, math.nan, 4.0, 2.5])
        np.testing.assert_array_equal(line(ax, r"$\lambda_{\min}$").get_ydata(), [-0.9, -0.5, math.nan, -0.1, -0.2])
        assert line(ax, "failed").get_xdata().tolist() == [1]
        corners = mesh(ax).get_coordinates()
        assert corners[0, :, 0].tolist() == RunAxis.of(RUN).edges().tolist()
        assert (corners[0, 0, 1], corners[-1, 0, 1]) == pytest.approx(ax.get_ylim())
        assert ax.get_yscale() == "symlog"
        assert ax.get_ylim()[0] < -0.9 < 4.0 < ax.get_ylim()[1]

    def test_every_column_has_its_nodes_and_a_failed_one_nothing(self):
        ax = plot_density_evolution(RUN)
        values, heights = mesh(ax).get_array(), mesh(ax).get_coordinates()[:, 0, 1]
        for column, made in enumerate(RUN):
            shown = ~np.ma.getmaskarray(values)[:, column]
            if made.spectrum is None:
                assert not shown.any()
                continue
            for node in made.spectrum.nodes.ravel():
                assert shown[np.searchsorted(heights, node) - 1]
            assert heights[:-1][shown].min() > 1.5 * made.spectrum.lambda_min
            assert heights[1:][shown].max() < 1.5 * made.spectrum.lambda_max

    def test_density_is_per_decade_and_shared_by_probes(self):
        """An eigenvalue of weight 1/2 far from zero: half of all, spread by a Gaussian on the logarithmic axis."""
        ax = plot_density_evolution([record(0, 1e-3, 100.0)])
        values, heights = mesh(ax).get_array()[:, 0], mesh(ax).get_coordinates()[:, 0, 1]
        upper = heights[:-1] > 1.0
        widths = np.diff(np.log10(heights[heights > 1.0]))
        assert float((values[upper].filled(0.0)[: len(widths)] * widths).sum()) == pytest.approx(0.5, rel=0.06)
        peak = 0.5 / (SMOOTHING * math.sqrt(2 * math.pi))
        assert float(values[upper].max()) == pytest.approx(peak, rel=0.02)
        twice = SpectrumRecord(0, 10, spectrum(1e-3, 100.0, weights=[[0.5, 0.5]] * 2))
        np.testing.assert_allclose(mesh(plot_density_evolution([twice])).get_array()[:, 0], values)

    def test_single_eigenvalues_have_a_color_and_the_smallest_extreme_is_clear_of_zero(self):
        image = mesh(plot_density_evolution(RUN))
        one = 1 / RUN[0].spectrum.dimension / (SMOOTHING * math.sqrt(2 * math.pi))
        assert image.norm.vmin == pytest.approx(MIN_SHARE_OF_ONE * one)
        assert type(image.norm).__name__ == "LogNorm"
        ax = plot_density_evolution([record(0, -0.003, 50.0)])
        assert ax.yaxis.get_transform().linthresh == pytest.approx(0.001)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "100", "1", "0.01"]

    def test_the_weight_of_a_node_with_a_residual_is_spread_over_its_cell(self):
        def column(residual: float) -> Any:
            found = spectrum(-1.0, 0.1, 1.0, weights=[[0.2, 0.6, 0.2]], residual=residual)
            return mesh(plot_density_evolution([SpectrumRecord(0, 0, found)])).get_array()[:, 0].filled(0.0)

        point, spread = column(0.0), column(0.09)
        assert spread.max() < 0.75 * point.max()
        assert spread.sum() == pytest.approx(point.sum(), rel=0.01)


class TestLayersOfAHistory:
    def test_epochs_with_layers_and_failures_only(self):
        layers = {"a": spectrum(-1.0, 2.0), "b": spectrum(-0.5, 4.0)}
        run = [*RUN, *(replace(record(e, 1.0), layers=layers) for e in (6, 9)), replace(FAILED, epoch=10)]
        ax = plot_layers(run)
        assert ax.collections[0].get_array().tolist() == [[None, 2.0, 2.0, None], [None, 4.0, 4.0, None]]
        assert names(ax) == ["1", "6", "9", "10"]
        assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 10]]
        assert ax.get_xlabel() == "epoch"

    def test_steps_where_epochs_have_several_and_an_error_without_layers(self):
        run = [replace(r, layers={"a": spectrum(1.0, 2.0)}) for r in KINDS["steps"]]
        assert names(plot_layers(run)) == ["3", "6"]
        assert plot_layers(run).get_xlabel() == "step"
        with pytest.raises(ValueError, match=r"`history` has no values of layers: .* kept no Krylov basis"):
            plot_layers(RUN)


# Scalars --------------------------------------------------------------------------------------------------------------


def test_a_scalar_over_a_run() -> None:
    ax = plot_scalar(RUN, "lambda_max", title="a run")
    drawn(ax)
    assert names(ax) == ["start", "0", "1", "2", "5"]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([1.0, 2.0, math.nan, 4.0, 2.5], nan_ok=True)
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_title()) == ("linear", "epoch", "a run")
    assert ax.get_ylabel() == r"$\lambda_{\max}$ (loss / parameter²)"
    assert ax.get_legend() is None
    assert plot_scalar([*RUN, record(6, -0.1, 0.4)], "lambda_max").get_yscale() == "log"
    assert plot_scalar([*RUN, record(6, -9.0, 0.4)], "lambda_min").get_yscale() == "linear"


def test_a_scalar_on_generalization_data_a_threshold_and_a_metric() -> None:
    both = [replace(r, generalization=r.spectrum, metrics={"val_acc": 0.9}) for r in RUN if r.spectrum is not None]
    both[1] = replace(both[1], metrics={})
    ax = plot_scalar(both, "loss")
    drawn(ax)
    assert labels(ax) == ["training data", "generalization data"]
    ax = plot_scalar(both, "delta_r_e")
    assert labels(ax) == ["$Δr_e$", "threshold 1.5"]
    ax = plot_scalar(both, "val_acc")
    assert ax.get_ylabel() == "val_acc"
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, True, False, False]
    known = r"no record has a value of 'c-t': pass one of c_t, .*, delta_r_e, .*val_acc\."
    with pytest.raises(ValueError, match=known):
        plot_scalar(both, "c-t")


def test_a_scalar_over_several_runs() -> None:
    other = [replace(r, generalization=r.spectrum, epoch=r.epoch + 3) for r in RUN if r.spectrum is not None]
    ax = plot_scalar({"a": RUN, "b": other}, "lambda_max")
    drawn(ax)
    assert labels(ax) == ["a", "b", "b, generalization data"]
    assert [list(line.get_xdata()) for line in ax.lines] == [[-1, 0, 1, 2, 5], *[[2, 3, 5, 8]] * 2]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--"]
    assert len({line.get_color() for line in ax.lines}) == 2
    steps = KINDS["steps"]
    assert plot_scalar({"a": steps, "b": RUN[1:]}, "lambda_max").get_xlabel() == "step"  # where one run needs them
    many = {str(number): RUN for number in range(12)}
    ax = plot_scalar(many, "lambda_max")
    drawn(ax)
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 12
    assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1  # beside the curves
    with pytest.raises(ValueError, match="no record"):
        plot_scalar({"a": RUN, "b": []}, "lambda_max")
