"""The HESD tab in a browser, served by TensorBoard: what is drawn, said, and asked of the server."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from lightning_hesd import Spectrum, compare_with_reference, judge
from lightning_hesd.commands.report import report
from lightning_hesd.plotting import plot_losses_along
from lightning_hesd.plotting.cumulative import BOTTOM, numbers_beyond
from lightning_hesd.spectra.decisions import run_payload
from lightning_hesd.spectra.findings import Finding
from lightning_hesd.spectra.payload import record_payload
from lightning_hesd.spectra.reference_table import QUANTITIES, ReferenceState
from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
from tests.browser import Page, hyphens, needs_browser, webdriver
from tests.states import history_of
from tests.tab import EPOCHS, Server, Tab, tensorboard, train, write_payloads
from tests.training.scripted import make_spectrum

pytestmark = needs_browser

EVIL = "<b><img src=x onerror=window.injected=1>"
COLORS = ("#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6")
"""What TensorBoard gives to runs, in the order of /data/runs."""

FIRST, SECOND = "net/version_0", "net/version_1"
CURVES = "return document.getElementById('ct')._fullData.filter((trace) => trace.meta?.key && !trace.meta.pick)"


@pytest.fixture(scope="module")
def runs(trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two trainings, a run with hostile names, one from the future and one that is damaged."""
    before, first = trained
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(before, folder, dirs_exist_ok=True)
    train(folder, seed=1, loss_along_eigenvectors=True)
    hostile = record_payload(SpectrumRecord(0, 4, make_spectrum(-0.3), layers={EVIL: make_spectrum(-0.2)}))
    write_payloads(folder / EVIL, [hostile])
    write_payloads(folder / "newer", [{**hostile, "version": 2}])
    (folder / "damaged").mkdir()
    (folder / "damaged" / "events.out.tfevents.1.host").write_bytes(bytes(range(256)) * 8)
    return folder, first


