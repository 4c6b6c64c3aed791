"""The HESD tab's backend: payloads of a real training, read through TensorBoard's data provider."""

import copy
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.plugins.base_plugin import TBContext
from torch.nn.functional import cross_entropy

from lightning_hesd import Spectrum, judge
from lightning_hesd.commands.report import report, run_data
from lightning_hesd.spectra.decisions import decisions, rewound, run_payload
from lightning_hesd.spectra.distribution import Distribution
from lightning_hesd.spectra.layer_curvature import LayerCurvature
from lightning_hesd.spectra.payload import MAX_NODES, MAX_POINTS, SELECTIONS_NAME, record_payload, to_json
from lightning_hesd.spectra.payload_reading import PayloadError, read_payload
from lightning_hesd.tensorboard_plugin.assets import SHARED, STATIC, content
from lightning_hesd.tensorboard_plugin.plugin import HESDLoader, HESDPlugin
from lightning_hesd.training.history import SpectrumRecord
from tests.judgment.simulated import assert_same, history
from tests.judgment.simulated import record as simulated_record
from tests.spectra.nodes import spectrum as spectrum_of
from tests.states import history_of
from tests.tab import EPOCHS, Tab, data_of_report, train, write_payloads
from tests.training.broken import out_of_luck
from tests.training.scripted import make_spectrum

RUN = {"run": "net/version_0", "name": "hesd"}


def payload(epoch: int = 0, c_t: float = -0.1, **spectrum: Any) -> dict[str, Any]:
    return record_payload(SpectrumRecord(epoch, 10 * (epoch + 1), make_spectrum(c_t, **spectrum)))


def shown(spectrum: Spectrum) -> dict[str, Any]:
    """Return what a payload has of a spectrum."""
    found: dict[str, Any] = record_payload(SpectrumRecord(0, 1, spectrum))["spectra"]["spectrum"]
    return found


def assert_refused(payload: dict[str, Any], message: str, **damages: Any) -> None:
    """Check that a payload with other values in its spectrum is refused."""
    damaged = copy.deepcopy(payload)
    damaged["spectra"]["spectrum"] |= damages
    with pytest.raises(PayloadError, match=message):
        read_payload(to_json(damaged))


# Reading what a training wrote --------------------------------------------------------------------------------------


def test_records_of_a_training(trained: tuple[Path, Any]) -> None:
    folder, callback = trained
    tab = Tab(folder)
    (run,) = tab.get("runs")[1]["runs"]
    assert (run["run"], run["color"], list(run["names"])) == ("net/version_0", 0, ["hesd"])
    code, found = tab.get("records", **RUN)
    assert code == 200
    assert found["problems"] == []
    assert [r["epoch"] for r in found["records"]] == [-1, *range(EPOCHS)]
    for read, record in zip(found["records"], callback.history, strict=True):
        assert read["global_step"] == record.global_step
        for field, spectrum in (("spectrum", record.spectrum), ("generalization", record.generalization)):
            shown = read["spectra"][field]
            for key in ("c_t", "lambda_min", "lambda_max", "loss", "trace"):
                assert shown[key] == pytest.approx(getattr(spectrum, key), rel=1e-6), key
            assert (shown["c_t_low"], shown["c_t_high"]) == pytest.approx(spectrum.c_t_interval, rel=1e-6)
            assert shown["nodes"] == pytest.approx(spectrum.nodes[0], rel=1e-6)
            assert sum(shown["weights"]) == pytest.approx(1.0, abs=1e-6)
            assert shown["type"] == spectrum.hesd_type
        assert read["assessment"]["verdict"] == record.assessment.verdict
        assert read["layers"]["name"] == list(record.layers)
    times = found["wall_times"]
    assert len(times) == len(found["records"])
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 3600  # seconds since 1970
    # In brief, records lack what the charts of many runs do not draw; their numbers stay.
    brief = tab.get("records", **RUN, brief="1")[1]
    assert {**brief, "records": []} == {**found, "records": []}
    for short, whole in zip(brief["records"], found["records"], strict=True):
        spectrum = whole["spectra"]["spectrum"]
        left_out = {"nodes", "weights", "left", "right", "cumulative_band", "losses_along"}
        assert short["spectra"]["spectrum"] == {k: v for k, v in spectrum.items() if k not in left_out}
        assert short["layers"] == {"name": []}
        assert short["scores"] == whole["scores"]
    assert brief["records"][-1]["findings"] == found["records"][-1]["findings"]
    assert len(to_json(found["records"][-1])) < 9000  # two spectra of 8 nodes, two layers, the assessment


