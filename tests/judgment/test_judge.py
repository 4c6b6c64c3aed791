"""The judge on histories: picks and what they were worth, the sentence, tables and files, and its command."""

import copy
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_hesd import Judgment, judge
from lightning_hesd.commands.cli import main
from lightning_hesd.judgment.judge import judge_payloads
from lightning_hesd.judgment.metric import NumberFormat
from lightning_hesd.judgment.statistics import runs_needed
from lightning_hesd.spectra.payload import record_payload
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.rules import RULES, CheckpointRule
from tests.judgment.simulated import assert_same, history, record
from tests.spectra.nodes import spectrum
from tests.states import history_of
from tests.training.scripted import Epoch

TWO = ["highest_c_t", "lowest_max_eigenvalue"]


def runs(count: int, effect: float = 0.0, seed: int = 0) -> list[list[SpectrumRecord]]:
    generator = np.random.default_rng(seed)
    return [history(generator, effect=effect) for _ in range(count)]


def epochs(judgment: Judgment, run: int = 0) -> dict[str, int | None]:
    return {name: pick.epoch for name, pick in judgment.runs[run].picks.items()}


def row(judgment: Judgment, name: str) -> dict[str, Any]:
    [found] = [row for row in judgment.rows if row["name"] == name]
    return found


# False alarms and power -----------------------------------------------------------------------------------------------


def claims(seed: int, effect: float) -> list[str]:
    """Return what is evident of the two rules, over the last epoch."""
    found = judge(runs(12, effect, seed), "val_acc", rules=TWO)
    return [row(found, rule)["evidently_over_last"] for rule in TWO]


def test_a_planted_effect_is_found_and_none_is_claimed_without_one() -> None:
    for seed in range(20, 25):
        assert claims(seed, effect=0.04)[0] == "better"
        assert not any(claims(seed, effect=0.0))


# Picks ----------------------------------------------------------------------------------------------------------------

RUN = [
    record(-1, c_t=-0.01, lambda_max=0.1, loss=2.0, val_acc=0.99, val_loss=0.01, test_acc=0.99),
    record(0, c_t=-0.02, lambda_max=0.5, loss=1.0, val_acc=0.5, val_loss=0.9, test_acc=0.4),
    record(1, c_t=-0.2, lambda_max=2.0, loss=0.09, val_acc=0.7, val_loss=0.5, test_acc=0.6),
    record(2, c_t=-0.1, lambda_max=4.0, loss=0.08, val_acc=0.8, val_loss=0.4, test_acc=0.7),
    record(3, c_t=-0.1, lambda_max=2.0, loss=0.02, val_acc=0.6, val_loss=0.6, test_acc=0.9),
    record(4, c_t=-0.8, lambda_max=1.0, loss=0.01, val_acc=0.65, val_loss=0.7, test_acc=0.5),
]


def test_picks_among_candidates_near_the_lowest_loss() -> None:
    found = judge([RUN], "val_acc")  # within 0.0995 of 0.01, and MP: epochs 1 to 3
    assert epochs(found) == {
        "highest_c_t": 2,  # and 3: the earliest if several are equal
        "lowest_max_eigenvalue": 1,
        "last": 4,
        "lowest_train_loss": 4,
        "lowest_validation_loss": 2,
        "random_candidate": None,
        "best_possible": 2,
    } | {name: epoch for name, epoch in epochs(found).items() if name in RULES and name not in TWO}
    picks = found.runs[0].picks
    assert picks["random_candidate"].value == pytest.approx((0.7 + 0.8 + 0.6) / 3)
    assert picks["highest_c_t"].value == 0.8
    assert row(found, "highest_c_t")["gain_over_last"] == pytest.approx(0.15)
    assert row(found, "lowest_max_eigenvalue")["regret"] == pytest.approx(0.1)
    assert row(found, "best_possible")["gain_over_lowest_validation_loss"] == 0


def test_picks_among_all_and_within_a_number() -> None:
    for candidates, epoch, count in (("all", 0, 5), (0.02, 3, 1)):
        found = judge([RUN], "val_acc", candidates=candidates)
        assert {epochs(found)[name] for name in TWO} == {epoch}
        assert found.runs[0].candidates == count
    # Without MP candidates the lowest loss decides, and a note says so.
    found = judge([RUN], "val_acc", candidates=0.0)
    assert {epochs(found)[name] for name in TWO} == {4}
    assert "Candidates of the rules: MP, and a loss near the lowest; 1 epoch per run." in found.notes
    assert "In 1 of 1 runs no candidate is MP: there all rules pick the lowest loss." in found.notes


