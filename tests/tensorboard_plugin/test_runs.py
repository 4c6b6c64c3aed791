"""The HESD tab's charts of many runs: list, groups, the chosen state, the address and the layout.

One server and one page for all tests; each starts from the address without choices.
"""

from collections.abc import Iterator
from itertools import groupby, product
from typing import Any

import numpy as np
import pytest

from lightning_hesd.spectra.payload import record_payload
from lightning_hesd.training.history import SpectrumRecord
from tests.browser import CLICK, Page, hyphens, needs_browser, webdriver
from tests.tab import Server, Tab, write_payloads
from tests.training.scripted import make_spectrum

pytestmark = needs_browser

RATES, SEEDS, EPOCHS = (0.1, 0.2, 0.3, 0.4), (0, 1, 2), (-1, 0, 1, 2)
LIGHT_FIRST, DARK_FIRST = "rgb(66, 80, 102)", "rgb(142, 152, 163)"
ROWS = "return [...document.querySelectorAll('#runs .run')].map((row) => row.innerText.trim())"
SWATCHES = """[...document.querySelectorAll('#runs .run:has(input:checked)')].map((row) => [
  row.innerText.trim(), getComputedStyle(row.querySelector('line')).stroke, row.querySelector('path').getAttribute('d')
])"""
LINES = """['ct', 'extremes', 'loss', 'map'].map((id) =>
  document.getElementById(id).layout.shapes.find((shape) => shape.name === 'chosen').x0)"""
CURVES = "document.getElementById('ct')._fullData.filter((trace) => trace.meta?.key && !trace.meta.pick)"
CARDS = """
return [...document.querySelectorAll('.grid')].map((grid) => {
  const { left, right } = grid.getBoundingClientRect();
  return [left, right, [...grid.children].filter((card) => card.offsetHeight).map((card) => {
    const place = card.getBoundingClientRect();
    return [place.top + scrollY, place.left, place.right, place.height, Boolean(card.querySelector('.absent'))];
  })];
})
"""


def c_t(rate: float, seed: int, epoch: int) -> float:
    return -0.5 * rate / (epoch + 2) * (1 + 0.2 * seed)


def payload(rate: float, seed: int, epoch: int) -> dict[str, Any]:
    spectrum = make_spectrum(c_t(rate, seed, epoch), lambda_max=10 * rate, loss=1 / (epoch + 2))
    return record_payload(SpectrumRecord(epoch, 4 * (epoch + 1), spectrum))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    folder = tmp_path_factory.mktemp("sweep")
    for rate, seed in product(RATES, SEEDS):
        payloads = [payload(rate, seed, epoch) for epoch in EPOCHS]
        write_payloads(folder / f"lr={rate}" / f"seed={seed}", payloads)
    return Tab(folder)


@pytest.fixture
def page(page: Page, server: Server, sweep: Tab) -> Iterator[Page]:
    """The page as a link without choices opens it."""
    address = server.show(sweep)
    page.open_tab(address)
    yield page
    page.assert_clean(address)


def enter(page: Page, field: str, text: str) -> None:
    """Type a pattern, and wait until the charts follow."""
    page.script("window.before = document.body.dataset.drawn")
    page.change(f"#{field}", text, "input")
    is_wrong = "!document.querySelector('#runs > .problem').hidden"
    page.until(f"return document.body.dataset.drawn > window.before || {is_wrong}")


def chosen_curves(page: Page, count: int) -> list[dict[str, Any]]:
    """Wait for a number of curves of C_t, and return them."""
    page.until(f"return {CURVES}.length === arguments[0]", count)
    return page.curves("ct")


def select_all(page: Page) -> list[dict[str, Any]]:
    """Select all runs, wait until all is drawn, and return the curves of C_t."""
    before = page.script("return document.body.dataset.drawn")
    page.click("#runs button", "All")
    page.until("return Number(document.body.dataset.drawn) > Number(arguments[0])", before)
    return chosen_curves(page, 12)