def test_failed_analyses_are_in_the_event_file(tmp_path: Path) -> None:
    """With their message and the metrics of their weights, as in the folder of the history."""

    def sometimes(module: Any, batch: Any) -> Any:
        if module.current_epoch == 1:
            return out_of_luck(module, batch)
        return cross_entropy(module.net(batch[0]), batch[1])

    with pytest.warns(RuntimeWarning, match="the analysis of epoch 1 failed, training goes on. OSError: no luck"):
        log_dir, callback = train(tmp_path, loss_fn=sometimes)
    assert [record.error for record in callback.history] == [None, "OSError: no luck", None]
    found = Tab(tmp_path).get("records", **RUN)[1]
    assert found["problems"] == []
    assert [record["error"] for record in found["records"]] == [None, "OSError: no luck", None]
    assert [list(record["spectra"]) for record in found["records"]] == [["spectrum"], [], ["spectrum"]]
    assert found["records"][1]["metrics"].keys() == {"train_acc", "val_acc"}
    told = [{**record, "findings": []} for record in found["records"]]  # a report has those of the last record only
    assert told == [{**record, "findings": []} for record in json.loads(json.dumps(run_data(log_dir)["records"]))]


def test_the_pick_is_that_of_the_checkpoint_callback_and_the_report_agrees(trained: tuple[Path, Any]) -> None:
    folder, callback = trained
    tab = Tab(folder).get("records", **RUN)[1]
    by_c_t, by_lambda_max = tab["rules"]
    best = callback.checkpoint.best
    assert by_c_t["pick"] == {"epoch": best.epoch, "global_step": best.global_step, "path": best.path}
    assert Path(by_c_t["pick"]["path"]).is_file()
    assert (by_c_t["metric"], by_c_t["tolerance"], by_c_t["used"]) == ("train_acc", 0.2, True)
    assert best.global_step in by_c_t["candidates"]
    assert [m["global_step"] for m in by_c_t["metrics"]] == [4 * epoch for epoch in range(1, EPOCHS + 1)]
    assert all(0 <= m["value"] <= 1 for m in by_c_t["metrics"])
    # No callback has this rule: the tab computes what it would take by the losses.
    assert (by_lambda_max["rule"], by_lambda_max["used"]) == ("lowest_max_eigenvalue", False)
    spectra = {r.global_step: r.spectrum for r in callback.history if r.global_step > 0}
    least = min(s.loss for s in spectra.values())
    near = {step: s for step, s in spectra.items() if s.loss <= least + 0.05 and s.hesd_type == "MP"}
    assert by_lambda_max["candidates"] == list(near)
    assert by_lambda_max["pick"]["global_step"] == min(near, key=lambda step: near[step].lambda_max)
    assert by_lambda_max["pick"]["path"] is None
    ours = json.loads(json.dumps(run_data(folder / "net" / "version_0")))
    for key in ("records", "rules", "problems"):
        assert ours[key] == tab[key], key


def test_records_appear_while_training_writes(tmp_path: Path) -> None:
    write_payloads(tmp_path / "run", [payload(0)])
    tab = Tab(tmp_path)
    before = tab.get("runs")[1]
    assert len(tab.get("records", run="run", name="hesd")[1]["records"]) == 1
    write_payloads(tmp_path / "run" / "more", [payload(0), payload(1)])
    (first,) = (tmp_path / "run").glob("events*")
    (file,) = (tmp_path / "run" / "more").glob("events*")
    file.rename(first.with_name(f"{first.name}.2"))  # behind it in the order of names, in which TensorBoard reads them
    tab.reload()
    assert tab.get("runs")[1] != before  # by which the frontend knows that it must ask again
    epochs = [r["epoch"] for r in tab.get("records", run="run", name="hesd")[1]["records"]]
    assert epochs == [0, 1]  # the first epoch was made anew


# The judge ------------------------------------------------------------------------------------------------------------

EVIL = "</script>../%2e%2e<b>"
SIMULATED = [f"seed={seed}" for seed in range(7)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[SpectrumRecord]]]:
    """A folder of runs with validation metrics, one with a hostile name, and their records."""
    folder = tmp_path_factory.mktemp("judged")
    generator = np.random.default_rng(0)
    histories = {run: history(generator, effect=0.05) for run in (*SIMULATED, EVIL)}
    for run, records in histories.items():
        write_payloads(folder / run, [record_payload(record) for record in records])
    return folder, histories


