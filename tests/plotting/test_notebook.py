"""What a console and a notebook show of spectra and histories, and which figures are shown."""

import base64
import html
import io
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread

from lightning_hesd import LayerSpectra, SpectrumHistory, judge
from lightning_hesd.plotting import offscreen, plot_density
from lightning_hesd.spectra.assessment import CAVEAT, TITLE
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.training.loggers.output import figures
from tests.judgment import simulated
from tests.states import history_of
from tests.training.scripted import make_spectrum


@pytest.fixture
def history() -> SpectrumHistory:
    records = [SpectrumRecord(epoch, 10 * epoch, make_spectrum(-0.1 - epoch / 10)) for epoch in range(3)]
    return history_of(*records, SpectrumRecord(3, 30, None, error="out of <memory>\nand more"))


def test_each_is_one_line_in_a_console(history: SpectrumHistory) -> None:
    assert repr(history) == "<SpectrumHistory: 4 records, epochs 0 to 3>"
    assert repr(SpectrumHistory()) == "<SpectrumHistory: 0 records>"
    assert repr(history[1]).startswith("<SpectrumRecord of epoch 1, step 10: C_t = -0.2 [")
    assert repr(history[3]) == "<SpectrumRecord of epoch 3, step 30: failed: out of <memory>>"
    assert repr(history[0].spectrum) == f"<Spectrum: {history[0].spectrum}>"
    assert not any("\n" in repr(each) for each in (history, *history, history[0].spectrum))


def test_a_notebook_shows_a_spectrum_with_its_density(history: SpectrumHistory) -> None:
    shown = history[0].spectrum._repr_html_()
    assert shown.startswith("<div>C_t = -0.1 ")
    image = imread(io.BytesIO(base64.b64decode(shown.split("base64,")[1].split("'")[0])))
    assert np.ptp(image[..., :3]) > 0.5, "not an empty image"
    assert not plt.get_fignums(), "it is shown once, not again at the end of the cell"


def test_a_notebook_shows_a_history_as_a_table_and_a_record_with_criteria_and_metrics(history: SpectrumHistory) -> None:
    shown = history._repr_html_()
    assert shown.count("<tr>") == 5
    assert "<td>-0.2</td>" in shown
    assert "out of &lt;memory&gt;" in shown
    assert SpectrumHistory()._repr_html_() == "&lt;SpectrumHistory: 0 records&gt;"
    made = replace(history[0], generalization=make_spectrum(-0.2), metrics={"val_<acc>": 0.91})
    shown = made._repr_html_()
    assert shown.startswith("<div>analysis of epoch 0, step 0</div><div>C_t = -0.1 ")
    assert f"{TITLE} ({CAVEAT}): " in shown
    assert "<th>val_&lt;acc&gt;</th>" in shown
    assert "failed: out of &lt;memory&gt;" in history[3]._repr_html_()


def test_layers_show_themselves() -> None:
    wide = replace(make_spectrum(-0.3, lambda_max=4.0), residuals=np.array([[0.1, 0.4]]))
    layers = LayerSpectra({"a<b>": make_spectrum(-0.2), "c": wide, "without": make_spectrum(math.nan)})
    assert repr(layers) == "<LayerSpectra of 3 layers: a<b>, c, without>"
    assert repr(LayerSpectra(dict.fromkeys("abcde", wide))).endswith("of 5 layers: a, b, c and 2 more>")
    shown = layers._repr_html_()
    assert shown.count("<tr>") == 4
    assert "<td>a&lt;b&gt;</td><td>2</td><td>-0.2</td><td>[-0.2, -0.2]</td><td>MP</td>" in shown
    assert "<td>undefined</td><td>no curvature</td>" in shown
    axes = layers.plot()
    points = {(x, y) for line in axes.lines if line.get_marker() == "o" for x, y in line.get_xydata().tolist()}
    assert points == {(-0.2, 0), (1, 0), (-1.2, 1), (4, 1)}
    ends = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(end[0] == 4 and end[1] > 4 for end in ends), "the bound beyond the largest node"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(layers)
    assert plt.get_fignums()
    with pytest.raises(ValueError, match="no layer has eigenvalues"):
        LayerSpectra().plot()


def test_a_notebook_shows_a_judgment() -> None:
    generator = np.random.default_rng(0)
    found = judge([simulated.history(generator, effect=0.0) for _ in range(7)], "val_acc")
    shown = found._repr_html_()
    assert html.escape(found.sentence) in shown
    assert shown.count("<table>") == len(found.comparisons)
    assert "<td>highest C_t</td>" in shown
    assert all(f"<li>{html.escape(remark)}</li>" in shown for remark in found.remarks)


def test_figures_are_shown_unless_they_are_for_a_log(history: SpectrumHistory) -> None:
    spectrum = history[0].spectrum
    axes = spectrum.plot()
    assert [plt.figure(number) for number in plt.get_fignums()] == [axes.figure]
    with offscreen():
        plot_density(spectrum)
    del history[3]
    assert list(figures(history))
    assert len(plt.get_fignums()) == 1


def test_plots_by_name(history: SpectrumHistory) -> None:
    spectrum = history[0].spectrum
    axes = plt.figure().add_subplot()
    assert spectrum.plot("cumulative", ax=axes) is axes
    assert axes.get_xlabel() != spectrum.plot().get_xlabel()
    with pytest.raises(ValueError, match="`kind` must be 'density' or 'cumulative' or 'losses_along', got 'bars'"):
        spectrum.plot("bars")  # type: ignore[arg-type]
    assert history.plot().get_ylabel() != history.plot("density_evolution").get_ylabel()
    with pytest.raises(ValueError, match="`kind` must be"):
        history.plot("bars")  # type: ignore[arg-type]
