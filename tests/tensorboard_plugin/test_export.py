"""The export of figures and the printed report, in one browser session on one report."""

from __future__ import annotations

import base64
import re
import shutil
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lightning_hesd.commands.report import write_report
from tests.tab import EPOCHS, Tab
from tests.tensorboard_plugin.test_browser import Page, driver, pytestmark  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = "net/version_0"
SPAN, LAST = f"epochs start to {EPOCHS - 1}", f"epoch {EPOCHS - 1}"
OVER_TRAINING, OF_A_STATE = ("ct", "extremes", "deltas", "loss", "metric", "map", "layers"), ("density", "cumulative")
PLACES = dict.fromkeys(OVER_TRAINING, SPAN) | dict.fromkeys(OF_A_STATE, LAST)
DARK = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}


@pytest.fixture(scope="module")
def page(driver: Any, trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:  # noqa: F811
    """A report in the dark theme, for all tests; downloads go to its folder."""
    out = tmp_path_factory.mktemp("export") / "report.html"
    write_report(trained[0] / RUN, out)
    page = Page(driver)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", DARK)
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(out.parent)})
    page.folder = out.parent  # type: ignore[attr-defined]
    page.open(out.as_uri())
    page.until("return document.getElementById('hesd').dataset.drawn > 0")
    page.script("window.print = () => { window.printed = true; }")
    yield page
    page.assert_clean(out.as_uri())
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    driver.get("about:blank")


def open_export(page: Page, figure: str, size: str | None = None) -> None:
    page.script("document.querySelector('dialog')?.close()")
    page.click(f"figure:has(#{figure}) button", "Export")
    page.until("return document.querySelector('dialog img')?.complete")
    if size is not None:
        page.script(
            "const image = () => document.querySelector('dialog img'), old = image();"
            "const menu = document.querySelector('dialog select');"
            "menu.value = arguments[0]; menu.dispatchEvent(new Event('change'));"
            "window.isNew = () => image() !== old && image().complete",
            size,
        )
        page.until("return window.isNew()")


def saved(page: Page, kind: str, name: str) -> bytes:
    """Press a button of the dialog, and return the file that it saves."""
    page.click("dialog button", kind)
    path = page.folder / name  # type: ignore[attr-defined]
    for _ in range(100):
        if path.exists() and path.stat().st_size:
            content = path.read_bytes()
            path.unlink()
            return content
        time.sleep(0.05)
    raise AssertionError(name, page.text("dialog"), sorted(path.parent.iterdir()))


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


def test_every_figure_in_light_colors_with_a_title_and_its_code(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.script("return document.documentElement.dataset.theme") == "dark"
    monkeypatch.chdir(tmp_path)
    shown = {}
    for figure, place in PLACES.items():
        open_export(page, figure)
        svg = saved(page, "SVG", file_name(figure, "column", "svg")).decode()
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
    from matplotlib import pyplot as plt  # noqa: PLC0415

    plt.close("all")
    assert shown == {
        "ct": {"hesd-ct.pdf"},
        "extremes": {"hesd-extremes-lambda_max.pdf", "hesd-extremes-lambda_min.pdf"},
        "deltas": {"hesd-deltas-delta_r_e.pdf", "hesd-deltas-delta_k_h05.pdf"},
        "loss": {"hesd-loss-loss.pdf"},
        "metric": {"hesd-metric-train_acc.pdf"},
        "map": {"hesd-map.pdf"},
        "layers": {"hesd-layers.pdf"},
        "density": {"hesd-density-spectrum.pdf", "hesd-density-generalization.pdf"},
        "cumulative": {"hesd-cumulative-spectrum.pdf", "hesd-cumulative-generalization.pdf"},
    }


def test_code_of_several_runs_draws_one_figure(
    page: Page, trained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = page.driver.current_url
    for run in ("a", "b"):
        shutil.copytree(trained[0] / RUN, tmp_path / "runs" / run)
    write_report(tmp_path / "runs", tmp_path / "report.html")
    page.open((tmp_path / "report.html").as_uri())
    page.until("return document.getElementById('hesd').dataset.drawn > 0")
    monkeypatch.chdir(tmp_path)
    for figure, made in (("ct", "c_t"), ("extremes", "lambda_max")):
        open_export(page, figure)
        names: dict[str, Any] = {}
        exec(compile(page.script("return document.querySelector('dialog pre').textContent"), figure, "exec"), names)  # noqa: S102
        assert (tmp_path / f"hesd-{figure}-{made}.pdf").is_file()
        assert list(names["history"]) == ["a", "b"]
        assert len([line for line in names["ax"].lines if line.get_label().startswith(("a", "b"))]) == 4
    page.open(before)
    page.until("return document.getElementById('hesd').dataset.drawn > 0")
    page.script("window.print = () => { window.printed = true; }")


def test_sizes_of_images(page: Page) -> None:
    for size, pixels in (("column", (2040, 1650)), ("page", (4200, 2340)), ("slide", (2560, 1440))):
        open_export(page, "ct", size)
        png = saved(page, "PNG", file_name("ct", size, "png"))
        assert struct.unpack(">II", png[16:24]) == pixels, size
    open_export(page, "map")  # the size stays chosen
    assert page.script("return document.querySelector('dialog select').value") == "slide"


def test_a_pdf_is_vector_graphics_with_embedded_fonts_on_a_page_of_its_size(page: Page) -> None:
    open_export(page, "ct", "page")
    title = page.script("return document.title")
    page.click("dialog button", "PDF")
    page.until("return window.printed")
    assert page.script("return document.title") == file_name("ct", "page", "pdf")
    options = {"preferCSSPageSize": True, "printBackground": False}
    pdf = base64.b64decode(page.driver.execute_cdp_cmd("Page.printToPDF", options)["data"])
    [box] = re.findall(rb"/MediaBox \[([^]]*)\]", pdf)  # one page, in points
    assert [float(end) for end in box.split()] == pytest.approx([0, 0, 7 * 72, 3.9 * 72], abs=0.5)
    assert b"/FontFile2" in pdf
    assert b"/Subtype /Image" not in pdf
    assert b"/Type3" not in pdf
    page.until("return !document.querySelector('.sheet')")
    assert page.script("return document.title") == title


def test_code_is_copied(page: Page) -> None:
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    open_export(page, "layers")
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
    page.until(
        "return [...document.querySelectorAll('.js-plotly-plot')].every((node) => node._fullLayout.width !== 680)"
    )
    assert page.script(widths) == before


def test_the_tab_names_the_log_directory(trained: tuple[Path, Any]) -> None:
    assert Path(Tab(trained[0]).get("runs")[1]["folder"]) == trained[0]