def ask(tab: Tab, runs: list[str], **query: Any) -> tuple[int, Any]:
    return tab.get("judgment", **{"run": runs, "name": ["hesd"] * len(runs), "metric": "val_acc", **query})


def test_the_judgment_is_that_of_the_histories(judged: tuple[Path, dict[str, list[SpectrumRecord]]]) -> None:
    folder, histories = judged
    tab = Tab(folder)
    asked = [(SIMULATED, "val_acc"), (SIMULATED, "val_loss"), (SIMULATED[:1], "val_acc"), ([EVIL], "val_acc")]
    for runs, metric in asked:
        code, found = ask(tab, runs, metric=metric)
        assert code == 200
        assert_same(found, judge({run: histories[run] for run in runs}, metric).to_dict())
    assert "evidently better" in ask(tab, SIMULATED)[1]["sentence"]


def test_errors_of_judgments_are_said(judged: tuple[Path, dict[str, list[SpectrumRecord]]], tmp_path: Path) -> None:
    tab = Tab(judged[0])
    for runs, query, code, message in (
        (["seed=0"], {"metric": ""}, 400, "the argument `metric` is missing"),
        ([], {}, 400, "each `run` needs a `name`, got 0 runs and 0 names"),
        (["seed=0", "seed=1"], {"name": "hesd"}, 400, "got 2 runs and 1 names"),
        (["seed=0", "seed=0"], {}, 400, "a `run` is given twice"),
        (["seed=0", "../../etc/passwd"], {}, 404, "no run '../../etc/passwd'"),
        (["seed=0"], {"name": "../hesd"}, 404, "no records of a callback named '../hesd'"),
        (["seed=0"], {"metric": "<b>"}, 400, "has the metric '<b>': they have val_acc, val_loss."),
    ):
        found, body = ask(tab, runs, **query)
        assert (found, message in body["error"]) == (code, True), body
    assert tab.client.post("/data/plugin/hesd/judgment").status_code == 405
    write_payloads(tmp_path / "old", [payload(0), payload(1)])
    code, body = ask(Tab(tmp_path), ["old"])
    assert (code, "the records of these runs have no metrics" in body["error"]) == (400, True)


def test_payloads_of_any_numbers_are_judged_without_a_failure(tmp_path: Path) -> None:
    scores = enumerate((1e308, -1e308, 1e308))
    wild = [record_payload(simulated_record(epoch, val_acc=score, val_loss=1e-308)) for epoch, score in scores]
    write_payloads(tmp_path / "wild", wild)
    write_payloads(tmp_path / "bare", [{**one, "scores": {}, "metrics": {"val_loss": 1e99}} for one in wild])
    write_payloads(tmp_path / "null", [{**one, "metrics": {"val_acc": None}} for one in wild])
    tab = Tab(tmp_path)
    for runs in (["wild"], ["bare"], ["null"], ["wild", "bare", "null"]):
        for metric in ("val_acc", "val_loss"):
            code, body = ask(tab, runs, metric=metric)
            assert (code, bool(body.get("sentence"))) in {(200, True), (400, False)}, body


