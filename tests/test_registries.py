"""A rule and a scalar that are entered in their registries appear everywhere, with no other change."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.commands.cli import main
from lightning_hesd.commands.report import run_data
from lightning_hesd.plotting import plot_c_t
from lightning_hesd.spectra.decisions import decisions
from lightning_hesd.spectra.payload import record_payload
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.rules import RULES, CheckpointRule
from lightning_hesd.spectra.scalars import RECORD_SCALARS, RUN_SCALARS, SPECTRUM_SCALARS, Scalar
from tests.tab import ROOT
from tests.training import cli_project
from tests.training.scripted import make_spectrum, make_trainer

SPREAD = Scalar("spread", lambda spectrum: spectrum.lambda_max - spectrum.lambda_min, "spread of the spectrum")
RISE = Scalar("rise", lambda record: record.spectrum and record.spectrum.loss - 1, "rise of the loss")
RULE = CheckpointRule("lowest_trace", "lowest trace", "trace", lambda spectrum: -spectrum.trace, scalar="trace")


def train(folder: Path, rule: Any = RULE.name, **options: Any) -> HessianSpectrumCallback:
    """Train with a checkpoint callback that has a new rule."""
    torch.manual_seed(0)
    checkpoint = HessianCheckpoint(rule, require_mp=False, tolerance=10.0)
    options = {"on_error": "raise", "verbose": True, **options}
    spectra = HessianSpectrumCallback(num_samples=16, steps=4, checkpoint=checkpoint, **options)
    logger = CSVLogger(folder, name="", version="")
    trainer = make_trainer(folder, [spectra], 2, logger=logger, log_every_n_steps=1)
    trainer.fit(cli_project.Net(6), datamodule=cli_project.Data(size=16))
    return spectra


def table_of(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_third_rule_and_a_new_scalar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for scalars, scalar in ((SPECTRUM_SCALARS, SPREAD), (RECORD_SCALARS, RISE)):
        monkeypatch.setitem(scalars, scalar.key, scalar)
    monkeypatch.setitem(RULES, RULE.name, RULE)
    spectra, folder = train(tmp_path), tmp_path
    values = [r.spectrum.lambda_max - r.spectrum.lambda_min for r in spectra.history]
    lowest = min(spectra.history, key=lambda r: r.spectrum.trace)

    # The log, the summary and the checkpoint.
    logged = [float(row["hesd/spread"]) for row in table_of(folder / "metrics.csv") if row["hesd/spread"]]
    assert logged == pytest.approx(values, rel=1e-5)
    said = capsys.readouterr().out
    assert "spread of the spectrum" in said
    assert f"lowest trace picks epoch {lowest.epoch}" in said
    assert spectra.checkpoint.best.epoch == lowest.epoch

    # The table.
    pytest.importorskip("pandas")
    table = spectra.history.to_dataframe()
    assert table["spread"].tolist() == values
    assert table["rise"].tolist() == [r.spectrum.loss - 1 for r in spectra.history]

    # The data of the tab: titles, values, and the decision of the rule.
    data = json.loads(json.dumps(run_data(folder)))
    assert SPREAD.title in [scalar["title"] for scalar in data["scalars"]["spectrum"]]
    assert [r["spectra"]["spectrum"]["spread"] for r in data["records"]] == pytest.approx(values, rel=1e-6)
    assert [r["rise"] for r in data["records"]] == pytest.approx(table["rise"].tolist(), rel=1e-5)
    [decision] = [rule for rule in data["rules"] if rule["rule"] == "lowest_trace"]
    assert (decision["title"], decision["used"]) == ("lowest trace", True)
    assert decision["pick"]["epoch"] == lowest.epoch

    # The command line.
    model = ["--model", "tests.training.cli_project.Net", "--data", "tests.training.cli_project.Data"]
    options = ["--data.size=16", "--accelerator=cpu", "--analysis.steps=4", "--out", str(folder / "out")]
    main(["analyze", spectra.checkpoint.best_model_path, *model, *options])
    [row] = table_of(folder / "out" / "results.csv")
    found = lowest.spectrum
    assert float(row["spread"]) == pytest.approx(found.lambda_max - found.lambda_min, rel=1e-4)
    assert float(row["rise"]) == pytest.approx(found.loss - 1, rel=1e-4)
    assert row["picked_by"] == "highest C_t, lowest λ_max, lowest trace"


def test_a_rule_without_a_checkpoint_callback_has_its_picks_computed_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    needy = CheckpointRule("highest_r_e", "highest Δr_e", "Δr_e", lambda a: a.delta_r_e, needs=("assessment",))
    monkeypatch.setitem(RULES, RULE.name, RULE)
    monkeypatch.setitem(RULES, needy.name, needy)
    spectra = [make_spectrum(-0.1, lambda_max=size) for size in (3.0, 1.0)]
    history = [SpectrumRecord(epoch, 10 * epoch + 10, spectrum) for epoch, spectrum in enumerate(spectra)]
    ours = {rule["rule"]: rule for rule in decisions([record_payload(record) for record in history], [])}
    assert list(ours) == ["highest_c_t", "lowest_max_eigenvalue", "lowest_trace", "highest_r_e"]
    assert ours["lowest_trace"]["pick"]["epoch"] == 1
    assert ours["lowest_trace"]["why"].endswith("Among them the lowest trace wins, the earliest if several are equal.")
    assert ours["highest_r_e"]["pick"] is None  # no record has an assessment
    shown = [text.get_text() for text in plot_c_t(history).get_legend().get_texts()]
    assert "lowest trace: epoch 1" in shown
    assert not any("Δ" in text for text in shown)


def test_a_rule_that_needs_what_the_run_does_not_record_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needy = CheckpointRule("lowest_r_e", "lowest Δr_e", "Δr_e", lambda a: -a.delta_r_e, needs=("assessment",))
    monkeypatch.setitem(RULES, needy.name, needy)
    with pytest.warns(RuntimeWarning) as said:
        spectra = train(tmp_path, needy.name, on_error="warn")
    told = [str(w.message) for w in said if "'lowest_r_e' does not rank the analysis of epoch 0" in str(w.message)]
    assert len(told) == 1
    assert "`assessment`" in told[0]
    assert "`generalization_dataloader`" in told[0]
    assert spectra.checkpoint.best is None


def test_every_scalar_is_documented() -> None:
    page = (ROOT / "docs" / "how-to" / "results.md").read_text()
    assert [key for key in (*SPECTRUM_SCALARS, *RECORD_SCALARS, *RUN_SCALARS) if f"`hesd/{key}`" not in page] == []
