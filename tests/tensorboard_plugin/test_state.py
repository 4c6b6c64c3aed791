"""The HESD tab's part about one state: what is drawn and said of spectra, their errors, layers and failures.

One server and one page for all tests; each chooses the state that it looks at.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_hesd import Spectrum, SpectrumHistory
from lightning_hesd.spectra.findings import findings
from lightning_hesd.spectra.quadrature import legible_sigma
from tests.browser import Page, hyphens, needs_browser
from tests.states import EIGENVALUES, FAILURE, LAYERS, write_states
from tests.tab import Server, Tab

pytestmark = needs_browser

SIGMA = 0.06  # decades, by which densities are smoothed on the logarithmic axis
NONE, GAUSS_NEWTON = "\N{EN DASH}", "Gauss\N{EN DASH}Newton"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, SpectrumHistory], Tab]:
    folder = tmp_path_factory.mktemp("states")
    return write_states(folder), Tab(folder)


@pytest.fixture
def histories(written: tuple[dict[str, SpectrumHistory], Tab]) -> dict[str, SpectrumHistory]:
    return written[0]


@pytest.fixture
def page(driver: Any, server: Server, written: tuple[Any, Tab]) -> Iterator[Page]:
    """The page, at epoch 0 of the run with every kind of state, with the choices it opens with."""
    page = Page(driver)
    page.keep("states", lambda: page.open_tab(server.show(written[1])))
    page.show_in_detail("every_kind")
    while page.script("return document.querySelector('#density-choices .pin button')"):
        page.click("#density-choices .pin button")
    page.click("#density-choices button", "symlog")
    if page.script("return document.querySelector('[data-field=spectrum]')"):
        page.click("#density-choices button", "both")
    choose(page, 10)
    yield page
    page.assert_clean("http://localhost:")


def choose(page: Page, step: int) -> None:
    """Choose the state at an optimizer step, with the slider."""
    page.slide([0, 10, 30, 60, 90, 110].index(step), step)


def drawn(page: Page, kind: str, *, shown: bool = True) -> dict[str, dict[str, Any]]:
    """Return the traces of the chart of densities by label: "density", "density_band", "nodes" or "extremes"."""
    traces = page.script(
        "return document.getElementById('density').data.map(({x, y, meta, visible, customdata, line}) =>"
        " ({x, y, meta, customdata, line, shown: visible === true}))"
    )
    return {t["meta"][kind]: t for t in traces if kind in t["meta"] and t["shown"] == shown}


def span(page: Page) -> list[float]:
    return page.script("return document.getElementById('density')._fullLayout.xaxis.range")


def symlog(linear: float) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """Return the map from eigenvalues to places on the axis of the chart, and back."""
    return (
        lambda values: np.sign(values) * np.log10(1 + np.abs(values) / linear),
        lambda places: np.sign(places) * linear * (10 ** np.abs(places) - 1),
    )


def gaussians(at: np.ndarray, centers: np.ndarray, mass: np.ndarray | float) -> np.ndarray:
    kernel = np.exp(-0.5 * ((at[:, None] - centers) / SIGMA) ** 2) / (SIGMA * math.sqrt(2 * math.pi))
    return (kernel * mass).sum(axis=1)


def density_on(spectrum: Spectrum, linear: float, at: np.ndarray) -> np.ndarray:
    """Return the density of `spectrum.distribution` per decade of the axis, by its own cumulative numbers."""
    to, back = symlog(linear)
    low, high, mass = spectrum.distribution.pieces
    points = low == high
    edges = np.linspace(at[0] - 1, at[-1] + 1, 8001)
    cells = np.zeros(len(edges) - 1)
    for start, end, weight in zip(low[~points], high[~points], mass[~points], strict=True):
        cells += weight * np.diff(((back(edges) - start) / (end - start)).clip(0, 1))
    middles = (edges[1:] + edges[:-1]) / 2
    return gaussians(at, middles, cells) + gaussians(at, to(low[points]), mass[points])


def test_densities_on_the_logarithmic_axis_are_those_of_python(page: Page, histories: Any) -> None:
    record = histories["every_kind"][1]
    curves = drawn(page, "density")
    assert list(curves) == ["training", "generalization"]
    to, _ = symlog(0.01)  # the power of ten below the smallest extreme, -0.016
    for label, spectrum in (("training", record.spectrum), ("generalization", record.generalization)):
        x, y = np.array(curves[label]["x"]), np.array(curves[label]["y"])
        assert to(np.array(curves[label]["customdata"])) == pytest.approx(x, abs=1e-9)
        assert np.trapezoid(y, x) == pytest.approx(1, abs=2e-3)
        expected = density_on(spectrum, 0.01, x)
        visible = expected > 1e-4 * expected.max()
        np.testing.assert_allclose(y[visible], expected[visible], rtol=0.01)
        assert drawn(page, "nodes")[label]["x"] == pytest.approx(list(to(spectrum.nodes[0])), rel=1e-5, abs=1e-6)
        ends = [spectrum.lambda_min, spectrum.lambda_max]
        shown = [value for value in drawn(page, "extremes")[label]["x"] if value is not None]
        assert shown[::2] == pytest.approx(list(to(np.array(ends))), rel=1e-5)
    titles = "const { xaxis, yaxis } = document.getElementById('density').layout;"
    axes = page.script(f"{titles} return [xaxis, yaxis].map(({{ title }}) => title.text)")
    assert axes == ["Hessian eigenvalue (symlog, linear below 0.01)", "share of eigenvalues per decade"]


def test_the_band_contains_the_density_of_the_true_eigenvalues(page: Page) -> None:
    to, _ = symlog(0.01)
    for label, field in (("training", "spectrum"), ("generalization", "generalization")):
        band = drawn(page, "density_band")[label]
        count = len(band["x"]) // 2
        at = np.array(band["x"][:count])
        high, low = np.array(band["y"][:count]), np.array(band["y"][count:][::-1])
        truth = gaussians(at, to(EIGENVALUES[field]), 1 / len(EIGENVALUES[field]))
        bottom = low.min()  # zero has no place on a logarithmic axis
        assert (low <= np.maximum(truth, bottom) * 1.001).all()
        assert (np.maximum(truth, bottom) <= high * 1.001).all()
        largest = np.argmin(abs(at - to(np.array(EIGENVALUES[field].max()))))
        assert high[largest] == pytest.approx(low[largest], rel=1e-3)  # it has converged
        assert high.max() > 1.2 * low[np.argmax(high)]


def test_hiding_a_spectrum_hides_all_of_it_and_the_axes_follow(page: Page, histories: Any) -> None:
    whole = span(page)
    page.click("[data-field=generalization]")
    page.until("return document.getElementById('density')._fullLayout.xaxis.range[1] < arguments[0] / 2", whole[1])
    for kind in ("density", "density_band", "nodes", "extremes"):
        assert list(drawn(page, kind)) == ["training"]
        assert "generalization" in drawn(page, kind, shown=False)
    pressed = "return document.querySelector('#density-choices [aria-pressed=true]:not(:first-of-type)')?.innerText"
    page.click("#density-choices button", "generalization")
    page.until("return document.getElementById('density').layout.xaxis.title.text.includes('linear below 1)')")
    assert list(drawn(page, "density")) == ["generalization"]
    assert page.script(pressed) == "generalization"
    page.click("#density-choices button", "both")
    page.until("return document.getElementById('density')._fullLayout.xaxis.range[1] > arguments[0]", whole[1] - 1e-6)
    # A linear axis has the density with respect to eigenvalues.
    page.click("#density-choices button", "linear")
    page.until("return document.getElementById('density')._fullLayout.xaxis.range[1] > 500")
    spectrum = histories["every_kind"][1].generalization
    curve = drawn(page, "density")["generalization"]
    sigma = legible_sigma(spectrum.lambda_min, spectrum.lambda_max)
    y, (x, expected) = np.array(curve["y"]), spectrum.density(curve["x"], sigma)
    visible = y > 1.01 * y.min()
    np.testing.assert_allclose(y[visible], expected[visible], rtol=2e-3)
    assert curve["customdata"] == pytest.approx(list(x))


def test_the_address_has_the_choices(page: Page) -> None:
    page.click("#density-choices button", "training")
    page.click("#density-choices button", "linear")
    sort(page, "value")
    choices = ['scales={"density":"linear"}', 'spectra=["spectrum"]', "order=value"]
    page.until(
        "const hash = decodeURIComponent(location.hash); return arguments[0].every((c) => hash.includes(c))", choices
    )
    page.script("location.hash = location.hash.replace('spectrum%22%5D', 'generalization%22%5D')")
    page.until("return document.querySelector('[data-field=generalization]').checked")
    assert list(drawn(page, "density")) == ["generalization"]
    title = page.script("return document.getElementById('density').layout.xaxis.title.text")
    assert title.endswith("(loss / parameter²)")
    sort(page, "")
    page.click("#density-choices button", "symlog")
    page.until("return !location.hash.includes('order') && !location.hash.includes('density')")


def test_every_spectrum_of_the_record_and_other_states_beside_it(
    page: Page, histories: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessians = ["Hessian, training data", "Hessian, generalization data", "Preconditioned Hessian"]
    others = [f"{GAUSS_NEWTON} matrix", f"Residual: Hessian − {GAUSS_NEWTON}"]
    assert page.texts("#density-choices label") == hessians + others
    for field in ("preconditioned", "ggn", "residual"):
        page.click(f"[data-field={field}]")
    page.until("return document.getElementById('density').data.every(({ visible }) => visible === true)")
    curves = drawn(page, "density")
    assert list(curves) == ["training", "generalization", "preconditioned", GAUSS_NEWTON, "residual"]
    assert len({curve["line"]["color"] for curve in curves.values()}) == 5
    assert drawn(page, "density_band") == {}  # they would hide each other
    title = "return document.getElementById('density').layout.xaxis.title.text"
    page.click("#density-choices button", "linear")
    page.until(f"{title} === 'eigenvalue'")  # the preconditioned ones have another unit
    page.click("#density-choices button", "symlog")
    page.click("#density-choices button", "training")
    page.click("#density-choices button", "Pin this state")
    choose(page, 90)
    page.click("#density-choices button", "Pin other runs")
    page.until("return document.getElementById('density').data.some(({ meta }) => meta.nodes?.startsWith('other'))")
    curves = drawn(page, "density")
    states = ["every_kind, epoch 8", "every_kind, epoch 0", "other, epoch 5"]
    assert list(curves) == [f"{state}, training" for state in states]
    assert len({curve["line"]["color"] for curve in curves.values()}) == 3
    to, _ = symlog(1e-4)  # below the smallest extreme of these, that of epoch 8
    nodes = drawn(page, "nodes")["other, epoch 5, training"]["x"]
    assert nodes == pytest.approx(list(to(histories["other"][1].spectrum.nodes[0])), rel=1e-5, abs=1e-6)
    page.export("density")
    monkeypatch.chdir(tmp_path)
    exec(page.script("return document.querySelector('dialog pre').textContent"), scope := {})  # noqa: S102 - as users do
    shown = [histories["every_kind"][4], histories["every_kind"][1], histories["other"][1]]
    assert {title: s.c_t for title, s in scope["spectra"].items()} == {
        f"{state}, training": record.spectrum.c_t for state, record in zip(states, shown, strict=True)
    }
    page.click("dialog button", "Close")
    page.click("#density-choices .pin button", "Remove every_kind, epoch 0")
    assert list(drawn(page, "density")) == ["every_kind, epoch 8, training", "other, epoch 5, training"]


NUMBERS = """
return Object.fromEntries([...document.querySelectorAll('#state [data-row]')]
  .map((row) => [row.dataset.row, [...row.querySelectorAll('td')].map((cell) => cell.innerText)]))