def test_a_metric_to_minimize_and_baselines_by_other_metrics() -> None:
    found = judge([RUN], "val_loss", val_metric="test_acc")
    assert found.metric.mode == "min"
    assert (epochs(found)["best_possible"], epochs(found)["best_validation_metric"]) == (2, 3)
    assert found.titles["best_validation_metric"] == "best test_acc"
    assert row(found, "highest_c_t")["gain_over_last"] == pytest.approx(0.3)
    assert epochs(judge([RUN], "val_loss", mode="max"))["best_possible"] == 0
    # The validation loss is the usual one, or the one given.
    given = judge([RUN], "val_acc", val_loss="test_acc")
    assert epochs(given)["lowest_validation_loss"] == 0
    unusual = [record(epoch, loss=0.1, acc=0.5, loss_on_others=1.0 - epoch) for epoch in range(3)]
    assert "lowest_validation_loss" not in judge([unusual], "acc").titles
    assert epochs(judge([unusual], "acc", val_loss="loss_on_others"))["lowest_validation_loss"] == 2


def test_only_records_with_the_metric_are_picked_and_failed_analyses_by_baselines_only() -> None:
    partial = [record(r.epoch, r.spectrum.c_t, 1.0, r.spectrum.loss, **dict(r.metrics)) for r in RUN if r.spectrum]
    partial[3] = record(2, c_t=-0.1, loss=0.08, val_loss=0.4)
    partial[4] = record(3, c_t=-0.1, loss=0.02, val_acc=math.inf)
    found = judge([partial], "val_acc")
    assert epochs(found)["highest_c_t"] == epochs(found)["lowest_validation_loss"] == 1
    assert "2 of 5 analyses lack the metric, and are not picked." in found.notes
    failed = SpectrumRecord(5, 60, None, "RuntimeError", metrics={"val_acc": 0.9})
    found = judge([[*RUN, failed]], "val_acc")
    assert epochs(found)["last"] == epochs(found)["best_possible"] == 5
    assert epochs(found)["highest_c_t"] == 2


def test_a_rule_in_the_registry_is_compared_and_one_without_what_it_needs_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worst = CheckpointRule("highest_loss", "highest loss", "loss", lambda spectrum: spectrum.loss)
    needy = CheckpointRule("needy", "needy rule", "needy", lambda ggn: ggn.trace, needs=("ggn",))
    for rule in (worst, needy):
        monkeypatch.setitem(RULES, rule.name, rule)
    found = judge([RUN], "val_acc")
    assert epochs(found)["highest_loss"] == 1
    assert "needy" not in found.titles
    [note] = [note for note in found.notes if note.startswith("Without a pick")]
    assert "needy rule" in note
    assert set(judge([RUN], "val_acc", rules=["highest_loss"]).rules) == {"highest_loss"}


# The sentence ---------------------------------------------------------------------------------------------------------


def test_few_runs_claim_nothing_and_say_how_many_are_needed() -> None:
    found = judge(runs(1, effect=0.05), "val_acc")
    assert found.sentence.startswith(
        "One run cannot tell a rule from the last epoch: at least 6 runs are needed (level 5%). Here "
    )
    assert not any(row["evidently_over_last"] for row in found.rows)
    assert "val_acc: picks of the run run 1; differences in points" in str(found)
    assert "interval" not in str(found)
    found = judge(runs(5, effect=0.5), "val_acc", level=0.01)
    needed = runs_needed(0.01)
    assert found.sentence.startswith(f"5 runs are too few to tell a rule from the last epoch: at least {needed} runs")
    assert not any(row["evidently_over_last"] for row in found.rows)


def test_one_run_names_the_rivals_of_its_picks() -> None:
    """Neighbors have independent errors, the first and the third epoch the same: see `Epoch`."""
    script = [Epoch(c_t, scatter=0.05) for c_t in (-0.30, -0.20, -0.12)]
    records = [
        SpectrumRecord(place, 10 * place + 10, epoch.spectrum(place), metrics={"val_acc": 0.5})
        for place, epoch in enumerate(script)
    ]
    found = judge(records, "val_acc")
    assert found.runs[0].rivals["highest_c_t"] == [1]
    assert "Within two standard errors of the pick of highest C_t: epochs 1." in found.notes
    assert judge([records, copy.deepcopy(records)], "val_acc").notes == found.notes[:1] + found.notes[-1:]


