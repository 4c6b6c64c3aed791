"""The report in a browser: what it shows, the export of its figures, and how it is printed; one page for all tests."""

import base64
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_hesd import judge
from lightning_hesd.commands.report import write_report
from tests.browser import Page, needs_browser
from tests.tab import EPOCHS

pytestmark = needs_browser

RUN = "net/version_0"
SPAN, LAST = f"epochs start to {EPOCHS - 1}", f"epoch {EPOCHS - 1}"
OVER_TRAINING, OF_A_STATE = ("ct", "extremes", "deltas", "loss", "metric", "map", "layers"), ("density", "cumulative")
PLACES = dict.fromkeys(OVER_TRAINING, SPAN) | dict.fromkeys(OF_A_STATE, LAST)


@pytest.fixture(scope="module")
def page(driver: Any, trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A report in the dark theme."""
    path = tmp_path_factory.mktemp("export") / "report.html"
    write_report(trained[0] / RUN, path)
    page = Page(driver)
    page.prefer("dark")
    page.open_report(path)
    page.script("window.print = () => { window.printed = true; }")
    yield page
    page.assert_clean(path.as_uri())
    page.prefer("light")


BOXES = """
const svg = new DOMParser().parseFromString(arguments[0], "image/svg+xml").documentElement;
document.body.append(document.importNode(svg, true));
const shown = document.body.lastElementChild;
const box = (selector) => {
  const found = shown.querySelector(selector)?.getBoundingClientRect();
  return found && found.height ? [found.left, found.top, found.right, found.bottom] : null;
};
const boxes = {
  svg: shown.getBoundingClientRect().toJSON(), title: box(".gtitle"), legend: box(".legend"),
  axes: box(".heatmaplayer") ?? box(".gridlayer"),
};
const text = [...shown.querySelectorAll("text")].map((one) => one.textContent).join("\\n");
shown.remove();
return { ...boxes, text };
"""

DARK_COLORS = "232, 234, 237|169, 174, 180|68, 71, 76|43, 44, 47|86, 180, 233|240, 148, 77|142, 152, 163"
"""Colors of the dark theme that the light one does not have."""


def file_name(figure: str, size: str, kind: str) -> str:
    place = re.sub(r"[^A-Za-z0-9._]+", "-", f"{RUN}, {PLACES[figure]}")
    return f"hesd-{figure}-{place}-{size}.{kind}"


def test_the_report(page: Page, trained: tuple[Path, Any]) -> None:
    folder, callback = trained
    assert page.curves("ct")[0]["x"] == [record.epoch for record in callback.history]
    best = callback.checkpoint.best
    assert f"takes epoch {best.epoch} " in page.text("[data-rule=highest_c_t]")
    assert best.path in page.text("[data-rule=highest_c_t]")
    page.script("window.dispatchEvent(new Event('beforeprint')); window.dispatchEvent(new Event('afterprint'))")
    page.wait_for_judgment()  # which is printed before it has been in view
    page.assert_judged(judge({RUN: folder / RUN}, "val_acc"))
    page.judge_by("train_acc")
    page.assert_judged(judge({RUN: folder / RUN}, "train_acc"))
    page.slide(0, 0)
    page.slide(EPOCHS, callback.history[-1].global_step)


def touch(figure: Figure, path: str) -> None:
    """Draw a figure, and make an empty file."""
    figure.draw_without_rendering()
    Path(path).touch()


def test_every_figure_in_light_colors_with_a_title_and_its_code(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.script("return document.documentElement.dataset.theme") == "dark"
    monkeypatch.chdir(tmp_path)
    shown = {}
    for figure, place in PLACES.items():
        page.export(figure)
        svg = page.saved(tmp_path, "dialog button", "SVG", file_name(figure, "column", "svg")).decode()
        found = page.script(BOXES, svg)
        assert f"{RUN}, {place}" in found["text"], figure
        title = page.text(f"#{figure}-title").replace("\n", "")
        assert title in found["text"].replace("\u200b", ""), figure
        assert not re.findall(rf"rgba?\(({DARK_COLORS})", svg), figure
        assert "rgb(255, 255, 255)" in svg, figure
        assert found["svg"]["width"] == pytest.approx(3.4 * 96, abs=0.05), figure
        if figure != "layers":  # which is as high as the layers need
            assert found["svg"]["height"] == pytest.approx(2.75 * 96, abs=0.05), figure
        if found["legend"]:  # whose box has a margin
            assert found["title"][3] <= found["legend"][1] + 3, (figure, found)
            assert found["legend"][3] <= found["axes"][1] + 3, (figure, found)
        assert found["title"][3] <= found["axes"][1], figure
        assert found["title"][2] <= found["svg"]["right"], figure
        assert found["title"][1] >= found["svg"]["top"], figure

        code = page.script("return document.querySelector('dialog pre').textContent")
        exec(compile(code, figure, "exec"), {})  # noqa: S102 - as the user would
        shown[figure] = {path.name for path in tmp_path.iterdir()} - {name for made in shown.values() for name in made}
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", touch)  # the others, to save time
    assert shown == {
        "ct": {"hesd-ct.pdf"},
        "extremes": {"hesd-extremes-lambda_max.pdf", "hesd-extremes-lambda_min.pdf"},
        "deltas": {"hesd-deltas-delta_r_e.pdf", "hesd-deltas-delta_k_h05.pdf"},
        "loss": {"hesd-loss-loss.pdf"},
        "metric": {"hesd-metric-train_acc.pdf"},
        "map": {"hesd-map.pdf"},
        "layers": {"hesd-layers.pdf"},
        "density": {"hesd-density.pdf"},
        "cumulative": {"hesd-cumulative-spectrum.pdf", "hesd-cumulative-generalization.pdf"},
    }


def test_sizes_of_images(page: Page, tmp_path: Path) -> None:
    for size, pixels in (("column", (2040, 1650)), ("slide", (2560, 1440))):
        page.export("ct", size)
        png = page.saved(tmp_path, "dialog button", "PNG", file_name("ct", size, "png"))
        assert struct.unpack(">II", png[16:24]) == pixels, size
    page.export("map")  # the size stays chosen
    assert page.script("return document.querySelector('dialog select').value") == "slide"


def test_a_pdf_is_vector_graphics_with_embedded_fonts_on_a_page_of_its_size(page: Page) -> None:
    page.export("ct", "page")
    title = page.script("return document.title")
    page.click("dialog button", "PDF")
    page.until("return window.printed")
    assert page.script("return document.title") == file_name("ct", "page", "pdf")
    pdf = base64.b64decode(page.command("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])
    [box] = re.findall(rb"/MediaBox \[([^]]*)\]", pdf)  # one page, in points
    assert [float(end) for end in box.split()] == pytest.approx([0, 0, 7 * 72, 3.9 * 72], abs=0.5)
    assert b"/FontFile2" in pdf
    assert b"/Subtype /Image" not in pdf
    assert b"/Type3" not in pdf
    page.until("return !document.querySelector('.sheet')")
    assert page.script("return document.title") == title


def test_code_is_copied(page: Page) -> None:
    page.command("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.export("layers")
    page.click("dialog button", "Copy")
    page.until("return document.querySelector('dialog [role=status]').textContent")
    assert page.text("dialog [role=status]") == "The code is on the clipboard."
    page.script("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.click("dialog button", "Copy")
    page.until("return document.querySelector('dialog [role=status]').textContent.includes('selected')")
    assert page.script("return String(getSelection())").strip() == page.text("dialog pre").strip()
    page.press("\ue00c")  # Escape
    page.until("return !document.querySelector('dialog')")


def test_the_printed_report_is_light_and_as_wide_as_the_paper(page: Page) -> None:
    widths = "return [...document.querySelectorAll('.js-plotly-plot')].map((node) => node._fullLayout.width)"
    before = page.script(widths)
    assert len(before) == len(PLACES)
    page.script("window.dispatchEvent(new Event('beforeprint'))")
    assert page.script("return document.documentElement.dataset.theme") == "light"
    assert set(page.script(widths)) == {680}
    page.script("window.dispatchEvent(new Event('afterprint'))")
    page.until("return document.documentElement.dataset.theme === 'dark'")
    page.until(f"{widths}.every((width) => width !== 680)")
    assert page.script(widths) == before
