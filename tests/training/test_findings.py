"""The findings of a real run: of the callback, of its history, in the terminal, in the folder and in payloads."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hesd import HessianSpectrumCallback, SpectrumHistory
from lightning_hesd.commands.report import run_data
from lightning_hesd.spectra import finding_kinds
from lightning_hesd.spectra.findings import findings
from tests.spectra.test_findings import PLANTED
from tests.tab import ROOT, Tab
from tests.training.digits_run import fit


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two Lanczos steps do not tell the type; only the callback knows the cost."""
    monkeypatch.setattr(finding_kinds, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(finding_kinds, "LARGEST_COST", 0.0)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback = HessianSpectrumCallback(steps=2, num_samples=40, at_start=True, verbose=True, progress=False)
    fit(tmp_path, callback, logger=logger, enable_progress_bar=False)

    short_run, cost = callback.findings
    assert (short_run.key, cost.key) == ("short_run", "cost")
    evidence = r"C_t may be above or below -0\.6 in \d of 2 analyses, at epoch \d \[.*, .*\]\."
    assert re.fullmatch(evidence, short_run.evidence)
    assert short_run.action == "Set `steps=4`, or `tolerance='type'`."
    assert callback.history.findings == [short_run]
    assert SpectrumHistory.load(tmp_path / "run").findings == [short_run]

    said = capsys.readouterr().out.splitlines()
    begin = said.index("findings, the most important first:")
    lines = [[f"- {each.evidence}", f"  certain; next: {each.action}"] for each in callback.findings]
    assert said[begin + 1 : begin + 5] == [*lines[0], *lines[1]]

    # Each payload has the findings as of then, in the tab and in the report.
    _, data = Tab(tmp_path).get("records", run="run", name="hesd")
    expected: list[Any] = [[asdict(f) for f in findings(callback.history[:end])] for end in (1, 2, 3)]
    assert [record["findings"] for record in data["records"]] == expected
    assert expected[-1] == [asdict(short_run)]
    assert [record["findings"] for record in run_data(tmp_path / "run")["records"]] == expected


def test_every_title_is_documented() -> None:
    page = (ROOT / "docs" / "how-to" / "findings.md").read_text()
    titles = {found.title for _, run, *_ in PLANTED.values() for found in findings(run)}
    assert [title for title in sorted(titles) if f"*{title}*" not in page] == []
    assert "*The analyses cost more than training*" in page