def test_no_evidence_and_evidence_for_and_against() -> None:
    found = judge(runs(12, effect=0.005), "val_acc", rules=TWO)
    best, other = sorted((row(found, name) for name in TWO), key=lambda r: -r["gain_over_last"])
    gain, low, high = (100 * best[f"{key}_over_last"] for key in ("gain", "low", "high"))
    assert low < 0 < gain < high
    assert gain > 100 * other["gain_over_last"]
    assert found.sentence == (
        f"Over 12 runs no rule is evidently better than the last epoch; the largest gain, {best['title']}, is "
        f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]."
    )
    better = judge(runs(12, effect=0.05), "val_acc", rules=TWO).sentence
    assert better.startswith("Over 12 runs highest C_t (+5.")
    assert " is evidently better than the last epoch." in better
    worse = judge(runs(12, effect=0.05), "val_acc", mode="min", rules=TWO).sentence
    assert " no rule is evidently better than the last epoch; the " in worse
    assert " Evidently worse is highest C_t (-5." in worse
    worst = [[record(0, -0.1, 1.0, val_acc=0.5 + 0.01 * size), record(1, -0.2, 1.0, val_acc=0.8)] for size in range(7)]
    assert judge(worst, "val_acc", rules=TWO).sentence.startswith(
        "Over 7 runs no rule is evidently better than the last epoch; the best of them, highest C_t, is at -27.0 points"
    )


def test_sentences_where_rules_hardly_differ_or_have_no_picks() -> None:
    same = [[record(epoch, val_acc=0.5) for epoch in range(3)] for _ in range(7)]
    assert judge(same, "val_acc").sentence == "Over 7 runs the pick of every rule is exactly as good as the last epoch."
    pair = [record(0, -0.1, val_acc=0.6), record(1, -0.2, val_acc=0.5)]
    same = [[record(0, -0.2, val_acc=0.6), record(1, -0.1, val_acc=0.5)] for _ in range(6)]
    assert judge([pair, *same], "val_acc", rules=["highest_c_t"]).sentence == (
        "Over 7 runs no rule is evidently better than the last epoch; the largest gain, highest C_t, is +1.4 points "
        "(from 1 of 7 runs, too few for an interval)."
    )
    failed = [SpectrumRecord(epoch, epoch + 1, None, "no memory", metrics={"val_acc": 0.5}) for epoch in range(2)]
    found = judge([failed], "val_acc")
    assert found.sentence == "No rule can be compared with the last epoch: no run has a pick of both."
    assert epochs(found) == {"last": 1, "best_possible": 0}


def test_a_run_that_is_given_twice_counts_once() -> None:
    once, other = runs(2)
    notes = judge([once, other, list(once), once], "val_acc").notes
    assert "Left out, as they repeat an earlier run: run 3, run 4." in notes
    found = judge([once] * 8, "val_acc")
    assert len(found.runs) == 1
    assert "run 2, run 3, run 4 and 4 more" in found.notes[0]
    assert [run.run for run in judge({"a": once, "b": once, "c": other}, "val_acc").runs] == ["a", "c"]


def test_what_is_no_run_is_refused_with_what_was_expected() -> None:
    assert len(judge((run for run in runs(2)), "val_acc").runs) == 2
    for wrong in (None, 3, [3], [None, RUN], [["run"]], {"a": 1.0}):
        with pytest.raises(TypeError, match=r"`histories` must be runs: .* or log directories.*; got "):
            judge(wrong, "val_acc")  # type: ignore[arg-type]


def test_points_only_where_they_are_unambiguous() -> None:
    assert " points" in judge(runs(7), "val_acc").sentence
    percent = [[record(r.epoch, loss=0.1, val_acc=100 * r.metrics["val_acc"]) for r in run[1:]] for run in runs(7)]
    assert " points" not in str(judge(percent, "val_acc"))
    assert " points" not in str(judge(runs(7), "val_loss"))  # also within [0, 1]


