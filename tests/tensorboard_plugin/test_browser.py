"""The HESD tab and the report in a browser: what is drawn, said, and asked of the server."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import numpy as np
import pytest

from lightning_hesd import compare_with_reference, judge
from lightning_hesd.commands.report import report, write_report
from lightning_hesd.plotting import plot_losses_along
from lightning_hesd.plotting.cumulative import BOTTOM, numbers_beyond
from lightning_hesd.spectra.decisions import run_payload
from lightning_hesd.spectra.payload import record_payload
from lightning_hesd.spectra.quadrature import legible_sigma
from lightning_hesd.spectra.reference_table import QUANTITIES, ReferenceState
from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
from tests.tab import EPOCHS, Tab, tensorboard, train, write_payloads
from tests.training.scripted import make_spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_hesd import Judgment, Spectrum
    from lightning_hesd.spectra.findings import Finding

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
IS_REQUIRED = os.environ.get("HESD_BROWSER") == "required"
"""As in `.ci/run`: what is missing is an error."""

if IS_REQUIRED:
    from selenium import webdriver
else:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install selenium")

pytestmark = pytest.mark.skipif(
    not (IS_REQUIRED or (BROWSER and DRIVER)),
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver (Debian)",
)

EVIL = "<b><img src=x onerror=window.injected=1>"
COLORS = ("#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6")
"""What TensorBoard gives to runs, in the order of /data/runs."""

JUDGMENT_CARD = "section[aria-labelledby=judgment-title]"
FIRST, SECOND = "net/version_0", "net/version_1"


class Page:
    """A page, and what the tests ask of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # the page before asks its server for more, which may have ended by now
        self.driver.get_log("browser")
        self.driver.get(address)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: str, *arguments: Any) -> Any:
        """Wait until a script returns something true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait  # noqa: PLC0415 - optional

        message = f"never: {condition}"
        return WebDriverWait(self.driver, 30, 0.05).until(
            lambda driver: driver.execute_script(condition, *arguments), message
        )

    def open_tab(self, address: str) -> None:
        self.open(f"{address}data/plugin_entry.html?name=hesd")
        self.until("return document.body.dataset.drawn > 0")

    def choose(self, menu: str, value: str) -> None:
        self.script(
            "const menu = document.querySelector(arguments[0]); menu.value = arguments[1];"
            "menu.dispatchEvent(new Event('change'))",
            menu,
            value,
        )

    def show_in_detail(self, run: str) -> None:
        self.script(
            "const menu = document.querySelector('#detail-tools select');"
            "menu.value = [...menu.options].find((option) => option.text === arguments[0]).value;"
            "menu.dispatchEvent(new Event('change'))",
            run,
        )
        self.until("return document.body.dataset.detail?.includes(arguments[0])", run)

    def traces(self, figure: str) -> list[dict[str, Any]]:
        """What Plotly has drawn, without the entries of the legend."""
        found = self.script(
            "return JSON.stringify(document.getElementById(arguments[0])._fullData"
            ".map(({x, y, z, name, mode, meta, customdata, line}) => "
            "({x, y, z, name, mode, meta, customdata, dash: line?.dash})))",
            figure,
        )
        return [trace for trace in json.loads(found) if trace["x"] != [None]]

    def curves(self, figure: str) -> list[dict[str, Any]]:
        """The curves of runs: what has a key and is no pick."""
        return [t for t in self.traces(figure) if (t["meta"] or {}).get("key") and "pick" not in t["meta"]]

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def click(self, selector: str, word: str) -> None:
        """Click the first of these elements that has this word in its text or title."""
        self.script(
            "[...document.querySelectorAll(arguments[0])]"
            ".find((e) => `${e.innerText} ${e.title}`.includes(arguments[1])).click()",
            selector,
            word,
        )

    def point_at(self, selector: str) -> None:
        found = self.script("return document.querySelector(arguments[0])", selector)
        webdriver.ActionChains(self.driver).scroll_to_element(found).move_to_element(found).perform()

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def assert_clean(self, *hosts: str) -> None:
        """Nothing was complained about, injected, or fetched from elsewhere."""
        said = [e["message"] for e in self.driver.get_log("browser") if "favicon.ico" not in e["message"]]
        assert said == []
        assert self.script("return window.injected ?? null") is None
        asked = self.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [url for url in asked if not url.startswith(("data:", "blob:", *hosts))] == []


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    os.environ["SE_OFFLINE"] = "true"  # look for no other driver on the network
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    """A page for a test that changes what it shows."""
    yield Page(driver)
    driver.get("about:blank")


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
    """The open tab, for tests that look at it: loading takes longer than looking. A run in detail stays chosen."""
    page = Page(driver)
    if address not in driver.current_url:
        page.open_tab(address)
    yield page
    page.assert_clean(address)


def test_the_curves_are_the_records(tab: Page, runs: tuple[Path, Any]) -> None:
    _, callback = runs
    tab.choose("#ct-tools select", "linear")
    tab.until("return document.getElementById('ct')._fullLayout.yaxis.type === 'linear'")
    records = callback.history
    c_t = next(trace for trace in tab.curves("ct") if FIRST in trace["name"])
    assert c_t["x"] == [record.epoch for record in records]
    assert c_t["y"] == pytest.approx([record.spectrum.c_t for record in records], rel=1e-6)
    band = next(trace for trace in tab.traces("ct") if FIRST in (trace["meta"] or {}).get("band", ""))
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


def test_hostile_names_are_shown_as_they_are(tab: Page) -> None:
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


def test_what_cannot_be_read_is_said(tab: Page) -> None:
    assert tab.text("#problems") == (
        "newer, step 0: the payload has version 2, and this lightning_hesd reads version 1: update it."
    )
    assert tab.script("return document.querySelector('#problems p').getAttribute('role')") == "alert"


def test_the_pick_and_why(tab: Page, runs: tuple[Path, Any]) -> None:
    best = runs[1].checkpoint.best
    tab.show_in_detail(FIRST)
    said = tab.text("[data-rule=highest_c_t]")
    assert f"highest C_t takes epoch {best.epoch} (step {best.global_step})" in said
    assert "have a train_acc within 0.2 of the best" in said
    assert best.path in said
    assert "no checkpoint was kept by this rule" in tab.text("[data-rule=lowest_max_eigenvalue]")
    stars = [
        t for t in tab.traces("ct") if (t["meta"] or {}).get("pick") == "highest_c_t" and FIRST in t["meta"]["key"]
    ]
    assert [star["x"] for star in stars] == [[best.epoch]]


def test_the_slider_moves_density_and_assessment_by_keyboard(tab: Page, runs: tuple[Path, Any]) -> None:
    _, callback = runs
    tab.show_in_detail(FIRST)
    tab.click("#density-choices button", "linear")
    tab.script("document.getElementById('epoch').focus()")
    keys = webdriver.Keys
    for key, position in ((None, -1), (keys.ARROW_LEFT, -2), (keys.HOME, 0), (keys.END, -1)):
        record = callback.history[position]
        if key is not None:
            tab.press(key)
        tab.until("return document.body.dataset.detail.endsWith(arguments[0])", f" {record.global_step}")
        nodes = [t for t in tab.traces("density") if "nodes" in (t["meta"] or {})]
        assert [t["meta"]["nodes"] for t in nodes] == ["training", "generalization"]
        for trace, spectrum in zip(nodes, (record.spectrum, record.generalization), strict=True):
            assert trace["x"] == pytest.approx(spectrum.nodes[0], rel=1e-6)
        (curve,) = [t for t in tab.traces("density") if (t["meta"] or {}).get("density") == "training"]
        assert mass(curve["x"], curve["y"]) == pytest.approx(1.0, abs=0.02)
        drawn = np.array(curve["y"])
        sigma = legible_sigma(record.spectrum.lambda_min, record.spectrum.lambda_max)
        _, expected = record.spectrum.density(curve["x"], sigma)
        visible = drawn > 1.01 * drawn.min()
        assert visible.sum() > 50
        np.testing.assert_allclose(drawn[visible], expected[visible], rtol=1e-3)
        title = "start" if record.epoch < 0 else f"epoch {record.epoch}"
        assert tab.script("return document.getElementById('epoch').getAttribute('aria-valuetext')") == title
        said = tab.text("#assessment")
        assert said.startswith(f"{title}: the paper's criteria {CRITERIA[record.assessment.verdict]} (Gabdullin 2025")
        assert all(reason in hyphens(said) for reason in record.assessment.reasons)
        line = tab.script("return document.getElementById('map').layout.shapes.find((s) => s.name === 'chosen').x0")
        assert line == record.epoch


def mass(x: list[float], y: list[float]) -> float:
    pairs = list(zip(x, y, strict=True))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(pairs))


def test_heat_maps(tab: Page, runs: tuple[Path, Any]) -> None:
    _, callback = runs
    tab.show_in_detail(FIRST)
    density = tab.traces("map")[0]
    assert density["x"] == [record.epoch for record in callback.history]
    for column in range(len(callback.history)):
        logs = [row[column] for row in density["z"] if row[column] is not None]
        assert sum(10**value for value in logs) == pytest.approx(1.0, abs=1e-6)
        spectrum = callback.history[column].spectrum
        cells = zip(density["y"], density["z"], strict=True)
        negative = sum(10 ** row[column] for y, row in cells if y < 0 and row[column] is not None)
        assert negative == pytest.approx(spectrum.distribution.cumulative([0.0])[0], abs=0.1)
    layers = tab.traces("layers")[0]
    names = list(callback.history[0].layers)
    for name, row in zip(names, layers["z"], strict=True):
        expected = [record.layers[name].lambda_max for record in callback.history]
        assert [value**2 for value in row] == pytest.approx(expected, rel=5e-4)  # four digits
    assert tab.script("return [...document.querySelectorAll('#layers .ytick text')].map((t) => t.textContent)") == [
        "0",
        "2",
    ]
    assert names == ["net.0", "net.2"]


def test_numbers_of_eigenvalues(tab: Page, runs: tuple[Path, Any]) -> None:
    _, callback = runs
    record = callback.history[-1]
    low, high = record.spectrum.negative_count
    assert low < high
    tab.show_in_detail(FIRST)
    assert f"{low} to {high} of {record.spectrum.dimension} eigenvalues are negative" in tab.text("#assessment")
    curves = {t["meta"]["numbers"]: t for t in tab.traces("cumulative") if "numbers" in (t["meta"] or {})}
    assert curves["training"]["name"] == f"training: {low} to {high} negative"
    bands = {t["meta"]["band"]: t for t in tab.traces("cumulative") if "band" in (t["meta"] or {})}
    for label, spectrum in (("training", record.spectrum), ("generalization", record.generalization)):
        places, numbers = curves[label]["customdata"], curves[label]["y"]
        middle = numbers.index(None)
        for is_above, side in ((False, slice(0, middle)), (True, slice(middle + 1, -1))):
            check_numbers(spectrum, np.array(places[side]), np.array(numbers[side]), is_above=is_above)
        ends = {round(y, 6) for y in shown(bands[label]["y"])}
        expected = {round(float(y), 6) for row in (0, 2) for y in expected_numbers(spectrum, row)}
        assert ends == expected
    tab.script("document.getElementById('table').open = true")
    tab.until("return document.querySelector('#table td')")
    head = tab.script("return [...document.querySelectorAll('#table th')].map((cell) => cell.innerText)")
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


def shown(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def expected_numbers(spectrum: Spectrum, row: int) -> list[float]:
    """Return the numbers below the thresholds up to zero, and those above the others."""
    below, above = (numbers_beyond(spectrum, is_above=is_above)[1][row] for is_above in (False, True))
    return [float(value) for value in np.concatenate([below, above]).clip(BOTTOM)]


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

ROWS = """
return [...document.querySelectorAll('#judgment tr')]
  .map((row) => [...row.children].map((cell) => cell.textContent))