def test_the_list_of_runs_selects_filters_and_is_the_legend(page: Page) -> None:
    names = page.script(ROWS)
    assert len(names) == 12
    assert page.text("#run-count") == "10 of 12"
    drawn = select_all(page)
    assert page.text("#run-count") == "12 of 12"
    assert [curve["name"] for curve in drawn] == names
    # Twelve runs are told apart by color or mark, and the list shows the same as the charts.
    shown = page.script(f"return {SWATCHES}")
    assert [name for name, *_ in shown] == names
    assert len({(color, mark) for _, color, mark in shown}) == 12
    colors = page.script(f"return {CURVES}.map((trace) => trace.line.color)")
    in_list = [color for _, color, _ in shown]
    assert [f"rgb({', '.join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5))})" for c in colors] == in_list
    assert page.script("return document.querySelectorAll('#content .legend').length") == 0
    assert page.text("#extremes-keys").split("\n")[:2] == ["λmax", "−λmin"]

    enter(page, "run-filter", r"lr=0\.[12]/.*[01]$")
    chosen_curves(page, 4)
    assert page.script(ROWS) == [name for name in names if name[:6] in {"lr=0.1", "lr=0.2"} and name[-1] in "01"]
    assert page.text("#run-count") == "4 of 12"
    enter(page, "run-filter", "(")
    assert page.text("#runs > .problem").startswith("“(” is no regular expression: ")
    enter(page, "run-filter", "adam")
    page.until("return document.querySelector('#runs > .problem').innerText.startsWith('No run has a name')")
    assert page.text("#nothing").startswith("The filter leaves no selected run.")
    enter(page, "run-filter", "")
    page.until("return !document.getElementById('content').hidden")
    page.click("#runs button", "None")
    page.until("return document.getElementById('content').hidden")
    assert page.text("#nothing") == "No run is selected. Select one in the list."
    page.click("#runs .run", "lr=0.3/seed=1")
    chosen_curves(page, 1)
    assert page.script("return document.getElementById('nothing').hidden")
    # In the dark theme the list has the other colors.
    page.click("#runs .run", "lr=0.1/seed=0")
    colors = f"return {SWATCHES}.map((row) => row[1]).includes(arguments[0])"
    page.until(colors, LIGHT_FIRST)
    page.prefer("dark")
    page.until(colors, DARK_FIRST)
    page.prefer("light")


def test_groups_have_mean_and_standard_deviation(page: Page) -> None:
    select_all(page)
    for pattern in ("/seed=\\d", "(lr=[^/]*)"):  # what is left of the name, what is captured
        enter(page, "run-groups", pattern)
        assert_grouped(page)
    assert page.text("#ct-keys") == "mean of a group; band: ± standard deviation"
    assert page.script("return document.querySelectorAll('#runs .run.group').length") == 4
    page.click("#runs .run.member", "lr=0.2/seed=0")
    page.until("return document.querySelectorAll('#runs .group')[1].innerText.includes('2 of 3')")
    two = np.mean([c_t(0.2, seed, 0) for seed in (1, 2)])
    page.until(f"return Math.abs(Math.abs({CURVES}[1].y[1]) - arguments[0]) < 1e-6", abs(two))


def assert_grouped(page: Page) -> None:
    """Check the curves of C_t of the groups of one rate."""
    drawn = chosen_curves(page, len(RATES))
    bands = [trace for trace in page.traces("ct") if "band" in trace["meta"]]
    sign = -1 if page.script("return document.getElementById('ct').layout.yaxis.type") == "log" else 1
    for rate, curve, band in zip(RATES, drawn, bands, strict=True):
        assert curve["name"] == f"lr={rate}"
        values = np.array([[c_t(rate, seed, epoch) for epoch in EPOCHS] for seed in SEEDS])
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
        assert curve["x"] == list(EPOCHS)
        assert curve["y"] == pytest.approx(sign * mean, rel=1e-6)
        assert band["y"] == pytest.approx(sign * np.array([*(mean + deviation), *(mean - deviation)[::-1]]), rel=1e-5)


def place_in(page: Page, chart: str, x: float, share: float) -> tuple[float, float]:
    """Return the pixel of a place on the horizontal axis of a chart, at a share of its height."""
    return page.script(
        "const node = document.getElementById(arguments[0]); node.scrollIntoView({ block: 'center' });"
        "const { left, top } = node.getBoundingClientRect(); const { xaxis, yaxis } = node._fullLayout;"
        "return [left + xaxis._offset + xaxis.d2p(arguments[1]), top + yaxis._offset + yaxis._length * arguments[2]]",
        *(chart, x, share),
    )


def test_values_at_the_pointer_and_the_chosen_state(page: Page) -> None:
    select_all(page)
    x, y = place_in(page, "ct", 1, 0.95)
    page.mouse("Moved", x, y)
    page.until("return document.querySelector('#values p')?.textContent === 'epoch 1'")
    rows = page.script(
        "return [...document.querySelectorAll('#values tbody tr')].map((row) =>"
        " [row.querySelector('th').textContent, row.querySelector('td').firstChild.textContent, row.className])"
    )
    expected = {f"lr={rate}/seed={seed}": c_t(rate, seed, 1) for rate in RATES for seed in SEEDS}
    assert {name: float(hyphens(text)) for name, text, _ in rows} == pytest.approx(expected, rel=1e-3)
    assert [name for name, *_ in rows] == sorted(expected, key=lambda name: -expected[name])
    assert [name for name, _, mark in rows if mark == "nearest"] == ["lr=0.4/seed=2"]  # at the lower end
    # A click chooses the run that is nearest, and the epoch, which every figure marks.
    page.mouse("Pressed", x, y, **CLICK)
    page.mouse("Released", x, y, **CLICK)
    page.until("return document.body.dataset.detail === arguments[0]", '["lr=0.4/seed=2","hesd"] 8')
    assert page.script(f"return {LINES}") == [1, 1, 1, 1]
    assert page.text("#detail-tools output") == "epoch 1"
    assert "Ct = −0.09" in page.text("#detail-tools .facts").replace("\n", "")
    top, bottom, height = page.script(
        "const { top, bottom } = document.getElementById('detail-tools').getBoundingClientRect();"
        "return [top, bottom, innerHeight]"
    )
    assert 0 <= top < bottom <= height  # in sight
    page.script("document.activeElement.blur()")
    for key, state, step in (("ARROW_LEFT", "epoch 0", 4), ("ARROW_LEFT", "start", 0), ("ARROW_RIGHT", "epoch 0", 4)):
        page.press(getattr(webdriver.Keys, key))
        page.until("return document.body.dataset.detail.endsWith(arguments[0])", f" {step}")
        assert page.text("#detail-tools output") == state
    page.until(f"return {LINES}.every((x) => x === 0)")
    page.click("#detail-tools button", "One analysis back")
    page.until(f"return {LINES}.every((x) => x === -1)")
    page.mouse("Moved", 5, 5)
    page.until("return document.getElementById('values').hidden")