def test_neither_an_interval_nor_a_difference_is_rounded_to_zero() -> None:
    numbers = NumberFormat.of([0.012, 0.0], is_share=True)
    assert numbers.interval(0.0001, 0.023) == "[+0.01, +2.30]"
    assert numbers.interval(-0.0001, 0.023) == "[0.0, +2.3]"
    assert numbers.interval(-0.0234, -0.000012) == "[-2.340, -0.001]"
    form = NumberFormat(100.0, 1, " points")
    shown = {0.0003: "+0.03", -0.00002: "-0.002", 0.0: "0.0", 1e-12: "0.0", 0.012: "+1.2"}
    assert {value: form.difference(value) for value in shown} == shown


def test_other_baselines_are_compared_too() -> None:
    found = judge(runs(12, effect=0.05), "val_acc", rules=TWO)
    assert any(remark.startswith("The lowest validation loss is evidently better") for remark in found.remarks)
    assert any(" than the lowest validation loss" in remark for remark in found.remarks)
    note = "The validation loss and val_acc seem to be of the same data, which favors picks by that loss."
    assert note in found.notes
    assert not any("of the same data" in note for note in judge([RUN], "test_acc").notes)


# Tables, files and the figure -----------------------------------------------------------------------------------------


def test_tables_fit_a_terminal_and_have_all_numbers() -> None:
    found = judge(runs(12), "val_acc", rules=TWO)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    for title in found.titles.values():
        assert text.count(title) >= len(found.comparisons)
    assert text.endswith("points [-0.8, +1.5].") or found.sentence.split()[-1] in text
    markdown = found.markdown()
    assert markdown.startswith(f"**{found.sentence}**\n\nval_acc: gain over the last epoch")
    assert markdown.count("\n| highest C_t |") == 2


def test_the_table_is_that_of_pandas_without_which_all_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    found = judge(runs(7), "val_acc")
    assert isinstance(found.table, pandas.DataFrame)
    assert found.table["name"].tolist() == list(found.titles)
    assert found.table["mean"].tolist() == [np.nanmean(values) for values in found.values.values()]
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert found.rows
    with pytest.raises(ImportError, match="needs pandas, which is not installed: pip install pandas"):
        _ = found.table


def test_csv_and_json_are_complete(tmp_path: Path) -> None:
    found = judge(runs(7), "val_acc")
    found.to_csv(tmp_path / "new" / "judge.csv")
    found.to_json(tmp_path / "judge.json")
    with (tmp_path / "new" / "judge.csv").open() as file:
        lines = list(csv.DictReader(file))
    data = json.loads((tmp_path / "judge.json").read_text())
    assert [line["name"] for line in lines] == [line["name"] for line in data["table"]] == list(found.titles)
    for line, ours in zip(lines, found.rows, strict=True):
        assert float(line["mean"]) == ours["mean"]
        assert line["p_value_over_last"] == ("" if math.isnan(p := ours["p_value_over_last"]) else str(p))
    assert data["sentence"] == found.sentence
    last = found.runs[3].picks["last"]
    assert data["runs"][3]["picks"]["last"] == {"epoch": 5, "global_step": 60, "value": last.value}


def test_the_figure_has_a_row_for_each_choice() -> None:
    found = judge(runs(12, effect=0.05), "val_acc", rules=TWO)
    ax = found.plot()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:2] == ["highest $C_t$", r"lowest $\lambda_{\max}$"]
    assert labels[2:] == ["lowest training loss", "lowest validation loss", "random candidate"]
    assert ax.get_xlabel() == "gain in val_acc (points) over the last epoch\n(bars: 95% intervals; marks: runs)"
    with pytest.raises(ValueError, match="there is no comparison with 'best_possible'"):
        found.plot(against="best_possible")
    assert found.plot(ax, "lowest_validation_loss") is ax


def test_the_small_table_of_the_tab() -> None:
    found = judge(runs(7, effect=0.05), "val_acc", rules=TWO)
    title, header, lines = found.to_dict()["summary"].values()
    assert title == "val_acc: picks of 7 runs; differences in points"
    assert header == ["", "mean val_acc", "gain over last", "95% interval", "regret"]
    numbers = row(found, "highest_c_t")
    keys = ("gain_over_last", "low_over_last", "high_over_last", "regret")
    gain, low, high, regret = (100 * numbers[key] for key in keys)
    cells = (f"{numbers['mean']:.4g}", f"{gain:+.1f}", f"[{low:+.1f}, {high:+.1f}]", f"{regret:.1f}")
    assert lines[0] == ["highest C_t", *cells]
    assert [line[0] if line else "" for line in lines[2:5]] == ["", "last epoch", "lowest training loss"]
    one = judge(runs(1), "val_acc", rules=TWO).to_dict()["summary"]
    assert one["header"] == ["", "epoch", "step", "val_acc", "over last", "over val loss", "regret"]
    assert one["rows"][0][0] == "highest C_t"


