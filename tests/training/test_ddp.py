"""Several ranks give the results of one, and a failure on one rank does not hang the others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import processes

SCRIPT = Path(__file__).with_name("ddp_run.py")

EPOCHS = 2

LAUNCHES: dict[str, tuple[Any, ...]] = {
    # The number of ranks, and what the script is told. Of three ranks the last has no samples.
    "alone": (1, "--engine", 1, "--epochs", EPOCHS),
    "three": (3, "--engine", 1, "--epochs", EPOCHS),
    "loss fails": (2, "--fail", "loss", "--fail-in", 1),
    "data fails": (2, "--fail", "data", "--fail-in", 0),
    "budget": (2, "--epochs", 4, "--max-overhead", 0.5, "--costs", 1.5, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launches write to, each to a folder with its name."""
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[Any]]:
    """Return what each rank of each launch saw."""
    found = processes.run_together(*((SCRIPT, folder / name, *launch) for name, launch in LAUNCHES.items()))
    return dict(zip(LAUNCHES, found, strict=True))


def test_findings_are_those_of_one_rank(runs: dict[str, list[Any]]) -> None:
    (alone,), three = runs["alone"], runs["three"]
    assert set(three[0]["overheads"]) == {f"{name}/overhead" for name in alone["records"]}
    for rank in three:
        assert rank == three[0], "the very same numbers"
        assert rank["world_size"] == 3
        assert rank["best"] == alone["best"]
        assert rank["candidates"] == alone["candidates"]
        for name, records in alone["records"].items():
            assert len(records) == len(rank["records"][name]) == (EPOCHS if name in {"hesd", "dropout"} else 1)
            # Differences have the rounding of the gradient, magnified by their step.
            accuracy = 1e-6 if name == "differences" else 1e-9
            for mine, theirs in zip(records, rank["records"][name], strict=True):
                assert name == "own" or mine["num_samples"] == (96 if name == "growing" else 50)
                for key in ("num_samples", "steps", "negative_count"):
                    assert theirs[key] == mine[key], key
                for key in ("c_t", "lambda_max", "sampling_error"):
                    assert theirs[key] == pytest.approx(mine[key], rel=accuracy), key
                assert len(mine["layers"]) == (0 if name == "adaptive" else 2)  # without a Krylov basis, none
                assert theirs["layers"] == pytest.approx(mine["layers"], rel=10 * accuracy)
                assert len(mine["losses along"]) == (42 if name == "hesd" else 0)
                assert theirs["losses along"] == pytest.approx(mine["losses along"], rel=1e-6)


def test_the_tracked_sharpness_is_that_of_one_rank(runs: dict[str, list[Any]]) -> None:
    (alone,) = runs["alone"]
    assert len(alone["tracked"]) == EPOCHS * 2
    assert [len(values) for values in alone["tracked"]] == [4, 5, 5, 5], "calibrated by the first analysis"
    for rank in runs["three"]:
        for mine, theirs in zip(alone["tracked"], rank["tracked"], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-6)


def test_the_runs_tell_something(runs: dict[str, list[Any]]) -> None:
    """Epochs differ, and so do spectra with and without dropout: the comparison above is not between constants."""
    (alone,) = runs["alone"]
    c_t = {name: [record["c_t"] for record in records] for name, records in alone["records"].items()}
    assert len(set(c_t["hesd"])) == EPOCHS
    assert c_t["hesd"] != c_t["dropout"]
    assert 10 < alone["records"]["own"][0]["num_samples"] < 50, "of fifty samples some are skipped"
    assert all(record["steps"] < 25 and record["sampling_error"] > 0 for record in alone["records"]["adaptive"])


@pytest.mark.usefixtures("runs")
def test_only_rank_zero_writes_and_needs_no_advice_to_average_equal_scalars(folder: Path) -> None:
    assert "sync_dist" not in (folder / "three" / "rank0.log").read_text()
    for name in ("hesd", "dropout"):
        (spectra,) = (folder / "three").rglob(name)
        assert (spectra / "index.json").is_file()
        assert len(list(spectra.glob("*.npz"))) == EPOCHS
        rows = (spectra.parent / f"{name}_density.csv").read_text().splitlines()
        assert len(rows) == len(set(rows))
    (last,) = (folder / "three").rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == EPOCHS - 1


@pytest.mark.parametrize(
    ("launch", "fails_in", "cause"),
    [("loss fails", 1, "MemoryError: no memory here"), ("data fails", 0, "OSError: no luck")],
)
def test_a_failure_on_one_rank_is_recorded_on_all_and_training_goes_on(
    runs: dict[str, list[Any]], launch: str, fails_in: int, cause: str
) -> None:
    for number, rank in enumerate(runs[launch]):
        assert rank["steps"] == 4
        expected = cause if number == fails_in else "AnotherRankFailedError"
        for records in rank["records"].values():
            assert [record["epoch"] for record in records] == [0, 1]
            assert all(record["error"].startswith(expected) for record in records)
    # No epoch could be ranked, so the final weights are the best there are.
    assert all("epoch=1-step=4" in rank["best"] for rank in runs[launch])


def test_all_ranks_analyze_the_epochs_that_rank_zero_can_afford(runs: dict[str, list[Any]]) -> None:
    """By its own clock the other rank could afford every epoch, and would wait in epoch 1 for ever."""
    first, second = runs["budget"]
    for records in first["records"].values():
        assert [record["epoch"] for record in records] == [0, 2]
    assert first["steps"] == 8
    assert second == first
    # After epoch 2: two analyses in six seconds of training.
    assert first["overheads"] == {"hesd/overhead": 0.5, "dropout/overhead": 0.5}
