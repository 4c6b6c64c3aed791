"""`lightning-hesd report`: several runs, the summary in words, and how the results were made."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_hesd import HessianSpectrumCallback, SpectrumHistory
from lightning_hesd.commands.cli import main
from lightning_hesd.commands.report import write_report
from lightning_hesd.commands.report_summary import sentences
from lightning_hesd.spectra.glossary import GLOSSARY
from lightning_hesd.spectra.payload import SELECTIONS_NAME, selection_payload, to_json
from lightning_hesd.spectra.selection import Candidate, CandidateFilter, SelectionEvent
from lightning_hesd.training.history import SpectrumRecord
from tests.tab import ROOT, data_of_report
from tests.training.scripted import make_spectrum

ABOUT = {
    "started": "2026-11-30T09:58:00+00:00",
    "versions": {"lightning_hesd": "0.1.0", "torch": "2.13.0"},
    "device": "cpu",
    "options": {"steps": 8, "layers": "auto", "loss_fn": "<b>"},
}


def history_of(*c_t: float, about: dict[str, Any] | None = None) -> SpectrumHistory:
    """A run with these C_t, from before training on; NaN stands for a failure."""
    history = SpectrumHistory()
    history.about = about or {}
    for epoch, value in enumerate(c_t, start=-1):
        failed = value != value
        spectrum = None if failed else make_spectrum(value, lambda_max=3.0 + epoch, loss=1 / (epoch + 2))
        error = "RuntimeError: no <memory>" if failed else None
        history.append(SpectrumRecord(epoch, 4 * (epoch + 1), spectrum, error))
    return history


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run that has facts, a run that no Trainer wrote, and one without records yet."""
    history_of(-0.9, -0.3, -0.1, about=ABOUT).save(tmp_path / "net" / "version_0" / "hesd")
    history_of(-0.8, float("nan"), -0.2).save(tmp_path / "net" / "version_1" / "hesd")
    SpectrumHistory().save(tmp_path / "new" / "hesd")
    return tmp_path


def text_of(document: str, part: str) -> str:
    """Return the text of an element with this id, in one line."""
    found = re.search(rf'id="{part}">(.*?)</(?:header|footer)>', document, re.DOTALL)
    assert found is not None
    words = re.sub(r"</(sub|strong)>|<strong>", "", found[1].replace("<sub>", "_"))
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", words)).split())