def test_the_report_has_the_judgments_of_all_metrics(
    judged: tuple[Path, dict[str, list[SpectrumRecord]]], trained: tuple[Path, Any]
) -> None:
    _, histories = judged
    for run in ("seed=0", EVIL):
        records = [record_payload(record) for record in histories[run]]
        shown = json.loads(data_of_report(report(run_payload(run, "hesd", records, [], []))))
        assert list(shown["judgments"]) == ["val_acc", "val_loss"]
        for metric, found in shown["judgments"].items():
            assert_same(found, judge({run: histories[run]}, metric).to_dict())
    of_training = json.loads(data_of_report(report(run_data(trained[0] / "net" / "version_0"))))
    assert {"train_acc", "val_acc"} <= set(of_training["judgments"])
    start = record_payload(simulated_record(-1, val_acc=0.5))
    only_start = json.loads(data_of_report(report(run_payload("run", "hesd", [start], [], []))))
    assert "before the first step only" in only_start["judgments"]["val_acc"]["error"]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong(trained: tuple[Path, Any], tmp_path: Path) -> None:
    tab = Tab(trained[0])
    for query, code, message in (
        ({"name": "hesd"}, 400, "`run` is missing"),
        ({"run": "net/version_0"}, 400, "`name` is missing"),
        ({**RUN, "run": "../../etc/passwd"}, 404, "no run '../../etc/passwd'"),
        ({**RUN, "name": "other"}, 404, "no records of a callback named 'other'"),
    ):
        found, body = tab.get("records", **query)
        assert found == code, query
        assert message in body["error"]
    answer = tab.client.post("/data/plugin/hesd/records", query_string=RUN)
    assert (answer.status_code, json.loads(answer.get_data())["error"]) == (405, "only GET is answered here.")
    assert Tab(tmp_path).get("runs") == (200, {"folder": str(tmp_path), "runs": []})


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    damaged = payload(2)
    damaged["spectra"]["spectrum"]["nodes"] = "none"
    good = payload(4)
    write_payloads(tmp_path / "run", ["{", {**payload(1), "version": 2}, damaged, "[]", good])
    found = Tab(tmp_path).get("records", run="run", name="hesd")[1]
    assert found["records"] == [good]
    cut, newer, wrong, none = found["problems"]
    assert cut.startswith("step 0: this is no payload")
    assert newer == "step 1: the payload has version 2, and this lightning_hesd reads version 1: update it."
    assert wrong == "step 2: `nodes` of a spectrum is missing or invalid, got 'none'"
    assert none.startswith("step 3: this is no payload")


def test_a_corrupt_event_file_costs_its_own_run_only(tmp_path: Path) -> None:
    write_payloads(tmp_path / "whole", [payload(0), payload(1)])
    write_payloads(tmp_path / "cut", [payload(0), payload(1)])
    (file,) = (tmp_path / "cut").glob("events*")
    file.write_bytes(file.read_bytes()[:-40])  # a machine that stopped while writing
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / file.name).write_bytes(bytes(range(256)) * 4)
    tab = Tab(tmp_path)
    assert {run["run"] for run in tab.get("runs")[1]["runs"]} == {"whole", "cut"}
    assert len(tab.get("records", run="whole", name="hesd")[1]["records"]) == 2
    assert len(tab.get("records", run="cut", name="hesd")[1]["records"]) == 1


# The frontend's files -------------------------------------------------------------------------------------------------


def test_assets_come_from_packages_and_modules_import_only_those_before_them(trained: tuple[Path, Any]) -> None:
    tab = Tab(trained[0])
    for name in (*STATIC, "plotly.min.js"):
        answer = tab.client.get(f"/data/plugin/hesd/{name}")
        assert answer.status_code == 200, name
        assert answer.get_data() == content(name)
        assert answer.mimetype == ("text/css" if name.endswith(".css") else "text/javascript")
    for name in ("report.js", "../plugin.py", "..%2fplugin.py", "%2e%2e/plugin.py", "static/index.js"):
        assert tab.client.get(f"/data/plugin/hesd/{name}").status_code == 404, name
    # The report makes one script of the modules, in this order.
    for position, name in enumerate(SHARED):
        imported = [line.split('"')[1] for line in content(name).decode().splitlines() if ' from "' in line]
        assert set(imported) <= {f"./{earlier}" for earlier in SHARED[:position]}, name
        assert "innerHTML" not in content(name).decode(), name


def test_tensorboard_is_asked_to_keep_records() -> None:
    for given, expected in ((None, 1000), ({"scalars": 5}, 1000), ({"hesd": 0}, 0), ({"hesd": 7}, 7)):
        flags = SimpleNamespace(samples_per_plugin=given)
        HESDLoader().fix_flags(flags)
        assert flags.samples_per_plugin == {**(given or {}), "hesd": expected}
    context = TBContext(data_provider=object(), sampling_hints={"hesd": 0})
    assert HESDPlugin(context)._samples >= 1_000_000
    assert HESDLoader().load(TBContext()) is None


# Payloads -------------------------------------------------------------------------------------------------------------


def test_undefined_numbers_are_null() -> None:
    undefined = payload(0, math.nan)
    for found, expected in (
        (undefined["spectra"]["spectrum"], (None, None, "no curvature")),
        (shown(spectrum_of(-2.0, -1.0)), (None, "MN", None)),
    ):
        assert (found["c_t"], found["type"], found["reason"]) == expected
    assert read_payload(to_json(undefined)) == undefined