# Where runs and metrics come from -------------------------------------------------------------------------------------


def saved(folder: Path, records: list[SpectrumRecord]) -> None:
    """Save records without metrics, as of a module that logs none."""
    history_of(*(SpectrumRecord(r.epoch, r.global_step, r.spectrum) for r in records)).save(folder / "hesd")


def metrics_file(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_runs_without_metrics_say_what_to_do_and_an_unknown_metric_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no index.json"):
        judge(tmp_path, "val_acc")
    saved(tmp_path, RUN)
    with pytest.raises(ValueError, match=r"no metrics: either they were made before .* CSV file: `metrics` in Python"):
        judge(tmp_path, "val_acc")
    known = "no record of these runs has the metric 'acc': they have test_acc, val_acc, val_loss"
    with pytest.raises(ValueError, match=known):
        judge([RUN], "acc")
    with pytest.raises(ValueError, match="`val_loss`: no record of these runs has the metric 'loss'"):
        judge([RUN], "val_acc", val_loss="loss")


def test_metrics_from_a_file_for_runs_in_folders(tmp_path: Path) -> None:
    for seed in (0, 1):
        saved(tmp_path / f"seed={seed}" / "version_0", RUN)
    lines = ["run,epoch,test_acc", "seed=0/version_0,1,0.5", "seed=0/version_0,4,0.25", "seed=1/version_0,4,0.75"]
    others = ["seed=2/version_0,4,0.1", "seed=1/version_0,9,0.1", "seed=1/version_0,3,"]
    path = metrics_file(tmp_path / "test.csv", [*lines, *others])
    found = judge(tmp_path, "test_acc", metrics=path)
    assert [run.run for run in found.runs] == ["seed=0/version_0", "seed=1/version_0"]
    assert found.runs[0].picks["last"].value == 0.25
    assert epochs(found)["best_possible"] == epochs(found)["highest_c_t"] == 1
    assert epochs(found, 1)["last"] == 4
    assert "2 rows of the file belong to no analyzed checkpoint." in found.notes
    one = judge(tmp_path / "seed=1", "test_acc", metrics=path)
    assert [run.run for run in one.runs] == ["seed=1/version_0"]
    folders = [tmp_path / "seed=0" / "version_0", tmp_path / "seed=1/version_0/hesd", tmp_path / "seed=0"]
    again = judge(folders, "test_acc", metrics=path)  # one is given twice
    assert again.to_dict() == found.to_dict()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["run,epoch,acc", "a,1,0.5"], "has no column 'test_acc': it has run, epoch, acc"),
        (["epoch,test_acc", "1,0.5"], "has no column 'run': it has epoch, test_acc"),
        (["run,test_acc", "a,0.5"], "has no column 'epoch'"),
        (["run,epoch,test_acc", "a,1,high"], "line 2: 'high' is no number"),
        (["run,epoch,test_acc", "a,1,0.5", "a,1,0.6"], "line 3: the run a has a value at this epoch already"),
        (["run,epoch,test_acc", "c,1,0.5"], r"no row of .* has a value for an analyzed .* these runs \(a, b\)"),
        (["run,epoch,test_acc", "a,1,nan"], "no row of"),
        *((["run,epoch,test_acc", f"a,{x},0.5"], f"line 2: '{x}' is no whole number") for x in ("", "1.5", "inf")),
        (["run,epoch,test_acc", "a,1,0,5"], "line 2 has more cells than columns"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, lines: list[str], message: str) -> None:
    path = metrics_file(tmp_path / "test.csv", lines)
    with pytest.raises(ValueError, match=message):
        judge({"a": RUN, "b": copy.deepcopy(RUN)}, "test_acc", metrics=path)


def test_a_file_that_is_no_text_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    for content in ("epoch,test_acc\n1,0.5\n".encode("utf-16"), b"epoch,test_acc\n1," + 200_000 * b"5"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"test.csv cannot be read \(.*\): it must be text in UTF-8, with commas"):
            judge(RUN, "test_acc", metrics=path)


