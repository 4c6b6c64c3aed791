"""The benchmark's candidates compute the same, and its report has a place for everything, failures too."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import (
    calibrated_intervals,
    checks,
    coverage,
    findings,
    isolation,
    language_models,
    layers,
    measure,
    one_run,
    overhead,
    reference_range,
    scale,
    tracking,
)
from benchmarks.__main__ import environment, write
from benchmarks.candidates import OURS, TOLERANCE
from benchmarks.profile import PARTS, profile
from benchmarks.reference_networks import CONFIGURATIONS, network
from benchmarks.report import summarize
from benchmarks.truth import steps_within, true_c_t
from lightning_hesd.numerics.inputs.architecture import architecture_of
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra.reference_table import PHASES, TABLE, read_states

pytestmark = [
    pytest.mark.usefixtures("problem_cache"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # curvlinops
]

EXACT = [name for name in measure.CANDIDATES if "difference" not in name]
WHOLE = [name for name, candidate in measure.CANDIDATES.items() if candidate.density]


@pytest.fixture(scope="module", params=[1, 8])
def entry(request: pytest.FixtureRequest, problem_cache: None) -> dict[str, Any]:
    """A problem with everything measured."""
    pieces = request.param
    truth = true_c_t("mlp", "quick")
    return {
        "problem": "mlp",
        "pieces": pieces,
        "parameters": 26122,
        "samples": 64,
        "truth": truth,
        "products": measure.products("mlp", pieces, "quick", 1),
        "profile": profile("mlp", pieces, "quick"),
        "whole": {name: [measure.whole("mlp", pieces, "quick", name, truth["c_t"])] for name in WHOLE},
    }


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    """Skip what cannot be measured here: `make bench` installs the peers."""
    failure = result.get("failure", "")
    if "No module named" in failure or "is not available in this version" in failure:
        pytest.skip(failure)
    assert not failure
    return result


@pytest.mark.parametrize("name", EXACT)
def test_products_are_those_of_float64(entry: dict[str, Any], name: str) -> None:
    if entry["pieces"] not in measure.CANDIDATES[name].pieces:
        pytest.skip("not tried with so many batches")
    result = succeeded(entry["products"][name])
    assert len(result["seconds"]) == 1
    # A few hundred operations, each rounding by half an epsilon, whose errors add up like a random walk.
    assert result["error"] <= 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", [name for name in WHOLE if name in EXACT])
def test_whole_runs_find_c_t(entry: dict[str, Any], name: str) -> None:
    result = succeeded(entry["whole"][name][0])
    assert result["error"] <= TOLERANCE
    assert result["density_products"] >= measure.nodes("quick")
    assert result["c_t_seconds"] > 0
    if result.get("hindsight") is not None:
        assert 1 < result["hindsight"] <= measure.nodes("quick")


def test_profile_finds_every_part(entry: dict[str, Any]) -> None:
    parts = entry["profile"]["parts"]
    assert set(parts) == set(PARTS)
    assert min(parts.values()) > 0
    assert sum(parts.values()) < entry["profile"]["seconds"]


def test_report_has_everything(entry: dict[str, Any], tmp_path: Path) -> None:
    broken = {**entry, "whole": {name: [{"failure": "OSError: no luck"}] for name in WHOLE}}
    write({"environment": environment(), "size": "quick", "entries": [entry, broken]}, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in text
    for name, summary in summarize(entry).items():
        assert text.count(f"| {name} |") == 2
        assert summary.product is None or f"| {1000 * summary.product:.3g} |" in text
    assert "OSError: no luck" in text
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert (tmp_path / "results.json").is_file()
    assert summarize(entry)[OURS.name].gradients is not None
    assert text.count(f"| {entry['profile']['products']} |") >= 2


def test_hindsight_is_the_step_from_which_the_error_stays_small() -> None:
    generator = np.random.default_rng(0)
    alphas, betas = generator.normal(size=12), generator.uniform(0.5, 1.0, size=11)
    matrix = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
    values, vectors = np.linalg.eigh(matrix)
    truth = values[0] / values[-1]
    errors = []
    for steps in range(1, 13):
        inner = np.linalg.eigvalsh(matrix[:steps, :steps])
        errors.append(abs(min(inner[0], 0) / inner[-1] - truth) / abs(truth) if inner[-1] > 0 else math.inf)
    expected = max(steps for steps in range(1, 13) if errors[steps - 1] > TOLERANCE) + 1
    assert steps_within((values, vectors[0] ** 2), truth, TOLERANCE) == expected
    assert steps_within((values, vectors[0] ** 2), 2 * truth, TOLERANCE) is None


def test_fresh_process_answers_fails_and_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "MODULES", [])
    assert isolation.in_fresh_process(math.sqrt, 4.0) == 2.0
    assert isolation.in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(isolation.MeasurementError, match="ValueError"):
        isolation.in_fresh_process(math.sqrt, -1.0)
    with pytest.raises(isolation.MeasurementError, match="exit code 3"):
        isolation.in_fresh_process(os._exit, 3)


Written = Callable[..., str]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Run a program with options, and return the page that it writes."""

    def run(program: ModuleType, *options: str) -> str:
        monkeypatch.setattr("sys.argv", ["", *options, "--out", str(tmp_path)])
        program.main()
        [page] = tmp_path.glob("*.md")
        return page.read_text(encoding="utf-8")

    return run