"""


def test_numbers_have_their_errors_and_no_more_digits(page: Page, histories: Any) -> None:
    record = histories["every_kind"][1]
    rows = page.script(NUMBERS)
    spectra = [record.spectrum, record.generalization, record.preconditioned, record.ggn, record.residual]
    assert all(len(cells) == len(spectra) for cells in rows.values())
    for cell, spectrum in zip(rows["trace"], spectra, strict=True):
        value, error = map(float, hyphens(cell).split(" ± "))
        assert spectrum.trace_error <= error <= 2 * spectrum.trace_error
        assert value == pytest.approx(spectrum.trace, abs=error / 2)
    for row, value_of in (("λ_max", lambda s: s.lambda_max), ("λ_min", lambda s: s.lambda_min)):
        for cell, spectrum in zip(rows[row], spectra, strict=True):
            value, error = map(float, [*hyphens(cell).split(" ± "), "0"][:2])
            assert value == pytest.approx(value_of(spectrum), rel=1e-5, abs=error)
    low, high = record.spectrum.c_t_interval
    found = re.fullmatch(r"\[(.*), (.*)\]", hyphens(rows["Lanczos interval"][0]))
    assert low - 0.1 * (high - low) <= float(found[1]) <= low < high <= float(found[2]) <= high + 0.1 * (high - low)
    assert "Lanczos interval, 95 %" in page.text("#state")
    assert rows["sampling error"] == ["0.0031", NONE, NONE, NONE, NONE]
    total = float(rows["total error"][0].removeprefix("± "))
    assert total == pytest.approx(record.spectrum.c_t_total_error, rel=0.05)
    least, most = record.spectrum.negative_count
    assert rows["negative eigenvalues"][0] == (f"{least}" if least == most else f"{least} to {most}") + " of 500"
    assert rows["verified"] == ["yes"] * 5
    assert rows["type"][:2] == [record.spectrum.hesd_type, record.generalization.hesd_type]
    said = page.text("#state")
    assert f"preconditioned λmax is {record.stability_ratio:.3g} times the largest" in said.replace("\n", "")
    assert "it is beyond the edge of stability" in said
    assert "Gradients of this epoch: not clipped in 16 sampled steps. Cosine of gradient and update: 0.7." in said
    assert "without sampling error" in page.text("#assessment")
    choose(page, 60)
    assert page.script(NUMBERS)["total error"] == ["unknown"]
    assert page.script(NUMBERS)["sampling error"] == ["not estimated: pass sampling_error=True"]
    clipping = "clipped in 75 % of 16 sampled steps, to 0.4 of their norm on average; cosine of before and after 0.93"
    assert clipping in page.text("#state")
    choose(page, 110)
    assert page.script(NUMBERS)["verified"] == ["unknown"]
    assert page.script(NUMBERS)["sampling error"] == ["not estimated: only 3 groups"]
    bars = page.script("return document.getElementById('ct').data.map(({ error_y }) => error_y).filter(Boolean)")
    assert len(bars) == 1  # of the run whose sampling error is known
    ends = [size for side in ("array", "arrayminus") for size in bars[0][side] if size is not None]
    assert max(ends) == pytest.approx(record.spectrum.c_t_total_error, rel=1e-5)


def test_how_numbers_are_written(page: Page) -> None:
    cases = {
        ("withError", -0.03124, 0.00061): "−0.0312 ± 0.0007",
        ("withError", 1.3504, 0.0123): "1.350 ± 0.013",
        ("withError", 123456.0, 789.0): "1.235e+5 ± 8e+2",
        ("withError", 2.5e-7, 3e-9): "2.50e−7 ± 3e−9",
        ("withError", 0.0003, 0.02): "0.00 ± 0.02",
        ("withError", -0.0003, 0.02): "0.00 ± 0.02",
        ("withError", 1.35, 0.0): "1.35",
        ("withError", 1.23456, None): "1.23",
        ("withError", None, 0.1): NONE,
        ("within", -0.031234, -0.0313, -0.0312): "−0.03123",
        ("intervalOf", -0.03129, -0.03114): "[−0.03129, −0.03114]",
        ("intervalOf", 0.1234, 4.5671): "[0.1, 4.6]",
        ("intervalOf", None, -0.6): "[−∞, −0.6]",
    }
    written = page.script(
        "const [cases] = arguments; return import('/data/plugin/hesd/uncertainty.js')"
        ".then((module) => cases.map(([name, ...values]) => module[name](...values)))",
        [list(case) for case in cases],
    )
    assert dict(zip(cases, written, strict=True)) == cases


def test_badges_say_what_is_unusual_and_why(page: Page, histories: Any) -> None:
    def badges() -> dict[str, str]:
        items = "[...document.querySelectorAll('#state .badges li')]"
        return dict(page.script(f"return {items}.map((item) => [...item.children].map((part) => part.innerText))"))

    assert badges() == {"verified": "differences of loss and gradient agree to 1e-9"}
    choose(page, 0)
    assert badges()["MN"].startswith("the weights are random. C_t is -1 at the start")
    choose(page, 60)
    assert badges()["MN"].startswith("gradients are clipped. C_t is -2 at epoch 5, and gradients were clipped in 75%")
    choose(page, 90)
    [singular] = [f for f in findings(histories["every_kind"][:5]) if f.key == "quasi_singular"]
    assert badges()["quasi-singular"] == f"{singular.evidence} {singular.action}"
    choose(page, 110)
    assert badges()["not verified"] == "kinks of the loss hide it"
    undefined = {"findings": [], "spectra": {"spectrum": {"type": None, "reason": "no curvature"}}}
    ask = "const [record] = arguments; return import('/data/plugin/hesd/state.js').then((m) => m.badgesOf(record))"
    found = page.script(ask, undefined)[0]
    assert (found["badge"], found["why"]) == ("no C_t", "no curvature")


def card_of(page: Page, figure: str) -> tuple[int, str]:
    """Return height and text of the card of a figure."""
    card = "const card = document.getElementById(arguments[0]).closest('figure');"
    return page.script(f"{card} return [card.offsetHeight, card.innerText]", figure)


def test_failures_are_shown_where_they_happened(page: Page) -> None:
    for figure in ("map", "layers"):
        marks = [t for t in page.traces(figure) if (t.get("meta") or {}).get("failed")]
        assert [mark["x"] for mark in marks] == [[2]]
        columns = page.traces(figure)[0]
        assert columns["x"] == [-1, 0, 2, 5, 8, 10]
        empty = {x for place, x in enumerate(columns["x"]) if all(row[place] is None for row in columns["z"])}
        assert empty == {2}
        # A column reaches halfway to its neighbors, so that nothing else is empty.
        edges = page.script("return document.getElementById(arguments[0]).calcdata[0][0].x", figure)
        assert edges == pytest.approx([-1.5, -0.5, 1, 3.5, 6.5, 9, 11])
    choose(page, 30)
    assert page.script("return document.querySelector('#state .badge').innerText") == "failed"
    assert FAILURE in page.text("#state")
    for figure in ("density", "cumulative", "along"):
        height, text = card_of(page, figure)
        assert height < 60  # a line, no empty card
        assert "This analysis failed." in text
    choose(page, 10)
    assert card_of(page, "density")[0] > 300
    height, text = card_of(page, "along")
    assert height < 60
    assert "pass loss_along_eigenvectors=True" in text


def test_layers(page: Page, histories: Any) -> None:
    names = [name.removeprefix("model.encoder.") for name in LAYERS]
    page.until_texts("#layers .ytick text", names)
    assert page.script("return document.getElementById('layers').layout.yaxis.title.text") == "layer of model.encoder"
    figure = "const { z, meta } = document.getElementById('layers').data[0];"
    values = page.script(f"{figure} return [z.map((row) => row[1]), meta.colors]")
    shares = [trace / sum(LAYERS.values()) for trace in LAYERS.values()]
    assert values == [pytest.approx([math.copysign(math.sqrt(abs(s)), s) for s in shares], rel=1e-3), "root"]
    sort(page, "value")
    ordered = sorted(LAYERS, key=lambda name: -LAYERS[name])
    page.until_texts("#layers .ytick text", [name.removeprefix("model.encoder.") for name in ordered])
    sort(page, "")
    page.show_in_detail("other")  # the spectra of its layers differ in size
    page.until("return document.getElementById('layers').data[0].meta.colors === 'log'")
    drawn_values = page.script(f"{figure} return z.map((row) => row[1])")
    expected = [spectrum.lambda_max for spectrum in histories["other"][1].layers.values()]
    assert [10**value for value in drawn_values] == pytest.approx(expected, rel=1e-3)


def sort(page: Page, order: str) -> None:
    page.script(
        "const menu = document.querySelector('#layers-tools label + label select');"
        "menu.value = arguments[0]; menu.dispatchEvent(new Event('change'))",
        order,
    )