def test_a_folder_of_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "out.html"
    main(["report", str(runs), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    document = out.read_text()
    shown = json.loads(data_of_report(document))["runs"]
    expected = [(f"net/version_{i}", i, runs / "net" / f"version_{i}") for i in (0, 1)]
    assert [(run["run"], run["color"], Path(run["folder"])) for run in shown] == expected
    said = text_of(document, "summary")
    assert said.startswith("HESD report 2 runs: net/version_0 and net/version_1. Report of ")
    assert f"Left out: the history in {runs / 'new'} has no records yet." in said
    main(["report", *(str(runs / name) for name in ("net/version_1", "net/version_0")), "--out", str(out)])
    shown = json.loads(data_of_report(out.read_text()))["runs"]
    assert [run["run"] for run in shown] == ["net/version_1", "net/version_0"]
    for wrong, message in (("new", "has no records yet"), ("nowhere", "no index.json")):
        with pytest.raises(SystemExit):
            main(["report", str(runs / wrong), "--out", str(out)])
        assert message in capsys.readouterr().err


def test_many_runs_have_a_row_each_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for version in range(11):
        about = {**ABOUT, "device": "cuda:0" if version == 3 else "cpu"}
        history_of(-0.9, -0.7 if version == 2 else -0.1, about=about).save(tmp_path / f"version_{version}" / "hesd")
    write_report(tmp_path, tmp_path / "report.html")
    document = (tmp_path / "report.html").read_text()
    said = text_of(document, "summary")
    assert said.startswith("HESD report 11 runs. Report of ")
    shown = json.loads(data_of_report(document))["runs"]
    assert [run["run"].split("/")[-1] for run in shown] == [f"version_{version}" for version in range(11)]
    rows = [row for row in re.findall(r"<tr>.*?</tr>", document) if "version_" in row and "epoch" in row]
    assert len(rows) == 11
    assert "<td>epoch 0</td><td>−0.7 [" in rows[2]
    assert "<td>MN</td><td>3" in rows[2]
    common, each = document.split("<summary>Facts of each run</summary>")[0:2]
    assert '<th scope="row">versions</th><td>lightning_hesd 0.1.0, torch 2.13.0</td>' in common  # once for all
    assert each.count("<td>cpu</td>") == 10


def test_the_summary_says_what_was_found_and_how_it_was_made(runs: Path) -> None:
    best = Candidate(1, 8, -1 / 3, -0.1, mainly_positive=True, path="/here/<best>.ckpt")
    event = SelectionEvent("highest_c_t", None, "min", CandidateFilter(0.5, require_mp=True), best, best)
    (runs / "net" / "version_0" / "hesd" / SELECTIONS_NAME).write_text(to_json(selection_payload(event)) + "\n")
    write_report(runs, runs / "out.html")
    document = (runs / "out.html").read_text()
    said = text_of(document, "summary")
    for words in (
        "3 analyses from the start to epoch 1.",
        "At epoch 1 C_t = −0.1 [−0.1, −0.1] (confidence 0.95): the spectrum is mainly positive (MP). λ_max = 4,",
        "At the start C_t = −0.9 and λ_max = 2.",
        "Highest C_t picks epoch 1 (step 8), where C_t = −0.1 and λ_max = 4. Checkpoint: /here/<best>.ckpt",
        "1 of them failed, the last with: RuntimeError: no <memory>",
        "Findings, the most important first:",
        "Highest C_t would pick epoch 1 (step 8), where C_t = −0.2 and λ_max = 4. No checkpoint was kept by this rule.",
        "30 November 2026, 09:58, to ",
        "unknown; files of ",
        "lightning_hesd 0.1.0, torch 2.13.0 unknown",
        "steps = 8 layers = auto loss_fn = <b> unknown",
        "samples 8 parameters 2 Lanczos steps 2",
    ):
        assert words in said, (words, said)
    assert "<memory>" not in document
    assert "<best>" not in document


def test_what_cannot_be_said_is_left_out() -> None:
    undefined = SpectrumRecord(0, 4, make_spectrum(float("nan")))
    assert sentences([undefined]) == ["1 analysis at epoch 0.", "At epoch 0 C_t is undefined: no curvature."]
    failed = SpectrumRecord(0, 4, None, "no memory")
    assert sentences([failed]) == ["1 analysis at epoch 0.", "1 of them failed, the last with: no memory"]
    doubtful = replace(make_spectrum(-0.5), verified="no", verification="they differ by 3 %")
    assert sentences([SpectrumRecord(0, 4, doubtful)])[1].endswith("Not verified: they differ by 3 %.")


def test_the_glossary_explains_the_words_of_the_report(runs: Path) -> None:
    write_report(runs, runs / "out.html")
    document = (runs / "out.html").read_text()
    said = text_of(document, "glossary")
    assert said == " ".join(["Glossary", *(f"{term} {words}" for term, words in GLOSSARY.items())])
    for word in ("HESD", "eigenvalue", "λ_max", "C_t", "MP", "Δr_e", "node", "verified", "finding", "start"):
        assert word in {term for terms in GLOSSARY for term in terms.split(", ")}, word
    # The referee of terms agrees.
    referee = (ROOT / "CONTRIBUTING.md").read_text()
    assert "| QS | quasi-singular: all eigenvalues have shrunk at unchanged accuracy |" in referee
    assert GLOSSARY["QS"].lower().startswith("quasi-singular: all eigenvalues have shrunk at unchanged accuracy.")


def test_facts_about_a_run_are_kept_with_its_history(tmp_path: Path) -> None:
    history = history_of(-0.1, about=ABOUT)
    history.save(tmp_path)
    read = SpectrumHistory.load(tmp_path)
    assert {**ABOUT, "written": read.about["written"]} == read.about
    index = json.loads((tmp_path / "index.json").read_text())
    for about in ({"options": [1]}, ABOUT):
        (tmp_path / "index.json").write_text(json.dumps({**index, "about": about}))
        assert SpectrumHistory.load(tmp_path).about.items() >= about.items()
        write_report(tmp_path, tmp_path / "out.html")
    (tmp_path / "index.json").write_text(json.dumps({**index, "about": "text"}))
    with pytest.raises(ValueError, match="about"):
        SpectrumHistory.load(tmp_path)


def test_the_callback_knows_its_options() -> None:
    def loss_fn(module: Any, batch: Any) -> Any:
        return module(batch)

    assert HessianSpectrumCallback().given == {"num_samples": 512}
    callback = HessianSpectrumCallback(2, steps=8, loss_fn=loss_fn, layers="auto", num_samples=64)
    numbers = {"every_n_epochs": 2, "layers": "auto", "num_samples": 64, "steps": 8}
    assert callback.given == {**numbers, "loss_fn": "test_the_callback_knows_its_options.<locals>.loss_fn"}
    given = HessianSpectrumCallback(epochs=range(99), tolerance=0.05).given
    assert given == {"num_samples": 512, "epochs": "<range>", "tolerance": 0.05}