"""


def choose_metric(page: Page, metric: str) -> None:
    page.choose("#judgment-tools select", metric)


def scroll_to_judgment(page: Page) -> None:
    page.script("document.querySelector('#judgment-title').scrollIntoView()")


def wait_for_judgment(page: Page) -> None:
    page.until(f"return document.querySelector('{JUDGMENT_CARD}').getAttribute('aria-busy') === 'false'")


def show_judgment(page: Page) -> None:
    scroll_to_judgment(page)
    wait_for_judgment(page)


def hyphens(text: str) -> str:
    """Return a text of the page with the minus signs of Python."""
    return text.replace("−", "-")


def assert_judged(page: Page, expected: Judgment) -> None:
    """Check that the card shows a judgment."""
    assert hyphens(page.text("#judgment .sentence")) == expected.sentence
    shown = expected.to_dict()["summary"]
    assert page.text("#judgment caption") == shown["title"]
    assert [list(map(hyphens, row)) for row in page.script(ROWS)] == [shown["header"], *filter(None, shown["rows"])]
    assert page.script("return document.querySelectorAll('#judgment tbody').length") == 2


def test_the_rules_are_compared_over_the_selected_runs(
    page: Page, address: str, runs: tuple[Path, Any], tmp_path: Path
) -> None:
    folders = {run: runs[0] / run for run in (FIRST, SECOND)}
    noted = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_REQUESTS})
    page.driver.set_window_size(1400, 600)
    try:
        page.open_tab(address)
        page.until(f"return document.querySelector('{JUDGMENT_CARD}').getAttribute('aria-busy') === 'true'")
        assert page.script(JUDGED) == 0  # the card has its runs, and is below what can be seen
        assert page.text("#judgment .sentence") == "Comparing …"
        show_judgment(page)
        offered = page.script(
            "return [...document.querySelectorAll('#judgment-tools option')].map((option) => option.value)"
        )
        assert offered == ["train_acc", "val_acc"]
        both = judge(folders, "val_acc")
        assert both.sentence.startswith("2 runs are too few")
        assert_judged(page, both)
        assert page.text("#judgment details").startswith("Remarks")
        assert not page.script("return document.querySelector('#judgment details').open")
        remarks = page.script("return [...document.querySelectorAll('#judgment li')].map((item) => item.textContent)")
        assert remarks[0] == "Higher val_acc counts as better."
        assert f"Left out, without the metric: {EVIL}." in remarks
        assert set(both.remarks) <= set(remarks)

        choose_metric(page, "train_acc")
        wait_for_judgment(page)
        assert_judged(page, judge(folders, "train_acc"))
        choose_metric(page, "val_acc")
        assert_judged(page, both)
        page.script("window.scrollTo(0, 0)")
        show_judgment(page)
        assert page.script(JUDGED) == 2  # once for each metric

        page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        page.click("section button", "Save the comparison")
        saved = tmp_path / "hesd-rules.csv"
        for _ in range(200):
            if saved.is_file():
                break
            time.sleep(0.05)
        lines = list(csv.DictReader(saved.read_text().splitlines()))
        assert [line["title"] for line in lines] == list(both.titles.values())
        assert [float(line["mean"]) for line in lines] == pytest.approx([row["mean"] for row in both.rows], rel=1e-6)

        page.click("#runs label", SECOND)
        scroll_to_judgment(page)  # a click gives the focus, which scrolls
        page.until("return document.querySelector('#judgment .sentence').textContent.startsWith('One run cannot')")
        one = judge({FIRST: folders[FIRST]}, "val_acc")
        assert_judged(page, one)
        page.assert_clean(address)
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", noted)
        page.driver.set_window_size(1400, 1000)


def test_a_comparison_that_fails_says_why_and_is_tried_again(page: Page, address: str) -> None:
    page.open_tab(address)
    show_judgment(page)
    page.script("window.kept = fetch; window.fetch = () => Promise.reject(new Error('no server'))")
    choose_metric(page, "train_acc")
    wait_for_judgment(page)
    assert page.text("#judgment .sentence") == "The rules cannot be compared: no server"
    assert page.script("return document.querySelector('#judgment table')") is None
    page.script("window.fetch = window.kept")
    choose_metric(page, "train_acc")
    page.until("return document.querySelector('#judgment table')")
    assert page.text("#judgment caption").startswith("train_acc")


def test_several_callbacks_of_a_run_count_once_and_runs_without_metrics_say_what_to_do(
    page: Page, tmp_path: Path
) -> None:
    metrics = [{"val_acc": 0.5 + 0.1 * epoch} for epoch in range(2)]
    records = [SpectrumRecord(e, e + 1, make_spectrum(-0.3), metrics=found) for e, found in enumerate(metrics)]
    for name in ("hesd", "other"):
        write_payloads(tmp_path / "run", list(map(record_payload, records)), name=name)
    write_payloads(tmp_path / "second", [record_payload(SpectrumRecord(0, 4, make_spectrum(-0.3)))])
    with Tab(tmp_path).served() as address:
        page.open_tab(address)
        show_judgment(page)
        assert_judged(page, judge({"run": records}, "val_acc"))
        left_out = "Left out, since other callbacks of the same runs are compared: run (other)."
        assert left_out in page.script("return document.querySelector('#judgment ul').textContent")
        for name in ("run (hesd)", "run (other)"):
            page.click("#runs label", name)
        scroll_to_judgment(page)
        page.until("return document.querySelector('#judgment .sentence').textContent.includes('have no metrics')")
        assert 'self.log("val_acc", ...)' in page.text("#judgment .sentence")
        assert "--metrics-csv" in page.text("#judgment .sentence")
        assert page.script("return document.querySelector('#judgment-tools select')") is None
        page.assert_clean(address)


def test_dark_and_light(tab: Page) -> None:
    look = "return [document.documentElement.dataset.theme, document.getElementById('ct')._fullLayout.paper_bgcolor]"
    assert tab.script(look) == ["light", "#ffffff"]
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    tab.until("return document.getElementById('ct')._fullLayout.paper_bgcolor === '#2b2c2f'")
    assert tab.script(look)[0] == "dark"
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_data_can_be_saved(tab: Page, tmp_path: Path) -> None:
    tab.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    for kind in ("CSV", "JSON"):
        tab.click("#tools button", kind)
    for _ in range(200):
        if {"hesd.csv", "hesd.json"} <= {path.name for path in tmp_path.iterdir()}:
            break
        time.sleep(0.05)
    rows = (tmp_path / "hesd.csv").read_text().splitlines()
    assert rows[0].startswith("run,epoch,step,c_t,")
    assert sum(row.startswith(FIRST) for row in rows) == EPOCHS + 1
    assert {run["run"] for run in json.loads((tmp_path / "hesd.json").read_text())} == {FIRST, SECOND, EVIL}


def test_several_runs_have_tensorboards_colors_and_a_zoom_outlives_one_that_is_switched_off(
    page: Page, address: str
) -> None:
    page.open_tab(address)
    order = page.script("return fetch('/data/runs').then((answer) => answer.json())")
    boxes = page.script("return [...document.querySelectorAll('#runs .run')].map((label) => label.innerText.trim())")
    assert boxes == [run for run in order if run != "damaged"]
    drawn = dict(
        page.script(
            "return document.getElementById('ct')._fullData.filter((t) => t.meta?.key && !t.meta.pick)"
            ".map((t) => [JSON.parse(t.meta.key)[0], t.line.color])"
        )
    )
    assert drawn == {run: COLORS[order.index(run)] for run in (FIRST, SECOND, EVIL)}
    span = "const [low, high] = document.getElementById('extremes')._fullLayout.xaxis.range; return high - low"
    whole = page.script(span)
    page.script("document.getElementById('extremes').scrollIntoView({ block: 'center' })")  # not below the bar
    left, top, width, height = page.script(
        "const area = document.querySelector('#extremes .nsewdrag').getBoundingClientRect();"
        "return [area.left, area.top, area.width, area.height]"
    )
    for kind, x, y in (("Pressed", 0.3, 0.3), ("Moved", 0.6, 0.7), ("Released", 0.6, 0.7)):
        place = {"x": left + x * width, "y": top + y * height}
        event = {"type": f"mouse{kind}", **place, "button": "left", "buttons": 1, "clickCount": 1}
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    page.until(f"{span} < arguments[0] / 2", whole)
    page.click("#runs label", FIRST)
    page.until("return document.getElementById('ct')._fullData.filter((t) => t.meta?.key && !t.meta.pick).length === 2")
    assert not any(FIRST in trace["name"] for trace in page.curves("ct"))
    assert page.script(span) < whole / 2
    page.click("figure button", "zoom of “Extreme")
    page.until(f"{span} > arguments[0] * 0.6", whole)  # the run that is off was the longest
    page.assert_clean(address)


CRITERIA = {"good": "hold", "poor": "fail", "undecided": "are undecided", "not applicable": "do not apply"}
LAYER_MENU = "const menu = document.querySelector('#layers-tools select');"
LAYER_DETAILS = (
    "return document.getElementById('layers').data[0].customdata"
    ".map((row) => row.map(({name, details}) => [name, details]))"
)


def test_layers_of_a_run_that_analyzed_none(page: Page, address: str, runs: tuple[Path, Any]) -> None:
    """The spectrum of the network tells of them; what it does not tell is not offered."""
    history = SpectrumHistory.load(runs[0] / SECOND)
    assert history[-1].layers is None
    page.open_tab(address)
    page.show_in_detail(SECOND)
    offered = page.script(f"{LAYER_MENU} return [menu.value, ...[...menu.options].map((option) => option.value)]")
    assert offered == ["trace_share", "trace", "trace_share", "lambda_max_weight", "lambda_min_weight"]
    drawn = page.traces("layers")[0]
    for name, row in zip(history[-1].layer_indicators, drawn["z"], strict=True):
        expected = [record.spectrum.by_layer[name].trace_share for record in history]
        assert [value * abs(value) for value in row] == pytest.approx(expected, rel=5e-4)  # the root, with its sign
    shares = [value * abs(value) for row in drawn["z"] for value in row]
    ends = page.script("const { zmin, zmax } = document.getElementById('layers')._fullData[0]; return [zmin, zmax]")
    assert [end**2 for end in ends] == pytest.approx([max(min(shares), 0), min(max(shares), 1)])
    layer = history[-1].spectrum.by_layer["net.0"]
    name, details = page.script(LAYER_DETAILS)[0][-1]
    assert name == "net.0"
    assert details.startswith(f"share of the trace = {layer.trace_share:.4g}<br>")
    low, high = re.search(r"λ<sub>max</sub> in \[(.*?), (.*?)\]<br>", details).groups()
    width = layer.lambda_max_bounds[1] - layer.lambda_max_bounds[0]
    assert [float(low), float(high)] == pytest.approx(layer.lambda_max_bounds, abs=0.1 * width)
    assert details.endswith(f"<br>{layer.dimension} parameters")
    page.point_at("#layers .nsewdrag")
    page.until("return document.querySelector('#layers .hoverlayer text')")
    assert " parameters" in page.script("return document.querySelector('#layers .hoverlayer').textContent")
    # A choice holds in every run that has the quantity; where layers have spectra, λ_max is the usual one.
    page.show_in_detail(FIRST)
    assert page.script(f"{LAYER_MENU} return menu.value") == "lambda_max"
    page.script(f"{LAYER_MENU} menu.value = 'lambda_max_weight'; menu.dispatchEvent(new Event('change'))")
    page.until(f"{LAYER_DETAILS}[0][0][1].startsWith('share of the eigenvector of λ<sub>max</sub> =')")
    page.show_in_detail(SECOND)
    assert page.script(f"{LAYER_MENU} return menu.value") == "lambda_max_weight"
    page.assert_clean(address)


def test_loss_along_the_extreme_eigenvectors(page: Page, address: str, runs: tuple[Path, Any]) -> None:
    history = SpectrumHistory.load(runs[0] / SECOND)
    spectrum = history[-1].spectrum
    page.open_tab(address)
    page.show_in_detail(SECOND)
    drawn = page.traces("along")
    assert [(trace["meta"]["along"], trace["dash"]) for trace in drawn] == [
        (key, dash) for key in ("lambda_min", "lambda_max") for dash in ("solid", "dash")
    ]
    dashed = [line for line in plot_losses_along(spectrum).lines if line.get_linestyle() == "--"]
    for index, line in enumerate(dashed):
        distances, losses = spectrum.losses_along[index]
        curve, parabola = drawn[2 * index : 2 * index + 2]
        assert curve["x"] == parabola["x"] == pytest.approx(distances / distances[-1], rel=1e-6, abs=1e-9)
        assert curve["y"] == pytest.approx(losses, rel=1e-6)
        assert parabola["y"] == pytest.approx(line.get_ydata(), rel=1e-4)
    # It follows the chosen state, and says how to get it where it is missing.
    page.script("const s = document.getElementById('epoch'); s.value = 0; s.dispatchEvent(new Event('input'))")
    page.until(f"return document.body.dataset.detail.endsWith(' {history[0].global_step}')")
    assert page.traces("along")[0]["y"] == pytest.approx(history[0].spectrum.losses_along[0, 1], rel=1e-6)
    page.show_in_detail(FIRST)
    assert "pass loss_along_eigenvectors=True to HessianSpectrumCallback" in page.text("#along")
    page.assert_clean(address)


def test_keyboard_and_screen_reader(page: Page, address: str) -> None:
    page.open_tab(address)
    reached = []
    for _ in range(120):
        page.press(webdriver.Keys.TAB)
        reached.append(
            page.script(
                "const e = document.activeElement; return [e.tagName, e.type ?? '', getComputedStyle(e).outlineStyle]"
            )
        )
        if page.script("return document.activeElement.parentNode.id") == "table":
            break
    assert {"INPUT", "SELECT", "BUTTON", "SUMMARY"} <= {tag for tag, _, _ in reached}
    assert ["INPUT", "range", "solid"] in reached
    assert all(outline == "solid" for _, _, outline in reached), reached  # the focus can be seen
    page.press(webdriver.Keys.ENTER)
    page.until("return document.querySelector('#table td')")
    unnamed = page.script(
        "return [...document.querySelectorAll('.plot, figure, button')].filter((e) => !e.hidden &&"
        " !e.getAttribute('aria-label') && !document.getElementById(e.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0
    unlabeled = page.script(
        "return [...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).length"
    )
    assert unlabeled == 0
    label = page.script("return document.getElementById('ct').getAttribute('aria-label')")
    assert f"{FIRST}: {EPOCHS + 1} values" in label


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
        page.script("const s = document.getElementById('epoch'); s.value = 0; s.dispatchEvent(new Event('input'))")
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


def test_nothing_logged_yet(page: Page, tmp_path: Path) -> None:
    tab = Tab(tmp_path)
    hurry = "const plain = setInterval; window.setInterval = (work, time) => plain(work, (window.waits = time) / 100)"
    hurried = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hurry})
    with tab.served() as address:
        page.open(f"{address}data/plugin_entry.html?name=hesd")
        page.until("return document.getElementById('empty') && !document.getElementById('empty').hidden")
        assert "callbacks=[HessianSpectrumCallback()]" in page.text("#empty")
        assert page.script("return document.getElementById('content').hidden")
        # The first records appear by themselves.
        write_payloads(tmp_path / "run", [record_payload(SpectrumRecord(0, 4, make_spectrum(-0.3)))])
        tab.reload()
        page.until("return document.getElementById('ct').data?.length > 0")
        assert page.script("return document.getElementById('empty').hidden")
        assert page.script("return window.waits") == 10_000
        page.assert_clean(address)
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", hurried)


def test_the_report(page: Page, runs: tuple[Path, Any], tmp_path: Path) -> None:
    folder, callback = runs
    out = tmp_path / "report.html"
    write_report(folder / "net" / "version_0", out)
    page.open(out.as_uri())
    page.until("return document.getElementById('hesd').dataset.drawn > 0")
    c_t = page.curves("ct")[0]
    assert c_t["x"] == [record.epoch for record in callback.history]
    best = callback.checkpoint.best
    assert f"takes epoch {best.epoch} " in page.text("[data-rule=highest_c_t]")
    assert best.path in page.text("[data-rule=highest_c_t]")
    page.script("window.dispatchEvent(new Event('beforeprint')); window.dispatchEvent(new Event('afterprint'))")
    wait_for_judgment(page)  # which is printed before it has been in view
    expected = judge({FIRST: folder / FIRST}, "val_acc")
    assert_judged(page, expected)
    choose_metric(page, "train_acc")
    wait_for_judgment(page)
    assert_judged(page, judge({FIRST: folder / FIRST}, "train_acc"))
    page.script("const s = document.getElementById('epoch'); s.value = 0; s.dispatchEvent(new Event('input'))")
    page.until("return document.getElementById('hesd').dataset.detail.endsWith(' 0')")
    page.assert_clean(out.as_uri())


def test_cards_say_why_they_are_empty(page: Page, tmp_path: Path) -> None:
    earlier, nothing = (record_payload(SpectrumRecord(epoch, epoch, make_spectrum(-0.3))) for epoch in (4, 8))
    nothing["reference"] = compare_with_reference(make_spectrum(-0.3)).to_dict()
    del earlier["spectra"]["spectrum"]["cumulative_band"]
    nothing["spectra"]["spectrum"] |= {"cumulative_band": None, "reason": "the products are wrong"}
    path = tmp_path / "report.html"
    path.write_text(report({**run_payload("run", "hesd", [earlier, nothing], [], []), "color": 0}))
    page.open(path.as_uri())
    page.until("return document.getElementById('hesd').dataset.detail?.endsWith(' 8')")
    assert page.text("#cumulative") == "Nothing was computed: the products are wrong."
    assert page.text("#reference").startswith("No comparison: it takes 10 networks of any kind of 1 to 20 parameters")
    show_judgment(page)
    assert page.text("#judgment .sentence").startswith("The records of these runs have no metrics of trained weights.")
    # Without a Krylov basis nothing is known of layers.
    assert page.text("#layers").startswith('No layers were analyzed: pass layers="auto"')
    assert page.script("return document.querySelectorAll('#detail-tools select').length") == 1
    page.script("const s = document.getElementById('epoch'); s.value = 0; s.dispatchEvent(new Event('input'))")
    page.until("return document.getElementById('hesd').dataset.detail.endsWith(' 4')")
    assert page.text("#cumulative") == "An earlier release wrote this record, without numbers of eigenvalues."
    assert page.text("#reference") == "No comparison: an earlier release wrote this record."
    page.assert_clean(path.as_uri())


def test_the_comparison_with_similar_networks_is_that_of_the_chosen_state(page: Page, tmp_path: Path) -> None:
    states = [
        ReferenceState(n, 0, "perceptron", 2, "late", dict.fromkeys(QUANTITIES, (-n / 20, -n / 20))) for n in range(21)
    ]
    records = []
    for epoch, c_t in enumerate((-0.5, -0.95, -1.5)):
        found = replace(make_spectrum(c_t), architecture=EVIL if epoch == 0 else "perceptron")
        compared = compare_with_reference(found, start_loss=100.0, states=states)
        records.append(record_payload(SpectrumRecord(epoch, epoch, found), compared=compared))
    failed = record_payload(SpectrumRecord(3, 3, None, "OSError: gone"))
    path = tmp_path / "report.html"
    path.write_text(report({**run_payload("run", "hesd", [*records, failed], [], []), "color": 0}))
    page.open(path.as_uri())
    said = {}
    for step in (3, 2, 1, 0):
        page.script(
            "const s = document.getElementById('epoch'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            step,
        )
        page.until("return document.getElementById('hesd').dataset.detail?.endsWith(arguments[0])", f" {step}")
        said[step] = page.text("#reference"), page.text("#reference tr[data-key=c_t]").split("\t")
    assert said[3][0] == "No comparison: the analysis failed."
    assert said[2][1] == ["Ct", "outside what we have seen", "−1.5", "−0.9 to −0.1", "−1 to 0"]
    assert said[1][1][1:3] == ["unusual", "−0.95"]
    assert said[1][0].startswith("Compared with 21 perceptrons of 2 parameters that have less than a tenth")
    assert said[0][0].startswith("No comparison: the table has no networks of this kind")
    page.assert_clean(path.as_uri())


def test_findings_in_the_tab_and_the_report(page: Page, tmp_path: Path) -> None:
    """Those of each selected run, as its last record has them; text only, whatever names and messages contain."""
    healthy, faulty = SpectrumHistory(), SpectrumHistory()
    healthy.append(SpectrumRecord(0, 4, make_spectrum(-0.3)))
    negative = make_spectrum(-2.0, loss=0.2)
    faulty.extend([SpectrumRecord(0, 4, None, error=EVIL), SpectrumRecord(1, 8, negative)])
    [failed, mainly_negative] = faulty.findings
    assert (failed.key, mainly_negative.key) == ("failed", "mainly_negative")
    log = tmp_path / "runs"
    write_payloads(log / "faulty", [record_payload(faulty[-1], faulty.findings)])
    with Tab(log).served() as address:
        page.open_tab(address)
        assert_found(page, "faulty", faulty.findings)
        assert page.script("return document.querySelector('#findings details').open")
        page.assert_clean(address)
    write_payloads(log / "healthy", [record_payload(healthy[-1], healthy.findings)])
    old = {key: value for key, value in record_payload(healthy[-1]).items() if key != "findings"}
    write_payloads(log / "old", [old])
    with Tab(log).served() as address:
        page.open_tab(address)
        assert [line for line in page.text("#findings").splitlines() if line] == [
            "faulty: 2 findings",
            "healthy: no findings",
            "old: no findings",
        ]
        assert not page.script("return document.querySelector('#findings details').open")
        page.script("document.querySelector('#findings summary').click()")
        assert_found(page, "faulty", faulty.findings)
        page.click("#runs input[data-key*=faulty]", "")
        page.until("return !document.getElementById('findings').innerText.includes('faulty')")
        page.assert_clean(address)

    faulty.save(tmp_path / "faulty" / "hesd")
    write_report(tmp_path / "faulty", tmp_path / "report.html")
    page.open((tmp_path / "report.html").as_uri())
    page.until("return document.getElementById('hesd').dataset.drawn > 0")
    assert_found(page, "faulty", faulty.findings)
    page.assert_clean((tmp_path / "report.html").as_uri())


def assert_found(page: Page, run: str, found: list[Finding]) -> None:
    items = page.script("return [...document.querySelectorAll('#findings li')].map((item) => item.innerText)")
    lines = [[f"{f.title} ({f.confidence}): {f.evidence}", f"Next: {f.action}"] for f in found]
    assert [[hyphens(line) for line in item.splitlines() if line] for item in items] == lines
    assert page.text("#findings summary") == f"{run}: {len(found)} findings"


def test_a_report_of_hostile_names_and_a_failed_analysis(page: Page, tmp_path: Path) -> None:
    history = SpectrumHistory()
    history.append(SpectrumRecord(0, 4, make_spectrum(-0.3), layers={f"</script>{EVIL}": make_spectrum(-0.2)}))
    history.append(SpectrumRecord(1, 8, None, error=EVIL))
    history.save(tmp_path / EVIL / "hesd")
    write_report(tmp_path / EVIL, tmp_path / "report.html")
    page.open((tmp_path / "report.html").as_uri())
    page.until("return document.getElementById('hesd').dataset.drawn > 0")
    assert f"The analysis failed: {EVIL}" in page.text("#assessment")
    assert page.script("return document.title") == f"HESD: {EVIL}"
    assert page.text("#density") == page.text("#cumulative") == page.text("#along") == "This analysis failed."
    page.assert_clean((tmp_path / "report.html").as_uri())