def test_many_nodes_are_merged_and_keep_mass_mean_and_extremes() -> None:
    rng = np.random.default_rng(0)
    weights = [[1 / 200] * 200] * 8
    nodes = np.sort(rng.standard_normal((8, 200)) ** 3, axis=1)
    many = spectrum_of(*range(200), weights=weights, nodes=nodes, residual=1.0)  # more than the dimension: none exact
    found = shown(many)
    nodes, weights, left, right = (np.array(found[key]) for key in ("nodes", "weights", "left", "right"))
    assert MAX_NODES / 3 < len(nodes) <= MAX_NODES
    assert (np.diff(nodes) > 0).all()
    assert (nodes[0], nodes[-1]) == pytest.approx((many.lambda_min, many.lambda_max), rel=1e-6)
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    assert weights @ nodes == pytest.approx(many.moment(1), abs=1e-6 * np.abs(nodes).max())
    assert len(left) == len(right) == len(nodes)
    assert (left[0], right[-1]) == (0.0, 0.0)
    assert np.median(left + right) > 0
    merged = Distribution(nodes, weights, left, right)
    at = np.linspace(nodes[0], nodes[-1], 50)
    np.testing.assert_allclose(merged.cumulative(at), many.distribution.cumulative(at), atol=0.01)


def test_payloads_have_the_distribution() -> None:
    found = spectrum_of(-2.0, -1.0, 0.5, 3.0, residual=0.25)
    of_record = record_payload(SpectrumRecord(0, 1, found))
    assert shown(found)["left"] == [0.0, 0.25, 0.25, 0.25]
    assert shown(found)["right"] == [0.25, 0.25, 0.25, 0.0]
    assert_refused(of_record, "has 4 nodes and 1 distances to the left", left=[0.0])
    assert_refused(of_record, "`left` of a spectrum is missing or", left="none")


@pytest.mark.parametrize("probes", [1, 8])
def test_the_band_is_that_of_the_spectrum_or_wider_where_points_are_left_out(probes: int) -> None:
    rng = np.random.default_rng(0)
    nodes = np.sort(rng.standard_normal((probes, 60)), axis=1)
    found = spectrum_of(*range(60), weights=[[1 / 60] * 60] * probes, nodes=nodes, residual=0.1, dimension=1000)
    band = shown(found)["cumulative_band"]
    points, low, high = found.cumulative_band
    assert len(band["points"]) == len(band["low"]) == len(band["high"]) <= MAX_POINTS
    assert (band["points"][0], band["points"][-1]) == pytest.approx((points[0], points[-1]), rel=1e-6)
    at = np.searchsorted(band["points"], points + 1e-6) - 1  # the points that are left out hold less than these
    least, most = np.array(band["low"])[at], np.array(band["high"])[at]
    assert (least <= 1000 * low + 1e-6).all()
    assert (most >= 1000 * high - 1e-6).all()
    if probes == 1:
        assert (least, most) == (pytest.approx(1000 * low), pytest.approx(1000 * high))


def test_a_damaged_band_is_refused_and_wrong_products_have_none() -> None:
    good = payload(1)
    band = good["spectra"]["spectrum"]["cumulative_band"]
    said = "`cumulative_band` of a spectrum is missing or"
    assert_refused(good, said, cumulative_band={**band, "low": "none"})
    assert_refused(good, "have several lengths", cumulative_band={**band, "low": band["low"][1:]})
    nothing = spectrum_of(0.0, verified="no", reason="the products are not those of the loss")
    assert shown(nothing)["cumulative_band"] is None


def test_layers_without_spectra_have_the_bounds_that_the_spectrum_of_the_network_gives() -> None:
    curvature = LayerCurvature(60, 5.0, 0.5, 0.25, 0.5, 0.75009, 0.125, (2.0, 3.0), (-1.0, 0.0))
    network = spectrum_of(-1.0, 4.0, by_layer={"a": curvature})
    layers = record_payload(SpectrumRecord(0, 1, network))["layers"]
    assert layers == {
        "name": ["a"],
        "dimension": [60],
        "trace": [5.0],
        "trace_error": [0.5],
        "trace_share": [0.25],
        "lambda_max_weight": [0.7501],  # four digits
        "lambda_min_weight": [0.125],
        "lambda_max_low": [2.0],
        "lambda_max_high": [3.0],
        "lambda_min_low": [-1.0],
        "lambda_min_high": [0.0],
    }
    own = record_payload(SpectrumRecord(0, 1, network, layers={"a": make_spectrum(-0.5)}))["layers"]
    assert (own["lambda_max"], own["lambda_max_weight"]) == ([1.0], [0.7501])
    assert "lambda_max_low" not in own


