"""Several ranks give the results of one, and a failure on one rank does not hang the others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.training import processes
from tests.training.processes import read

run = partial(processes.run, Path(__file__).with_name("ddp_run.py"))


EPOCHS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of a run on one rank, and on three of which the last has no samples."""
    folders = {ranks: tmp_path_factory.mktemp("ddp") / str(ranks) for ranks in (1, 3)}
    for ranks, folder in folders.items():
        run(folder, ranks, "--engine", 1, "--epochs", EPOCHS)
    return folders


def test_findings_are_those_of_one_rank(runs: dict[int, Path]) -> None:
    (alone,) = read(runs[1])
    for rank in read(runs[3]):
        assert rank["world_size"] == 3
        assert rank["best"] == alone["best"]
        assert rank["candidates"] == alone["candidates"]
        for name, records in alone["records"].items():
            assert len(records) == len(rank["records"][name]) == EPOCHS
            # Differences have the rounding of the gradient, magnified by their step.
            accuracy = 1e-6 if name == "differences" else 1e-9
            for mine, theirs in zip(records, rank["records"][name], strict=True):
                assert mine["num_samples"] == theirs["num_samples"]
                assert name == "own" or mine["num_samples"] == (96 if name == "growing" else 50)
                assert mine["steps"] == theirs["steps"]
                assert theirs["c_t"] == pytest.approx(mine["c_t"], rel=accuracy)
                assert theirs["lambda_max"] == pytest.approx(mine["lambda_max"], rel=accuracy)
                assert theirs["sampling_error"] == pytest.approx(mine["sampling_error"], rel=accuracy)
                assert len(mine["layers"]) == (0 if name == "adaptive" else 2)  # without a Krylov basis, none
                assert theirs["layers"] == pytest.approx(mine["layers"], rel=10 * accuracy)
                assert theirs["negative_count"] == mine["negative_count"]
                assert len(mine["losses along"]) == (42 if name == "hesd" else 0)
                assert theirs["losses along"] == pytest.approx(mine["losses along"], rel=1e-6)


def test_the_runs_tell_something(runs: dict[int, Path]) -> None:
    """Epochs differ, and so do spectra with and without dropout: the comparison above is not between constants."""
    (alone,) = read(runs[1])
    c_t = {name: [record["c_t"] for record in records] for name, records in alone["records"].items()}
    assert len(set(c_t["hesd"])) == EPOCHS
    assert c_t["hesd"] != c_t["dropout"]
    assert 10 < alone["records"]["own"][0]["num_samples"] < 50, "of fifty samples some are skipped"
    assert all(record["steps"] < 40 and record["sampling_error"] > 0 for record in alone["records"]["adaptive"])


def test_all_ranks_have_the_very_same_numbers(runs: dict[int, Path]) -> None:
    first, *others = read(runs[3])
    assert set(first["overheads"]) == {f"{name}/overhead" for name in first["records"]}
    assert all(rank == first for rank in others)


def test_equal_scalars_need_no_advice_to_average_them(runs: dict[int, Path]) -> None:
    assert "sync_dist" not in (runs[3] / "rank0.log").read_text()


def test_only_rank_zero_writes(runs: dict[int, Path]) -> None:
    for name in ("hesd", "dropout"):
        (folder,) = runs[3].rglob(name)
        assert (folder / "index.json").is_file()
        assert len(list(folder.glob("*.npz"))) == EPOCHS
        rows = (folder.parent / f"{name}_density.csv").read_text().splitlines()
        assert len(rows) == len(set(rows))
    (last,) = runs[3].rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == EPOCHS - 1


@pytest.mark.parametrize(
    ("fail", "fail_in", "cause"),
    [("loss", 1, "MemoryError: no memory here"), ("data", 0, "OSError: cannot read sample")],
)
def test_a_failure_on_one_rank_is_recorded_on_all_and_training_goes_on(
    tmp_path: Path, fail: str, fail_in: int, cause: str
) -> None:
    ranks = run(tmp_path / "run", 2, "--fail", fail, "--fail-in", fail_in)
    for number, rank in enumerate(ranks):
        assert rank["steps"] == 4
        expected = cause if number == fail_in else "AnotherRankFailedError"
        for records in rank["records"].values():
            assert [record["epoch"] for record in records] == [0, 1]
            assert all(record["error"].startswith(expected) for record in records)
    # No epoch could be ranked, so the final weights are the best there are.
    assert all("epoch=1-step=4" in rank["best"] for rank in ranks)


def test_all_ranks_analyze_the_epochs_that_rank_zero_can_afford(tmp_path: Path) -> None:
    """By its own clock the other rank could afford every epoch, and would wait in epoch 1 for ever."""
    first, second = run(tmp_path / "run", 2, "--epochs", 4, "--max-overhead", 0.5, "--costs", 1.5, 0)
    for records in first["records"].values():
        assert [record["epoch"] for record in records] == [0, 2]
    assert first["steps"] == 8
    assert second == first
    # After epoch 2: two analyses in six seconds of training.
    assert first["overheads"] == {"hesd/overhead": 0.5, "dropout/overhead": 0.5}
