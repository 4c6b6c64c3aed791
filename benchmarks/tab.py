"""Measure how long the HESD tab takes to draw: 48 runs of 100 analyses with 100 nodes and 60 layers each.

    python -m benchmarks.tab

It opens a report of synthetic payloads in a headless Chromium; the report draws with the files of the tab. The page's
clock measures the time from data in memory to all figures drawn. The first time includes the compilation of Plotly. At
first ten runs are selected; `--all` selects all of them through the address.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from lightning_hesd.commands.report import report
from lightning_hesd.spectra.decisions import run_payload
from lightning_hesd.spectra.payload import LAYER_DIGITS, THRESHOLDS, to_json
from lightning_hesd.spectra.quadrature import legible_sigma
from lightning_hesd.spectra.validation import FORMAT_VERSION


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--all", action="store_true", help="draw all runs at first")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    runs = [run(rng, index, args.epochs, args.nodes, args.layers) for index in range(args.runs)]
    sizes = [len(to_json(record)) for record in runs[0]["records"]]
    document = report(*runs)
    print(
        f"{args.runs} runs, {args.epochs} records each, {args.nodes} nodes, {args.layers} layers; "
        f"a record takes {np.mean(sizes):.0f} bytes, the report {len(document) / 1e6:.1f} MB"
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(document, encoding="utf-8")
        driver = browser()
        try:
            address = page.as_uri() + ("#p.hesd.runs=" + quote('{"without":[]}') if args.all else "")
            for what, milliseconds in measured(driver, address):
                print(f"{what:32} {milliseconds:6.0f} ms")
        finally:
            driver.quit()


def run(rng: np.random.Generator, index: int, epochs: int, nodes: int, layers: int) -> dict[str, Any]:
    """Return the data of a run whose curvature falls while it trains."""
    records = [record(rng, epoch, epochs, nodes, layers) for epoch in range(epochs)]
    return {**run_payload(f"run_{index}", "hesd", records, [], []), "color": index}


def record(rng: np.random.Generator, epoch: int, epochs: int, nodes: int, layers: int) -> dict[str, Any]:
    """Return a payload with the fields that are drawn."""
    largest = 50 * math.exp(-3 * epoch / epochs + 0.05 * rng.standard_normal())
    smallest = -largest * 0.3 * math.exp(-4 * epoch / epochs + 0.1 * rng.standard_normal())
    theta = np.sort(
        np.concatenate(
            [np.geomspace(1e-3, 1, nodes - nodes // 3) * largest, np.geomspace(1e-3, 1, nodes // 3) * smallest]
        )
    )
    tau = rng.dirichlet(np.ones(nodes))
    c_t = smallest / largest
    spectrum = {
        "c_t": c_t,
        "c_t_low": 1.1 * c_t,
        "c_t_high": 0.98 * c_t,
        "type": "MP",
        "type_certain": True,
        "verified": "yes",
        "verification": "made up",
        "lambda_min": smallest,
        "lambda_max": largest,
        "loss": 2 * math.exp(-5 * epoch / epochs),
        "confidence": 0.95,
        "num_samples": 512,
        "sigma": legible_sigma(smallest, largest),
        "nodes": [float(f"{t:.7g}") for t in theta],
        "weights": [float(f"{t:.7g}") for t in tau],
    }
    return {
        "version": FORMAT_VERSION,
        "epoch": epoch,
        "global_step": epoch + 1,
        "error": None,
        "spectra": {"spectrum": spectrum},
        "thresholds": THRESHOLDS,
        "assessment": None,
        "stability_ratio": None,
        "scores": {"highest_c_t": c_t, "lowest_max_eigenvalue": -largest},
        "metrics": {"val_acc": 1 - math.exp(-3 * (epoch + 1) / epochs) + 0.01 * rng.standard_normal()},
        "findings": [],
        "layers": layers_of_network(rng, layers, smallest, largest),
    }


def layers_of_network(rng: np.random.Generator, layers: int, smallest: float, largest: float) -> dict[str, list[Any]]:
    """Return what the spectrum of a network tells of its layers."""
    share, of_largest, of_smallest = rng.dirichlet(np.ones(layers), 3)
    columns = {
        "trace": 20 * largest * share,
        "trace_share": share,
        "lambda_max_weight": of_largest,
        "lambda_min_weight": of_smallest,
        "trace_error": 2 * largest * share,
        "lambda_max_low": 0.9 * largest * of_largest,
        "lambda_max_high": largest * of_largest,
        "lambda_min_low": smallest * of_smallest,
        "lambda_min_high": 0.9 * smallest * of_smallest,
    }
    digits = {key: [float(f"{value:.{LAYER_DIGITS}g}") for value in column] for key, column in columns.items()}
    return {
        "name": [f"encoder.layers.{index}.self_attention" for index in range(layers)],
        "dimension": [1000 + index for index in range(layers)],
        **digits,
    }


def browser() -> webdriver.Chrome:
    """Return a headless Chromium; it and its driver must be installed."""
    os.environ["SE_OFFLINE"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


MOVES = 10


def measured(driver: webdriver.Chrome, address: str) -> list[tuple[str, float]]:
    """Return times in milliseconds, by the name of the action."""

    def wait(condition: str) -> None:
        WebDriverWait(driver, 120, 0.05).until(lambda d: d.execute_script(f"return {condition}"))

    def times(name: str) -> list[float]:
        found: list[float] = driver.execute_script(
            "return performance.getEntriesByName(arguments[0]).map((entry) => entry.duration)", name
        )
        return found

    def drawn_after(script: str) -> float:
        count = int(driver.execute_script("return document.getElementById('hesd').dataset.drawn"))
        driver.execute_script(script)
        wait(f"document.getElementById('hesd').dataset.drawn > {count}")
        return times("hesd draw")[-1]

    def pressed(selector: str) -> str:
        return f"document.querySelector('{selector}').click()"

    driver.get(address)
    wait("document.getElementById('hesd').dataset.drawn > 0")
    found = [("first drawing", times("hesd draw")[-1])]
    found.append(("all runs", drawn_after(pressed("#runs button"))))
    found.append(("a run less", drawn_after(pressed("#runs .run input"))))
    for move in range(MOVES):
        driver.execute_script(
            "const slider = document.getElementById('epoch'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'))",
            move,
        )
        wait(f"performance.getEntriesByName('hesd move').length > {move}")
    moves = sorted(times("hesd move"))
    return [*found, ("a move of the state, median", moves[MOVES // 2]), ("a move of the state, longest", moves[-1])]


if __name__ == "__main__":
    main()