def test_axes_and_the_address_keeps_what_is_chosen(page: Page) -> None:
    assert page.texts("#ct .xtick text") == ["start", "0", "1", "2"]
    assert page.texts("#map .xtick text")[0] == "start"
    page.change("#tools select", "time")
    page.until("return document.getElementById('ct').layout.xaxis.title.text.startsWith('time since')")
    assert page.curves("ct")[0]["x"][0] == 0
    page.change("#tools select", "step")
    page.until("return document.getElementById('ct').layout.xaxis.title.text === 'optimizer step'")
    assert page.curves("ct")[0]["x"] == [0, 4, 8, 12]
    page.change("#loss-tools select", "linear")
    page.change("#ct-tools select", "linear")
    page.until("return document.getElementById('ct').layout.yaxis.type === 'linear'")
    assert page.script("return document.getElementById('extremes').layout.yaxis.type") == "log"
    select_all(page)
    page.click("#runs .run", "lr=0.2/seed=1")
    chosen_curves(page, 11)
    enter(page, "run-filter", "lr=0.[23]")
    chosen_curves(page, 5)
    enter(page, "run-groups", "/seed=.")
    chosen_curves(page, 2)
    page.show_in_detail("lr=0.3/seed=2")
    page.slide(1, 4)
    x, y = place_in(page, "loss", 4, 0.2)
    page.drag((x, y), (x + 60, y + 1))
    page.until("return document.getElementById('loss').layout.xaxis.range[0] > 3")
    state = (
        "const range = (id) => document.getElementById(id).layout.xaxis.range;"
        "return JSON.stringify([document.body.dataset.detail, document.getElementById('run-count').textContent,"
        "['run-filter', 'run-groups'].map((id) => document.getElementById(id).value),"
        "['ct', 'loss', 'extremes'].map((id) => document.getElementById(id).layout.yaxis.type),"
        "range('loss').map((end) => end.toFixed(3)), range('ct'),"
        "document.getElementById('ct')._fullData.filter((t) => t.meta?.key).map((t) => [t.name, t.x, t.y])])"
    )
    before = page.script(state)
    page.until("return location.hash.includes('p.hesd.zooms')")
    link = page.script("return location.href")
    assert "p.hesd.filter=lr%3D0.%5B23%5D" in link
    page.driver.refresh()
    page.until("return document.body.dataset.drawn > 0")
    assert page.script(state) == before
    # As a link in an open page, and back; what is damaged in a link is left out.
    page.script("location.hash = '#p.hesd.filter=lr%3D0.4&p.hesd.zooms=%7B%22ct&p.hesd.x=nonsense'")
    assert len(chosen_curves(page, 1)) == 1
    page.script("location.href = arguments[0]", link)
    chosen_curves(page, 2)
    page.until(f"return (() => {{ {state} }})() === arguments[0]", before)
    page.click("figure:has(#loss) button", "Reset")
    page.until("return document.getElementById('loss').layout.xaxis.range[0] < 0")
    page.until("return !location.hash.includes('p.hesd.zooms')")


def test_rows_of_cards_are_full_at_every_width(page: Page) -> None:
    for width in (1920, 1440, 900):
        page.driver.set_window_size(width, 1000)
        page.until(
            "return Math.abs(outerWidth - arguments[0]) < 2 &&"
            " [...document.querySelectorAll('.js-plotly-plot')].every((node) =>"
            " Math.abs(node._fullLayout.width - node.clientWidth) <= 1)",
            width,
        )
        assert_full(page)


def assert_full(page: Page) -> None:
    """Check that rows end where their grid does, and that nothing covers anything."""
    for left, right, cards in page.script(CARDS):
        assert all(height < 90 for *_, height, is_missing in cards if is_missing)  # a line or three say why
        for _, row in groupby(sorted(cards), lambda card: round(card[0])):
            places = [(start, end) for _, start, end, *_ in row]
            assert places[0][0] == pytest.approx(left, abs=1)
            assert places[-1][1] == pytest.approx(right, abs=2)
    # Legends are above the figures, never on them; the page does not scroll to the side.
    covered = page.script(
        "return [...document.querySelectorAll('.keys')].filter((keys) => keys.offsetHeight &&"
        " keys.getBoundingClientRect().bottom > keys.nextElementSibling.getBoundingClientRect().top + 1).length"
    )
    assert covered == 0
    assert page.script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