@pytest.fixture(scope="module")
def address(runs: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tensorboard(runs[0], tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def tab(driver: Any, address: str) -> Iterator[Page]:
    """The open tab, with all runs selected. A run in detail stays chosen."""
    page = Page(driver)
    page.keep(address, lambda: page.open_tab(address))
    if page.script("return document.querySelector('#runs .run input:not(:checked)')"):
        page.click("#runs button", "All")
    page.until(f"{CURVES}.length === 3")
    yield page
    page.assert_clean(address)


CRITERIA = {"good": "hold", "poor": "fail", "undecided": "are undecided", "not applicable": "do not apply"}


def test_the_curves_are_the_records(tab: Page, runs: tuple[Path, Any]) -> None:
    tab.change("#ct-tools select", "linear")
    tab.until("return document.getElementById('ct')._fullLayout.yaxis.type === 'linear'")
    records = runs[1].history
    c_t = next(trace for trace in tab.curves("ct") if FIRST in trace["name"])
    assert c_t["x"] == [record.epoch for record in records]
    assert c_t["y"] == pytest.approx([record.spectrum.c_t for record in records], rel=1e-6)
    band = next(trace for trace in tab.traces("ct") if FIRST in trace["meta"].get("band", ""))
    low, high = zip(*(record.spectrum.c_t_interval for record in records), strict=True)
    assert band["y"] == pytest.approx([*high, *reversed(low)], rel=1e-6)
    shapes = tab.script("return document.getElementById('ct').layout.shapes")
    lines = [shape for shape in shapes if shape["type"] == "line" and shape.get("name") != "chosen"]
    assert [(line["y0"], line["y1"]) for line in lines] == [(-0.6, -0.6)]
    largest, smallest = (trace for trace in tab.curves("extremes") if FIRST in trace["name"])
    assert largest["y"] == pytest.approx([record.spectrum.lambda_max for record in records], rel=1e-6)
    assert smallest["y"] == pytest.approx([-record.spectrum.lambda_min for record in records], rel=1e-6)
    r_e, k_h05 = (trace for trace in tab.curves("deltas") if FIRST in trace["name"])
    assert r_e["y"] == pytest.approx([record.assessment.delta_r_e for record in records], rel=1e-6)
    assert k_h05["y"] == pytest.approx([record.assessment.delta_k_h05 for record in records], rel=1e-6)
    training, other = (trace for trace in tab.curves("loss") if FIRST in trace["name"])
    accuracy = next(trace for trace in tab.curves("metric") if FIRST in trace["name"])
    assert training["y"] == pytest.approx([record.spectrum.loss for record in records], rel=1e-6)
    assert other["y"] == pytest.approx([record.generalization.loss for record in records], rel=1e-6)
    assert accuracy["y"][0] is None  # nothing was trained yet
    assert len(accuracy["y"]) == EPOCHS + 1


def test_hostile_names_are_shown_as_they_are_and_what_cannot_be_read_is_said(tab: Page) -> None:
    assert EVIL in tab.text("#runs")
    tab.point_at("#ct .nsewdrag")
    tab.until("return document.querySelector('#values').innerText.includes(arguments[0])", EVIL)
    tab.show_in_detail(EVIL)
    tab.until("return document.getElementById('layers').classList.contains('js-plotly-plot')")
    assert tab.script("return document.querySelector('#layers .ytick text').textContent").endswith(EVIL[-12:])
    tab.script("document.getElementById('table').open = true")
    tab.until("return document.querySelector('#table td')")
    assert EVIL in tab.text("#table")
    assert tab.script("return document.querySelectorAll('img').length") == 0
    said = "newer, step 0: the payload has version 2, and this lightning_hesd reads version 1: update it."
    assert tab.text("#problems") == said
    assert tab.script("return document.querySelector('#problems p').getAttribute('role')") == "alert"


def test_the_pick_and_why(tab: Page, runs: tuple[Path, Any]) -> None:
    best = runs[1].checkpoint.best
    tab.show_in_detail(FIRST)
    said = tab.text("[data-rule=highest_c_t]")
    assert f"highest C_t takes epoch {best.epoch} (step {best.global_step})" in said
    assert "have a train_acc within 0.2 of the best" in said
    assert best.path in said
    assert "no checkpoint was kept by this rule" in tab.text("[data-rule=lowest_max_eigenvalue]")
    stars = [t for t in tab.traces("ct") if t["meta"].get("pick") == "highest_c_t" and FIRST in t["meta"]["key"]]
    assert [star["x"] for star in stars] == [[best.epoch]]


def test_the_slider_moves_density_and_assessment_by_keyboard(tab: Page, runs: tuple[Path, Any]) -> None:
    tab.show_in_detail(FIRST)
    tab.click("#density-choices button", "linear")
    tab.script("document.getElementById('epoch').focus()")
    keys = webdriver.Keys
    for key, position in ((None, -1), (keys.ARROW_LEFT, -2), (keys.HOME, 0), (keys.END, -1)):
        record = runs[1].history[position]
        if key is not None:
            tab.press(key)
        tab.until("return document.body.dataset.detail.endsWith(arguments[0])", f" {record.global_step}")
        nodes = [t for t in tab.traces("density") if "nodes" in t["meta"]]
        assert [t["meta"]["nodes"] for t in nodes] == ["training", "generalization"]
        for trace, spectrum in zip(nodes, (record.spectrum, record.generalization), strict=True):
            assert trace["x"] == pytest.approx(spectrum.nodes[0], rel=1e-6)
        title = "start" if record.epoch < 0 else f"epoch {record.epoch}"
        assert tab.script("return document.getElementById('epoch').getAttribute('aria-valuetext')") == title
        said = tab.text("#assessment")
        assert said.startswith(f"{title}: the paper's criteria {CRITERIA[record.assessment.verdict]} (Gabdullin 2025")
        assert all(reason in hyphens(said) for reason in record.assessment.reasons)
        line = tab.script("return document.getElementById('map').layout.shapes.find((s) => s.name === 'chosen').x0")
        assert line == record.epoch


def test_heat_maps(tab: Page, runs: tuple[Path, Any]) -> None:
    history = runs[1].history
    tab.show_in_detail(FIRST)
    density = tab.traces("map")[0]
    assert density["x"] == [record.epoch for record in history]
    for column, record in enumerate(history):
        rows = zip(density["y"], density["z"], strict=True)
        cells = [(y, 10 ** row[column]) for y, row in rows if row[column] is not None]
        assert sum(share for _, share in cells) == pytest.approx(1.0, abs=1e-6)
        negative = sum(share for y, share in cells if y < 0)
        assert negative == pytest.approx(record.spectrum.distribution.cumulative([0.0])[0], abs=0.1)
    layers = tab.traces("layers")[0]
    names = list(history[0].layers)
    for name, row in zip(names, layers["z"], strict=True):
        expected = [record.layers[name].lambda_max for record in history]
        assert [value**2 for value in row] == pytest.approx(expected, rel=5e-4)  # four digits
    assert (names, tab.texts("#layers .ytick text")) == (["net.0", "net.2"], ["0", "2"])


def test_numbers_of_eigenvalues(tab: Page, runs: tuple[Path, Any]) -> None:
    record = runs[1].history[-1]
    low, high = record.spectrum.negative_count
    assert low < high
    tab.show_in_detail(FIRST)
    assert f"{low} to {high} of {record.spectrum.dimension} eigenvalues are negative" in tab.text("#assessment")
    curves = {t["meta"]["numbers"]: t for t in tab.traces("cumulative") if "numbers" in t["meta"]}
    assert curves["training"]["name"] == f"training: {low} to {high} negative"
    bands = {t["meta"]["band"]: t for t in tab.traces("cumulative") if "band" in t["meta"]}
    for label, spectrum in (("training", record.spectrum), ("generalization", record.generalization)):
        places, numbers = curves[label]["customdata"], curves[label]["y"]
        middle = numbers.index(None)
        for is_above, side in ((False, slice(0, middle)), (True, slice(middle + 1, -1))):
            check_numbers(spectrum, np.array(places[side]), np.array(numbers[side]), is_above=is_above)
        ends = {round(y, 6) for y in bands[label]["y"] if y is not None}
        assert ends == {round(float(y), 6) for row in (0, 2) for y in expected_numbers(spectrum, row)}
    tab.script("document.getElementById('table').open = true")
    tab.until("return document.querySelector('#table td')")
    head = tab.texts("#table th")
    row = tab.script(
        "return [...[...document.querySelectorAll('#table tbody tr')]"
        ".findLast((row) => row.innerText.startsWith(arguments[0])).children].map((cell) => cell.innerText)",
        FIRST,
    )
    assert row[head.index("negative_count")] == f"{low} to {high}"


def check_numbers(spectrum: Spectrum, places: np.ndarray, drawn: np.ndarray, *, is_above: bool) -> None:
    """Compare numbers at thresholds with those of the figure; thresholds have seven digits on the page."""
    thresholds, (_, found, _) = numbers_beyond(spectrum, is_above=is_above)
    assert len(places) > len(spectrum.nodes[0]) / 2
    nearby = [np.searchsorted(thresholds, places + shift * np.abs(places), "right") - 1 for shift in (-2e-6, 2e-6)]
    around = [found.clip(BOTTOM)[index.clip(0)] for index in nearby]
    assert (np.minimum(*around) * (1 - 1e-4) <= drawn).all()
    assert (drawn <= np.maximum(*around) * (1 + 1e-4)).all()


def expected_numbers(spectrum: Spectrum, row: int) -> list[float]:
    """Return the numbers below the thresholds up to zero, and those above the others."""
    below, above = (numbers_beyond(spectrum, is_above=is_above)[1][row] for is_above in (False, True))
    return [float(value) for value in np.concatenate([below, above]).clip(BOTTOM)]


LAYER_MENU = "const menu = document.querySelector('#layers-tools select');"
LAYER_DETAILS = (
    "return document.getElementById('layers').data[0].customdata"
    ".map((row) => row.map(({name, details}) => [name, details]))"
)


def test_layers_of_a_run_that_analyzed_none(tab: Page, runs: tuple[Path, Any]) -> None:
    """The spectrum of the network tells of them; what it does not tell is not offered."""
    history = SpectrumHistory.load(runs[0] / SECOND)
    assert history[-1].layers is None
    tab.show_in_detail(SECOND)
    offered = tab.script(f"{LAYER_MENU} return [menu.value, ...[...menu.options].map((option) => option.value)]")
    assert offered == ["trace_share", "trace", "trace_share", "lambda_max_weight", "lambda_min_weight"]
    drawn = tab.traces("layers")[0]
    for name, row in zip(history[-1].layer_indicators, drawn["z"], strict=True):
        expected = [record.spectrum.by_layer[name].trace_share for record in history]
        assert [value * abs(value) for value in row] == pytest.approx(expected, rel=5e-4)  # the root, with its sign
    shares = [value * abs(value) for row in drawn["z"] for value in row]
    ends = tab.script("const { zmin, zmax } = document.getElementById('layers')._fullData[0]; return [zmin, zmax]")
    assert [end**2 for end in ends] == pytest.approx([max(min(shares), 0), min(max(shares), 1)])
    layer = history[-1].spectrum.by_layer["net.0"]
    name, details = tab.script(LAYER_DETAILS)[0][-1]
    assert name == "net.0"
    assert details.startswith(f"share of the trace = {layer.trace_share:.4g}<br>")
    low, high = re.search(r"λ<sub>max</sub> in \[(.*?), (.*?)\]<br>", details).groups()
    width = layer.lambda_max_bounds[1] - layer.lambda_max_bounds[0]
    assert [float(low), float(high)] == pytest.approx(layer.lambda_max_bounds, abs=0.1 * width)
    assert details.endswith(f"<br>{layer.dimension} parameters")
    tab.point_at("#layers .nsewdrag")
    tab.until("return document.querySelector('#layers .hoverlayer text')")
    assert " parameters" in tab.script("return document.querySelector('#layers .hoverlayer').textContent")
    # A choice holds in every run that has the quantity; where layers have spectra, λ_max is the usual one.
    tab.show_in_detail(FIRST)
    assert tab.script(f"{LAYER_MENU} return menu.value") == "lambda_max"
    tab.script(f"{LAYER_MENU} menu.value = 'lambda_max_weight'; menu.dispatchEvent(new Event('change'))")
    tab.until(f"{LAYER_DETAILS}[0][0][1].startsWith('share of the eigenvector of λ<sub>max</sub> =')")
    tab.show_in_detail(SECOND)
    assert tab.script(f"{LAYER_MENU} return menu.value") == "lambda_max_weight"


def test_exported_code_of_several_runs_draws_one_figure(
    tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: Path(path).touch())
    tab.click("#runs label", EVIL)  # which has no history in its folder
    tab.until(f"{CURVES}.length === 2")
    for figure, made in (("ct", "c_t"), ("extremes", "lambda_max")):
        tab.export(figure)
        names: dict[str, Any] = {}
        exec(compile(tab.script("return document.querySelector('dialog pre').textContent"), figure, "exec"), names)  # noqa: S102
        assert (tmp_path / f"hesd-{figure}-{made}.pdf").is_file()
        assert list(names["history"]) == [FIRST, SECOND]
        assert len([line for line in names["ax"].lines if line.get_label().startswith((FIRST, SECOND))]) == 3
    tab.script("document.querySelector('dialog').close()")


def test_loss_along_the_extreme_eigenvectors(tab: Page, runs: tuple[Path, Any]) -> None:
    history = SpectrumHistory.load(runs[0] / SECOND)
    spectrum = history[-1].spectrum
    tab.show_in_detail(SECOND)
    drawn = tab.traces("along")
    expected = [(key, dash) for key in ("lambda_min", "lambda_max") for dash in ("solid", "dash")]
    assert [(trace["meta"]["along"], trace["dash"]) for trace in drawn] == expected
    dashed = [line for line in plot_losses_along(spectrum).lines if line.get_linestyle() == "--"]
    for index, line in enumerate(dashed):
        distances, losses = spectrum.losses_along[index]
        curve, parabola = drawn[2 * index : 2 * index + 2]
        assert curve["x"] == parabola["x"] == pytest.approx(distances / distances[-1], rel=1e-6, abs=1e-9)
        assert curve["y"] == pytest.approx(losses, rel=1e-6)
        assert parabola["y"] == pytest.approx(line.get_ydata(), rel=1e-4)
    # It follows the chosen state, and says how to get it where it is missing.
    tab.slide(0, history[0].global_step)
    assert tab.traces("along")[0]["y"] == pytest.approx(history[0].spectrum.losses_along[0, 1], rel=1e-6)
    tab.show_in_detail(FIRST)
    assert "pass loss_along_eigenvectors=True to HessianSpectrumCallback" in tab.text("#along")


def test_several_runs_have_tensorboards_colors_and_a_zoom_outlives_one_that_is_switched_off(tab: Page) -> None:
    order = tab.script("return fetch('/data/runs').then((answer) => answer.json())")
    boxes = tab.script("return [...document.querySelectorAll('#runs .run')].map((label) => label.innerText.trim())")
    assert boxes == [run for run in order if run != "damaged"]
    drawn = dict(tab.script(f"{CURVES}.map(({{ meta, line }}) => [JSON.parse(meta.key)[0], line.color])"))
    assert drawn == {run: COLORS[order.index(run)] for run in (FIRST, SECOND, EVIL)}
    span = "const [low, high] = document.getElementById('extremes')._fullLayout.xaxis.range; return high - low"
    whole = tab.script(span)
    tab.script("document.getElementById('extremes').scrollIntoView({ block: 'center' })")  # not below the bar
    left, top, width, height = tab.script(
        "const area = document.querySelector('#extremes .nsewdrag').getBoundingClientRect();"
        "return [area.left, area.top, area.width, area.height]"
    )
    tab.drag((left + 0.3 * width, top + 0.3 * height), (left + 0.6 * width, top + 0.7 * height))
    tab.until(f"{span} < arguments[0] / 2", whole)
    tab.click("#runs label", FIRST)
    tab.until(f"{CURVES}.length === 2")
    assert not any(FIRST in trace["name"] for trace in tab.curves("ct"))
    assert tab.script(span) < whole / 2
    tab.click("figure button", "zoom of “Extreme")
    tab.until(f"{span} > arguments[0] * 0.6", whole)  # the run that is off was the longest


def test_data_can_be_saved(tab: Page, tmp_path: Path) -> None:
    rows = tab.saved(tmp_path, "#tools button", "CSV", "hesd.csv").decode().splitlines()
    assert rows[0].startswith("run,epoch,step,c_t,")
    assert sum(row.startswith(FIRST) for row in rows) == EPOCHS + 1
    found = json.loads(tab.saved(tmp_path, "#tools button", "JSON", "hesd.json"))
    assert {run["run"] for run in found} == {FIRST, SECOND, EVIL}


NOTE_FOCUS = """
window.reached = [];
document.getElementById('table').open = false;
document.querySelector('#runs input').focus();
document.addEventListener('focusin', ({ target }) => window.reached.push(
  [target.tagName, target.type ?? '', getComputedStyle(target).outlineStyle, target.parentNode.id]))
"""


def test_keyboard_and_screen_reader(tab: Page) -> None:
    tab.script(NOTE_FOCUS)
    reached: list[list[str]] = []
    while len(reached) < 120 and "table" not in [parent for *_, parent in reached]:
        tab.press(webdriver.Keys.TAB * 10)
        reached = tab.script("return window.reached")
    assert {"INPUT", "SELECT", "BUTTON", "SUMMARY"} <= {tag for tag, *_ in reached}
    assert ["INPUT", "range", "solid"] in [seen for *seen, _ in reached]
    assert all(outline == "solid" for _, _, outline, _ in reached), reached  # the focus can be seen
    tab.script("document.querySelector('#table summary').focus()")
    tab.press(webdriver.Keys.ENTER)
    tab.until("return document.querySelector('#table td')")
    unnamed = tab.script(
        "return [...document.querySelectorAll('.plot, figure, button:not(.notifier-close)')].filter((e) => !e.hidden &&"
        " !e.getAttribute('aria-label') && !document.getElementById(e.getAttribute('aria-labelledby')))"
        ".map((e) => e.outerHTML)"
    )
    assert unnamed == []
    unlabeled = tab.script(
        "return [...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).map((e) => e.outerHTML)"
    )
    assert unlabeled == []
    label = tab.script("return document.getElementById('ct').getAttribute('aria-label')")
    assert f"{FIRST}: {EPOCHS + 1} values" in label


NOTE_REQUESTS = """
window.asked = [];
const plain = fetch;
window.fetch = (address, ...rest) => {
  window.asked.push(String(address));
  return plain(address, ...rest);
};
"""
"""Script that notes what the page asks its server for, at the moment it does."""

JUDGED = "return window.asked.filter((address) => address.includes('judgment?')).length"
"""How often the tab has asked for a judgment."""


def test_the_rules_are_compared_over_the_selected_runs(
    page: Page, address: str, runs: tuple[Path, Any], tmp_path: Path
) -> None:
    folders = {run: runs[0] / run for run in (FIRST, SECOND)}
    page.driver.set_window_size(1400, 600)
    with page.before_others(NOTE_REQUESTS):
        page.open_tab(address)
    page.until(f"return document.querySelector('{page.JUDGMENT}').getAttribute('aria-busy') === 'true'")
    assert page.script(JUDGED) == 0  # the card has its runs, and is below what can be seen
    assert page.text("#judgment .sentence") == "Comparing …"
    page.show_judgment()
    offered = page.script("return [...document.querySelectorAll('#judgment-tools option')].map(({ value }) => value)")
    assert offered == ["train_acc", "val_acc"]
    both = judge(folders, "val_acc")
    assert both.sentence.startswith("2 runs are too few")
    page.assert_judged(both)
    assert page.text("#judgment details").startswith("Remarks")
    assert not page.script("return document.querySelector('#judgment details').open")
    remarks = page.script("return [...document.querySelectorAll('#judgment li')].map((item) => item.textContent)")
    assert remarks[0] == "Higher val_acc counts as better."
    assert f"Left out, without the metric: {EVIL}." in remarks
    assert set(both.remarks) <= set(remarks)

    # One that fails says why, and is tried again.
    page.script("window.kept = fetch; window.fetch = () => Promise.reject(new Error('no server'))")
    page.judge_by("train_acc")
    assert page.text("#judgment .sentence") == "The rules cannot be compared: no server"
    assert page.script("return document.querySelector('#judgment table')") is None
    page.script("window.fetch = window.kept")
    page.judge_by("train_acc")
    page.until("return document.querySelector('#judgment table')")
    page.assert_judged(judge(folders, "train_acc"))
    page.judge_by("val_acc")
    page.assert_judged(both)
    page.script("window.scrollTo(0, 0)")
    page.show_judgment()
    assert page.script(JUDGED) == 2  # once for each metric

    saved = page.saved(tmp_path, "section button", "Save the comparison", "hesd-rules.csv")
    lines = list(csv.DictReader(saved.decode().splitlines()))
    assert [line["title"] for line in lines] == list(both.titles.values())
    assert [float(line["mean"]) for line in lines] == pytest.approx([row["mean"] for row in both.rows], rel=1e-6)

    page.click("#runs label", SECOND)
    page.script("document.querySelector('#judgment-title').scrollIntoView()")  # a click gives the focus, which scrolls
    page.until("return document.querySelector('#judgment .sentence').textContent.startsWith('One run cannot')")
    page.assert_judged(judge({FIRST: folders[FIRST]}, "val_acc"))
    page.assert_clean(address)


def test_in_tensorboard_itself(page: Page, address: str) -> None:
    """The tab is there, and follows TensorBoard's theme rather than the system's."""
    with urlopen(f"{address}data/plugins_listing") as answer:  # noqa: S310 - our own server
        assert json.load(answer)["hesd"]["enabled"]
    page.open(f"{address}#hesd")
    frame = page.until("return document.querySelector('iframe')")
    page.script("document.body.classList.add('dark-mode')")
    page.driver.switch_to.frame(frame)
    try:
        page.until("return document.body.dataset.drawn > 0")
        page.until("return document.getElementById('ct')._fullLayout.paper_bgcolor === '#2b2c2f'")
        page.script("window.parent.document.body.classList.remove('dark-mode')")
        page.until("return document.getElementById('ct')._fullLayout.paper_bgcolor === '#ffffff'")
        # What is chosen stands in TensorBoard's address, and comes back with it.
        page.show_in_detail(SECOND)
        page.change("#epoch", 0, "input")
        page.until("return window.parent.location.hash.includes('p.hesd.state')")
        assert page.script("return window.parent.location.hash").startswith("#hesd&p.hesd.detail=")
        chosen = page.script("return document.body.dataset.detail")
        page.driver.switch_to.default_content()
        page.driver.refresh()
        page.driver.switch_to.frame(page.until("return document.querySelector('iframe')"))
        page.until("return document.body.dataset.detail === arguments[0]", chosen)
        # TensorBoard's own button reloads the tab, too.
        page.script(NOTE_REQUESTS)
        page.until(
            "if (!window.asked.length) parent.document.querySelector('app-header-reload button').click();"
            "return window.asked.length > 0"
        )
    finally:
        page.driver.switch_to.default_content()


# Runs of all kinds ----------------------------------------------------------------------------------------------------


def faulty() -> SpectrumHistory:
    """A run with two findings, one of which has a hostile message."""
    failed = SpectrumRecord(0, 4, None, error=f"</script>{EVIL}")
    found = history_of(failed, SpectrumRecord(1, 8, make_spectrum(-2.0, loss=0.2)))
    assert [finding.key for finding in found.findings] == ["failed", "mainly_negative"]
    return found


def write_faulty(folder: Path) -> list[Finding]:
    history = faulty()
    write_payloads(folder / "faulty", [record_payload(history[-1], history.findings)])
    return history.findings


def assert_found(page: Page, run: str, found: list[Finding]) -> None:
    lines = [[f"{f.title} ({f.confidence}): {f.evidence}", f"Next: {f.action}"] for f in found]
    items = page.texts("#findings li")
    assert [[hyphens(line) for line in item.splitlines() if line] for item in items] == lines
    assert page.text("#findings summary") == f"{run}: {len(found)} findings"


def test_nothing_logged_yet(page: Page, server: Server, tmp_path: Path) -> None:
    tab = Tab(tmp_path)
    address = server.show(tab)
    hurry = "const plain = setInterval; window.setInterval = (work, time) => plain(work, (window.waits = time) / 100)"
    with page.before_others(hurry):
        page.open(f"{address}data/plugin_entry.html?name=hesd")
        page.until("return document.getElementById('empty') && !document.getElementById('empty').hidden")
    assert "callbacks=[HessianSpectrumCallback()]" in page.text("#empty")
    assert page.script("return document.getElementById('content').hidden")
    # The first records appear by themselves. The findings of a single run are unfolded.
    found = write_faulty(tmp_path)
    tab.reload()
    page.until("return document.getElementById('ct').data?.length > 0")
    assert page.script("return document.getElementById('empty').hidden")
    assert page.script("return window.waits") == 10_000
    assert_found(page, "faulty", found)
    assert page.script("return document.querySelector('#findings details').open")
    page.assert_clean(address)


def test_findings_of_several_runs_and_callbacks_of_one_that_count_once(
    page: Page, server: Server, tmp_path: Path
) -> None:
    metrics = [{"val_acc": 0.5 + 0.1 * epoch} for epoch in range(2)]
    records = [SpectrumRecord(e, e + 1, make_spectrum(-0.3), metrics=found) for e, found in enumerate(metrics)]
    for name in ("hesd", "other"):
        write_payloads(tmp_path / "run", list(map(record_payload, records)), name=name)
    write_payloads(tmp_path / "healthy", [record_payload(SpectrumRecord(0, 4, make_spectrum(-0.3)))])
    found = write_faulty(tmp_path)
    address = server.show(Tab(tmp_path))
    page.open_tab(address)
    healthy = {f"{run}: no findings" for run in ("healthy", "run (hesd)", "run (other)")}
    assert set(filter(None, page.text("#findings").splitlines())) == {"faulty: 2 findings", *healthy}
    assert not page.script("return document.querySelector('#findings details').open")
    page.click("#findings summary")
    assert_found(page, "faulty", found)
    page.click("#runs input[data-key*=faulty]")
    page.until("return !document.getElementById('findings').innerText.includes('faulty')")

    page.show_judgment()
    page.assert_judged(judge({"run": records}, "val_acc"))
    left_out = "Left out, since other callbacks of the same runs are compared: run (other)."
    assert left_out in page.script("return document.querySelector('#judgment ul').textContent")
    for name in ("run (hesd)", "run (other)"):
        page.click("#runs label", name)
    page.script("document.querySelector('#judgment-title').scrollIntoView()")
    page.until("return document.querySelector('#judgment .sentence').textContent.includes('have no metrics')")
    assert 'self.log("val_acc", ...)' in page.text("#judgment .sentence")
    assert "--metrics-csv" in page.text("#judgment .sentence")
    assert page.script("return document.querySelector('#judgment-tools select')") is None
    page.assert_clean(address)


# A report of odd states -----------------------------------------------------------------------------------------------

ODD = f"</script>{EVIL}"


@pytest.fixture
def odd(driver: Any, tmp_path: Path) -> Iterator[Page]:
    """A report of a run with a hostile name: states that are compared with others or are not, a failure, and gaps."""
    states = [
        ReferenceState(n, 0, "perceptron", 2, "late", dict.fromkeys(QUANTITIES, (-n / 20, -n / 20))) for n in range(21)
    ]
    records = []
    for epoch, c_t in enumerate((-0.5, -0.95, -1.5)):
        found = replace(make_spectrum(c_t), architecture=EVIL if epoch == 0 else "perceptron")
        compared = compare_with_reference(found, start_loss=100.0, states=states)
        records.append(record_payload(SpectrumRecord(epoch, epoch, found), compared=compared))
    records.append(record_payload(faulty()[0]) | {"epoch": 3, "global_step": 3})
    nothing = record_payload(SpectrumRecord(8, 8, make_spectrum(-0.3)), faulty().findings)
    nothing["reference"] = compare_with_reference(make_spectrum(-0.3)).to_dict()
    nothing["spectra"]["spectrum"] |= {"cumulative_band": None, "reason": "the products are wrong"}
    path = tmp_path / "report.html"
    path.write_text(report({**run_payload(ODD, "hesd", [*records, nothing], [], []), "color": 0}))
    page = Page(driver)
    page.keep("odd", lambda: page.open_report(path))
    yield page
    page.assert_clean("file:")


def test_cards_say_why_they_are_empty_and_hostile_names_are_shown_as_they_are(odd: Page) -> None:
    odd.slide(4, 8)
    assert odd.text("#cumulative") == "Nothing was computed: the products are wrong."
    assert odd.text("#reference").startswith("No comparison: it takes 10 networks of any kind of 1 to 20 parameters")
    odd.show_judgment()
    assert odd.text("#judgment .sentence").startswith("The records of these runs have no metrics of trained weights.")
    # Without a Krylov basis nothing is known of layers.
    assert odd.text("#layers").startswith('No layers were analyzed: pass layers="auto"')
    assert odd.script("return document.querySelectorAll('#detail-tools select').length") == 1
    odd.slide(3, 3)
    assert odd.text("#reference") == "No comparison: the analysis failed."
    assert odd.text("#density") == odd.text("#cumulative") == odd.text("#along") == "This analysis failed."
    assert odd.script("return document.title") == f"HESD: {ODD}"
    assert_found(odd, ODD, faulty().findings)
    assert f"The analysis failed: {ODD}" in odd.text("#assessment")


def test_the_comparison_with_similar_networks_is_that_of_the_chosen_state(odd: Page) -> None:
    said = {}
    for step in (2, 1, 0):
        odd.slide(step, step)
        said[step] = odd.text("#reference"), odd.text("#reference tr[data-key=c_t]").split("\t")
    assert said[2][1] == ["Ct", "outside what we have seen", "−1.5", "−0.9 to −0.1", "−1 to 0"]
    assert said[1][1][1:3] == ["unusual", "−0.95"]
    assert said[1][0].startswith("Compared with 21 perceptrons of 2 parameters that have less than a tenth")
    assert said[0][0].startswith("No comparison: the table has no networks of this kind")