def rows_of(page: str, start: str = "") -> list[list[str]]:
    """Return the cells of the rows of tables that start like this, without rules between head and body."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {start}") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def here(work: Callable[..., Any], *args: Any) -> Any:
    """Stand in for `in_fresh_process`, to save time."""
    return work(*args)


@pytest.mark.parametrize(("table", "columns"), [(layers, 8), (checks, 6)])
def test_tables_with_a_row_for_each_problem(table: ModuleType, columns: int, written: Written) -> None:
    row = rows_of(written(table, "--quick", "--problems", "mlp", "--steps", "3", "--rounds", "1"))[-1]
    assert len(row) == columns
    assert row[:2] == ["MLP", "26,122"]
    assert all(float(cell.strip("%")) > 0 for cell in row[2:])


def test_memory_of_language_models(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_models, "in_fresh_process", here)
    rows = rows_of(written(language_models, "--quick", "--rounds", "1"))[-4:]
    assert [row[2] for row in rows] == ["PyTorch", "lightning_hesd"] * 2
    theirs, ours = ([float(cell) for cell in row[3:7]] for row in rows[2:])
    assert all(mine < 0.5 * other for mine, other in zip(ours, theirs, strict=True))  # of the long context


def test_table_of_large_models(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [scale.Case("tiny", "graph", "device"), scale.Case("tiny", "recompute", "none")]
    monkeypatch.setattr(scale, "in_fresh_process", here)
    monkeypatch.setattr(scale, "cases", lambda name: cases)
    text = written(scale, "--quick")
    rows = rows_of(text, "tiny |")
    assert [row[3:5] for row in rows] == [["graph", "device"], ["recompute", "none"]]
    extremes = [[float(value) for value in row[-3:-1]] for row in rows]
    assert extremes[0] == pytest.approx(extremes[1], rel=1e-4)
    [error] = re.findall(r"a product differs from that in float64 by (\S+) of its norm", text)
    assert float(error) <= 20 * torch.finfo(torch.float32).eps


def test_table_of_whole_trainings(written: Written) -> None:
    [row] = rows_of(written(overhead, "--quick", "--trainings", "resnet"), "digits, ResNet |")
    assert row[1] == "77,562"
    assert re.fullmatch(r"[\d.]+× \(2 × 5\)", row[3])
    assert len(row) == 3 + len(overhead.VARIANTS)


def test_table_of_one_run(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = nn.Sequential(nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 10))
    monkeypatch.setitem(one_run.NETWORKS, "tiny", (lambda: tiny, 1))
    row = rows_of(written(one_run, *["--networks", "tiny", "--seeds", "3", "--samples", "20", "--steps", "50"]))[-1]
    found = dict(zip(one_run.HEADER, row, strict=False))
    assert (found["network"], found["parameters"], found["steps"]) == ("tiny", "160", "50")
    assert float(row[5]) < float(row[4])  # the error of the trace
    assert float(row[8]) <= float(row[7]) <= float(row[6])  # distances of the best, our and the plain density


def test_table_of_calibrated_intervals(written: Written) -> None:
    found = rows_of(written(calibrated_intervals, "--quick"))[1:]
    rows = [dict(zip(calibrated_intervals.HEADER, row, strict=True)) for row in found]
    proven = [row for row, cells in zip(rows, found, strict=True) if cells[2] == "proven"]
    seen = {(row["runs"], row["covered"], row["saved"]) for row in proven}
    assert seen == {(runs, "100.0%", "0%") for runs in ("synthetic", "networks")}
    # The tridiagonal matrix follows from the quadrature rule.
    alphas, betas = np.array([0.5, -1.0, 2.0, 0.1]), np.array([1.0, 0.7, 0.2, 0.3])
    found = calibrated_intervals.jacobi(*gauss_quadrature(alphas, betas))
    np.testing.assert_allclose(found, [alphas, betas], rtol=0, atol=1e-13)


def test_tables_of_tracking(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SETUPS", tracking.SETUPS[:1])
    schedules = {"1 ×": (80, tracking.constant(1.0)), "ramp": (120, lambda step: 1.04**step)}
    monkeypatch.setattr(tracking, "SCHEDULES", schedules)
    monkeypatch.setattr(tracking, "EPOCHS_BETWEEN_ANALYSES", 1)
    text = written(tracking, "--seeds", "1", "--steps", "90")
    errors, healthy, ramp = rows_of(text, "MLP")
    assert errors[:3] == ["MLP, SGD", "2,130", "2"]  # at steps 60 and 90: before, there is no analysis to calibrate by
    assert float(errors[4].split("%")[0]) < 5
    assert healthy[1:3] + healthy[6:7] == ["1 ×", "0 of 1", "0 of 1"]
    assert ramp[1:3] + ramp[4:5] == ["ramp", "1 of 1", "1 of 1"]
    assert "twice below 1.2 | 1 of 1" in text


def test_table_of_coverage(written: Written) -> None:
    rows = rows_of(written(coverage, "--quick", "--steps", "30"))
    assert [row[0] for row in rows] == ["spectrum", "uniform", "outliers on a bulk"]
    assert all(len(row) == len(coverage.HEADER) for row in rows)


def test_table_of_findings(tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault, a training that is taken for healthy, and recorded ones; trainings are recorded once."""
    steps = {"steps": 2}
    planted = findings.Case("two steps", "short_run", analysis=steps)
    monkeypatch.setattr(findings, "FAULTS", (planted, findings.Case("two steps, too", "failed", analysis=steps)))
    monkeypatch.setattr(findings, "HEALTHY", (findings.Case("healthy", analysis=steps),))
    recorded = tmp_path / "recorded" / "mlp-too-long-00"
    findings.train(planted, 0, findings.QUICK).save(recorded / "hesd")
    (recorded / findings.DONE).touch()
    options = ["--quick", "--histories", str(tmp_path / "histories"), "--recorded", str(tmp_path / "recorded")]
    page = written(findings, *options)
    rows = {name: cells for name, *cells in rows_of(page)}
    assert rows["two steps"] == [".", ".", "**1 c**", *["."] * 7]
    assert rows["two steps, too"] == ["**0**", ".", "1 c", *["."] * 7]
    assert rows["healthy"] == [".", ".", "1 c", *["."] * 7]
    assert rows["mlp-too-long"] == ["1", ".", ".", "1", *["."] * 7, "short_run 1"]
    monkeypatch.setattr(findings, "train", None)
    assert written(findings, *options) == page


