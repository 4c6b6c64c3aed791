"""The study of the checkpoint rules: a small one runs, and its report says what the stored runs hold."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from examples.rule_study import report, training
from examples.rule_study.training import Training, is_done, run
from lightning_hesd import SpectrumHistory

SEEDS = 2


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """Settings of trainings that are analyzed twice; the last seed is never trained."""
    monkeypatch.setattr(training, "POINTS", 2)
    monkeypatch.setattr(report, "NETWORKS", ("mlp",))
    monkeypatch.setattr(report, "SCHEDULES", ("constant", "cosine"))
    return [
        Training("mlp", schedule, seed, epochs=2, steps=3, samples=32)
        for seed in range(SEEDS + 1)
        for schedule in report.SCHEDULES
    ]


def test_a_small_study(trainings: list[Training], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has all of its trainings: run the study first"):
        report.write(trainings, tmp_path, tmp_path / "results")
    done = [settings for settings in trainings if settings.seed < SEEDS]
    for settings in done:
        assert not is_done(settings, tmp_path)
        run(settings, tmp_path)
        assert is_done(settings, tmp_path)
        assert not is_done(replace(settings, steps=4), tmp_path)
    histories = {settings.name: SpectrumHistory.load(tmp_path / settings.name) for settings in done}
    assert all([(r.epoch, r.error) for r in history] == [(0, None), (1, None)] for history in histories.values())

    path = report.write(trainings, tmp_path, tmp_path / "results")
    text = path.read_text(encoding="utf-8")
    assert f"{len(done)} on scikit-learn's digits" in text
    assert "nan" not in text
    values = [
        [[record.metrics[metric] for record in history] for history in histories.values()] for metric in report.METRICS
    ]
    for title, of_pick in (("last epoch", lambda of_run: of_run[-1]), ("best possible", max)):
        shown = re.findall(rf"^\| {title} \| (\d+\.\d\d) \|", text, re.MULTILINE)
        assert shown == [f"{100 * fmean(map(of_pick, of_metric)):.2f}" for of_metric in values]
    for metric in report.METRICS:
        assert f"]({metric}.png)" in text
        assert (path.parent / f"{metric}.png").read_bytes().startswith(b"\x89PNG")

    with (path.parent / "picks.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.METRICS) * len(done)
    for row in rows:
        values_of_run = [record.metrics[row["metric"]] for record in histories[row["run"]]]
        assert float(row["best_possible"]) == pytest.approx(max(values_of_run), abs=1e-5)
        assert (row["last epoch"], float(row["last"])) == ("1", pytest.approx(values_of_run[-1], abs=1e-5))

    elsewhere = report.write(trainings, tmp_path / "elsewhere", path.parent)  # from the table alone
    assert elsewhere.read_text(encoding="utf-8") == text
    others = [replace(settings, steps=4) for settings in trainings]
    with pytest.raises(ValueError, match="has all of its trainings"):
        report.write(others, tmp_path / "elsewhere", path.parent)