def test_payloads_are_judged_as_records_are() -> None:
    histories = {f"seed={seed}": run for seed, run in enumerate(runs(7, effect=0.05))}
    histories["none"] = [record(0)]
    expected = judge(histories, "val_acc").to_dict()
    found = judge_payloads({name: [record_payload(r) for r in run] for name, run in histories.items()}, "val_acc")
    assert_same(found.to_dict(), expected)
    assert "Left out, without the metric: none." in found.notes


def test_a_rule_and_a_baseline_that_never_pick_in_the_same_run_and_values_that_overflow() -> None:
    """In half of the runs all analyses failed, and the others have no validation loss."""
    failed = [SpectrumRecord(n, n + 1, None, "no memory", metrics={"val_acc": 0.5, "val_loss": 1.0}) for n in range(2)]
    found = judge([[record(0, val_acc=0.5), record(1, val_acc=0.6)], failed], "val_acc")
    of_rule = row(found, "highest_c_t")
    assert math.isfinite(of_rule["gain_over_last"])
    assert math.isnan(of_rule["gain_over_lowest_validation_loss"])
    # Values of which sums would overflow count as infinite.
    wild = [
        [record(0, -0.1, val_acc=1e308), record(1, -0.2, val_acc=-1e308), record(2, -0.3, val_acc=0.5)]
        for _ in range(7)
    ]
    found = judge(wild, "val_acc")
    assert epochs(found)["highest_c_t"] == 2
    assert "14 of 21 analyses lack the metric, and are not picked." in found.notes


def test_steps_tell_records_of_an_epoch_apart(tmp_path: Path) -> None:
    twice = [SpectrumRecord(0, step, spectrum(-0.1, 1.0, loss=0.1)) for step in (5, 10)]
    by_epoch = metrics_file(tmp_path / "epoch.csv", ["epoch,acc", "0,0.5"])
    with pytest.raises(ValueError, match=r"epoch 0 of the run run 1 has 2 records\. Give the column 'global_step'"):
        judge(twice, "acc", metrics=by_epoch)
    by_step = metrics_file(tmp_path / "step.csv", ["epoch,global_step,acc", "0,10,0.5"])
    assert judge(twice, "acc", metrics=by_step).runs[0].picks["last"].global_step == 10


@pytest.mark.parametrize(
    ("histories", "options", "message"),
    [
        ([RUN], {"candidates": "some"}, "`candidates` must be 'near', 'all' or a tolerance of the loss, got 'some'"),
        ([RUN], {"candidates": -0.1}, "at least 0"),
        ([RUN], {"mode": "up"}, "`mode` must be 'max' or 'min', got 'up'"),
        ([RUN], {"rules": ["best"]}, "`rules` must be names of rules, got 'best': there are highest_c_t, "),
        ([RUN], {"level": 1}, "`level` must be between 0 and 0.5, got 1"),
        ([], {}, "there are no runs to judge"),
        ([RUN[:1]], {}, "there are no trained weights to judge"),
    ],
)
def test_bad_arguments(histories: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(histories, "val_acc", **options)


def test_the_command_prints_the_judgment_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, records in enumerate(runs(7)):
        saved(tmp_path / f"seed={seed}", records)
    lines = [f"seed={s},{r.epoch},{r.metrics['val_acc']}" for s, run in enumerate(runs(7)) for r in run[1:]]
    path = metrics_file(tmp_path / "test.csv", ["run,epoch,test_acc", *lines])
    files = {kind: tmp_path / "out" / f"judge.{kind}" for kind in ("csv", "json", "markdown")}
    figure = tmp_path / "out" / "judge.svg"
    options = ["--metric", "test_acc", "--mode=max", "--candidates", "0.5", "--metrics-csv", str(path)]
    outputs = [*(f"--{kind}={file}" for kind, file in files.items()), f"--figure={figure}"]
    main(["judge", *(str(tmp_path / f"seed={seed}") for seed in range(7)), *options, *outputs])
    found = judge(tmp_path, "test_acc", metrics=path, candidates=0.5)
    assert capsys.readouterr().out == f"{found}\n"
    assert json.loads(files["json"].read_text()) == found.to_dict()
    assert files["markdown"].read_text() == found.markdown()
    assert files["csv"].read_text().count("\n") == 1 + len(found.rows)
    assert "<svg" in figure.read_text()
