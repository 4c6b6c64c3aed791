"""A page in a browser, and what the tests of the HESD tab and of the report ask of it."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_hesd import Judgment

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
IS_REQUIRED = os.environ.get("HESD_BROWSER") == "required"
"""As in `.ci/run`: what is missing is an error."""

try:
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    if IS_REQUIRED:
        raise
    webdriver = None

needs_browser = pytest.mark.skipif(
    not (IS_REQUIRED or (webdriver and BROWSER and DRIVER)),
    reason="needs Selenium, Chromium and its driver: pip install selenium; apt-get install chromium chromium-driver",
)

CLICK = {"button": "left", "buttons": 1, "clickCount": 1}


def start() -> Any:
    """Start a browser without a window."""
    os.environ["SE_OFFLINE"] = "true"  # look for no other driver on the network
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def hyphens(text: str) -> str:
    """Return a text of the page with the minus signs of Python."""
    return text.replace("−", "-")


class Page:
    """A page, and what the tests ask of it."""

    JUDGMENT = "section[aria-labelledby=judgment-title]"

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def keep(self, shown: str, open_it: Callable[[], None]) -> None:
        """Open a page unless it is open already: loading takes longer than looking."""
        if getattr(self.driver, "kept", None) != shown:
            open_it()
        self.driver.kept = shown

    def open(self, address: str) -> None:
        self.driver.kept = None
        self.driver.get("about:blank")  # the page before asks its server for more, which may have ended by now
        self.driver.get_log("browser")
        self.driver.get(address)

    def open_tab(self, address: str) -> None:
        self.open(f"{address}data/plugin_entry.html?name=hesd")
        self.until("return document.body.dataset.drawn > 0")

    def open_report(self, path: Path) -> None:
        self.open(path.as_uri())
        self.until("return document.getElementById('hesd').dataset.drawn > 0")

    @contextmanager
    def before_others(self, script: str) -> Iterator[None]:
        """Let pages run a script before those of their own."""
        noted = self.command("Page.addScriptToEvaluateOnNewDocument", source=script)
        yield
        self.command("Page.removeScriptToEvaluateOnNewDocument", **noted)

    def command(self, name: str, **arguments: Any) -> Any:
        """Give the browser a command of the Chrome DevTools Protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def prefer(self, theme: str) -> None:
        """Let the system prefer "dark" or "light" pages."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: str, *arguments: Any) -> Any:
        """Wait until a script returns something true, and return it."""
        message = f"never: {condition}"
        return WebDriverWait(self.driver, 30, 0.05).until(lambda _: self.script(condition, *arguments), message)

    def change(self, selector: str, value: str | int, event: str = "change") -> None:
        """Give a field or a menu another value, as a user does."""
        self.script(
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event(arguments[2]))",
            *(selector, value, event),
        )

    def show_in_detail(self, run: str) -> None:
        self.script(
            "const menu = document.querySelector('#detail-tools select');"
            "menu.value = [...menu.options].find((option) => option.text === arguments[0]).value;"
            "menu.dispatchEvent(new Event('change'))",
            run,
        )
        self.until("return document.body.dataset.detail?.includes(arguments[0])", run)

    def slide(self, position: int, step: int) -> None:
        """Choose a state by its position on the slider, and wait for the state of this optimizer step."""
        self.change("#epoch", position, "input")
        self.until("return document.querySelector('[data-detail]')?.dataset.detail.endsWith(` ${arguments[0]}`)", step)

    def traces(self, figure: str) -> list[dict[str, Any]]:
        """What Plotly has drawn, without the entries of the legend."""
        found = self.script(
            "return JSON.stringify(document.getElementById(arguments[0])._fullData"
            ".map(({x, y, z, name, mode, meta, customdata, line}) => "
            "({x, y, z, name, mode, meta: meta ?? {}, customdata, dash: line?.dash})))",
            figure,
        )
        return [trace for trace in json.loads(found) if trace["x"] != [None]]

    def curves(self, figure: str) -> list[dict[str, Any]]:
        """The curves of runs: what has a key and is no pick."""
        return [t for t in self.traces(figure) if t["meta"].get("key") and "pick" not in t["meta"]]

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText ?? e.textContent)", selector
        )

    def until_texts(self, selector: str, expected: list[str]) -> None:
        found = "[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        self.until(f"return JSON.stringify({found}) === JSON.stringify(arguments[1])", selector, expected)

    def click(self, selector: str, word: str = "") -> None:
        """Click the first of these elements that has this word in its text or title."""
        self.script(
            "[...document.querySelectorAll(arguments[0])]"
            ".find((e) => `${e.innerText} ${e.title}`.includes(arguments[1])).click()",
            *(selector, word),
        )

    def point_at(self, selector: str) -> None:
        found = self.script("return document.querySelector(arguments[0])", selector)
        webdriver.ActionChains(self.driver).scroll_to_element(found).move_to_element(found).perform()

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Let the mouse do "Moved", "Pressed" or "Released" at a pixel."""
        self.command("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def drag(self, *places: tuple[float, float]) -> None:
        """Drag the mouse from one pixel to another."""
        for kind, (x, y) in zip(("Pressed", "Moved", "Released"), (places[0], places[1], places[1]), strict=True):
            self.mouse(kind, x, y, **CLICK)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def saved(self, folder: Path, selector: str, word: str, name: str) -> bytes:
        """Press a button, and return the file of this name that the browser saves in a folder."""
        self.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.click(selector, word)
        path = folder / name
        for _ in range(200):
            if path.exists() and path.stat().st_size:
                content = path.read_bytes()
                path.unlink()
                return content
            time.sleep(0.02)
        raise AssertionError(name, sorted(folder.iterdir()))

    def export(self, figure: str, size: str | None = None) -> None:
        """Open the dialog that exports a figure."""
        self.script("document.querySelector('dialog')?.close()")
        self.click(f"figure:has(#{figure}) button", "Export")
        self.until("return document.querySelector('dialog img')?.complete")
        if size is not None:
            self.script("const old = document.querySelector('dialog img'); window.isOld = (image) => image === old")
            self.change("dialog select", size)
            self.until("const image = document.querySelector('dialog img'); return !isOld(image) && image.complete")

    def show_judgment(self) -> None:
        self.script("document.querySelector('#judgment-title').scrollIntoView()")
        self.wait_for_judgment()

    def wait_for_judgment(self) -> None:
        self.until(f"return document.querySelector('{self.JUDGMENT}').getAttribute('aria-busy') === 'false'")

    def judge_by(self, metric: str) -> None:
        self.change("#judgment-tools select", metric)
        self.wait_for_judgment()

    def assert_judged(self, expected: Judgment) -> None:
        """Check that the card shows a judgment."""
        assert hyphens(self.text("#judgment .sentence")) == expected.sentence
        shown = expected.to_dict()["summary"]
        assert self.text("#judgment caption") == shown["title"]
        rows = self.script(
            "return [...document.querySelectorAll('#judgment tr')]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))"
        )
        assert [list(map(hyphens, row)) for row in rows] == [shown["header"], *filter(None, shown["rows"])]
        assert self.script("return document.querySelectorAll('#judgment tbody').length") == 2

    def assert_clean(self, *hosts: str) -> None:
        """Nothing was complained about, injected, or fetched from elsewhere."""
        said = [e["message"] for e in self.driver.get_log("browser") if "favicon.ico" not in e["message"]]
        assert said == []
        assert self.script("return window.injected ?? null") is None
        asked = self.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [url for url in asked if not url.startswith(("data:", "blob:", *hosts))] == []