def test_the_reference_range_is_made_once(tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of each kind, a planted fault; trainings are recorded once, and the package's table stays."""
    fault = findings.Case("two steps", "short_run", analysis={"steps": 2})
    monkeypatch.setattr(reference_range.planted_faults, "FAULTS", (fault,))
    monkeypatch.setattr(reference_range.planted_faults, "HEALTHY", ())
    before = reference_range.TABLE.read_bytes()
    page = written(reference_range, "--quick", "--seeds", "1")
    assert reference_range.TABLE.read_bytes() == before
    states = read_states((tmp_path / TABLE).read_text(encoding="utf-8"))
    assert {state.architecture for state in states} == {"perceptron", "convolution", "attention"}
    assert {"start"} <= {state.phase for state in states} <= set(PHASES)
    known = ("c_t", "relative_curvature", "far_negative_share", "stable_rank")
    assert not any(math.isnan(state.values[key][0]) for state in states for key in known)
    assert "4 networks of 4 configurations" in " ".join(page.split())
    [cells] = rows_of(page, "two steps |")
    assert cells[1:3] == ["-", "-"]  # four networks are too few
    monkeypatch.setattr(reference_range, "train", None)
    assert written(reference_range, "--quick", "--seeds", "1") == page


def test_networks_of_the_reference_range_are_recognized_by_their_modules() -> None:
    kinds = {configuration.kind: configuration for configuration in CONFIGURATIONS}
    for configuration in kinds.values():
        net = network(configuration)
        assert architecture_of(net, list(net.parameters())) == configuration.architecture