def test_losses_along_eigenvectors_are_in_payloads() -> None:
    losses = np.array([[[-1.0, 0.0, 1.0], [0.5, 0.25, math.nan]], [[-0.5, 0.0, 0.5], [1.0, 0.25, 1.0]]])
    found = record_payload(SpectrumRecord(0, 1, spectrum_of(-1.0, 4.0, losses_along=losses)))
    assert found["spectra"]["spectrum"]["losses_along"] == {
        "lambda_min": {"distances": [-1.0, 0.0, 1.0], "losses": [0.5, 0.25, None]},
        "lambda_max": {"distances": [-0.5, 0.0, 0.5], "losses": [1.0, 0.25, 1.0]},
    }
    assert read_payload(to_json(found)) == found
    assert payload()["spectra"]["spectrum"]["losses_along"] is None
    good = found["spectra"]["spectrum"]["losses_along"]
    for wrong in ({"distances": [0.0]}, {"losses": ["0", "1", "2"]}):
        assert_refused(found, "losses_along", losses_along={**good, "lambda_max": {**good["lambda_max"], **wrong}})


def test_layers_of_a_payload_are_checked() -> None:
    good = payload()
    good["layers"] = {"name": ["a", "b"], "trace": [1.0, None], "color": ["of a later release"]}
    assert read_payload(to_json(good)) == good
    wrongs = ({"trace": [1.0, "2"]}, {"trace": [1.0]}, {"name": ["a", 2]}, {"name": None})
    for layers in (["a"], *({**good["layers"], **wrong} for wrong in wrongs)):
        with pytest.raises(PayloadError, match="layers"):
            read_payload(to_json({**good, "layers": layers}))


# Picks ----------------------------------------------------------------------------------------------------------------


def test_rules_without_a_checkpoint_callback() -> None:
    records = [
        payload(-1, -0.9, loss=1.0),  # global_step 0: the initialization is never a candidate
        payload(0, -0.001, loss=2.0),  # far from the best loss
        payload(1, -0.3, loss=0.12, lambda_max=1.0),
        payload(2, -0.1, loss=0.10, lambda_max=3.0),
        payload(3, -0.7, loss=0.10, lambda_max=0.1),  # MN
        payload(4, math.nan, loss=0.01),
    ]
    by_c_t, by_lambda_max = decisions(records, [])
    assert (by_c_t["near"], by_c_t["candidates"]) == ([20, 30, 40], [20, 30])
    assert (by_c_t["pick"]["epoch"], by_lambda_max["pick"]["epoch"]) == (2, 1)
    near = "3 of 4 analyzed states have a loss over the analysis samples within 0.045 (5% of its drop) of the best"
    assert near in by_c_t["why"]
    assert "the 2 of these that are MP are candidates" in by_c_t["why"]
    (none, _) = decisions([payload(3, -0.7, loss=0.2), payload(4, -0.8, loss=0.19)], [])
    assert none["pick"]["epoch"] == 4
    assert "none of them is MP" in none["why"]
    assert [rule["pick"] for rule in decisions([], [])] == [None, None]


def test_what_a_resumed_run_made_anew_replaces_the_old() -> None:
    first, again = [payload(epoch) for epoch in range(4)], [payload(epoch, -0.2) for epoch in (1, 2)]
    assert rewound([*first, *again]) == [first[0], *again]


# The report -----------------------------------------------------------------------------------------------------------


def test_a_history_without_choices_and_one_with_a_torn_line(trained: tuple[Path, Any], tmp_path: Path) -> None:
    failed = SpectrumRecord(1, 8, None, error="no memory")
    history_of(SpectrumRecord(0, 4, make_spectrum(-0.1)), failed).save(tmp_path / "hesd")
    assert [rule["used"] for rule in run_data(tmp_path)["rules"]] == [False, False]
    assert run_data(tmp_path)["records"][1]["error"] == "no memory"
    written = (trained[0] / "net" / "version_0" / "hesd" / SELECTIONS_NAME).read_text()
    (tmp_path / "hesd" / SELECTIONS_NAME).write_text(written + written[:50])
    found = run_data(tmp_path)
    assert found["rules"][0]["metric"] == "train_acc"
    (problem,) = found["problems"]
    assert problem.startswith(f"{SELECTIONS_NAME}, line {EPOCHS + 1}: this is no payload")
