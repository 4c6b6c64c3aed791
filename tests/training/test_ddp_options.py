"""Options of DDP change neither training nor results; a rank that is interrupted or killed does not hang the others."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.training import processes
from tests.training.processes import TIMEOUT, Rank

SCRIPT = Path(__file__).with_name("ddp_options.py")
run, started = (partial(work, SCRIPT) for work in (processes.run, processes.started))


def wait_for(condition: Callable[[], bool], ranks: list[Rank]) -> None:
    """Wait until a condition holds, while all processes run."""
    ends = time.monotonic() + TIMEOUT
    while not condition():
        for rank in ranks:
            assert rank.process.is_alive(), rank.said
        assert time.monotonic() < ends
        time.sleep(0.05)


NAMES = ["find_unused_parameters", "static_graph", "bucket_view", "comm_hook"]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def options(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each process saw with every option, one after the other in the same processes."""
    return run(tmp_path_factory.mktemp("options"), request.param, "options")


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same_with_and_without_analyses(options: list[dict[str, Any]], name: str) -> None:
    for rank in options:
        assert rank[name]["weights"]
        assert all(rank[name]["weights"])
        assert rank[name]["some_gradients"]
        assert all(rank[name]["gradients"])  # the very same tensors, with the same values
    first, *others = (rank[name]["records"] for rank in options)
    assert all(other == first for other in others)
    assert len(first["hesd"]) >= 2  # the first one before training
    for record in (*first["hesd"], *first["train"]):
        assert record["error"] is None
        assert record["c_t"] < 0


def test_gradients_in_the_buckets_stay_there(options: list[dict[str, Any]]) -> None:
    assert all(all(rank["bucket_view"]["views"]) for rank in options)
    assert not any(any(rank["static_graph"]["views"]) for rank in options)


def test_training_steps_may_wait_for_each_other(options: list[dict[str, Any]]) -> None:
    """Processes have different numbers of batches in an analysis: barriers are passed, other calls are refused."""
    for rank in options:
        found = rank["reaches"]
        assert all(part["same"] for part in found.values())
        assert found["use_trainer"]["errors"] == [None] * 2
        for name in ("all_gather", "all_reduce"):
            for error in found[name]["errors"]:
                assert f"calls `{name}`; in an analysis each rank has other batches" in error
                assert "pass the callback `loss_fn=`" in error
        assert len(found["use_trainer"]["folders"]) > 4
        assert all(found["use_trainer"]["folders"]), "that of process zero, in training and in analyses"


def test_norms_that_wait_for_other_processes_are_refused(options: list[dict[str, Any]]) -> None:
    for rank in options:
        assert rank["norms"]["eval"] is None
        for mode in ("train", "keep"):
            assert "in training mode SyncBatchNorm waits" in rank["norms"][mode]
            assert "mode='eval'" in rank["norms"][mode]


INTERRUPTIONS = {
    "killed": (signal.SIGKILL, [1]),
    "1 stops": (signal.SIGTERM, [1]),
    "both stop": (signal.SIGTERM, [0, 1]),
}
"""The signal, and the ranks that receive it."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Rank]]]:
    """Ranks of which some were interrupted in an analysis, by the name of the interruption."""
    folder = tmp_path_factory.mktemp("interrupted")
    with ExitStack() as stack:
        launched = {name: stack.enter_context(started(folder / name, 2, "interrupted")) for name in INTERRUPTIONS}
        for name, ranks in launched.items():
            wait_for(lambda name=name: len(list((folder / name).glob("analyzing*"))) == 2, ranks)
            interruption, numbers = INTERRUPTIONS[name]
            for number in numbers:
                os.kill(ranks[number].process.pid or 0, interruption)
            (folder / name / "interrupted").touch()
        yield launched
    assert not list(folder.rglob("rank*.json")), "all were to train for ever"


def test_a_rank_that_is_killed_in_an_analysis_leaves_no_other_waiting(interrupted: dict[str, list[Rank]]) -> None:
    other, _ = interrupted["killed"]
    assert other.wait() != 0
    assert "peer" in other.said  # "Connection closed by peer", or "reset": the error of the process group


@pytest.mark.parametrize("name", ["1 stops", "both stop"])
def test_sigterm_in_an_analysis_ends_all_ranks(interrupted: dict[str, list[Rank]], name: str) -> None:
    for rank in interrupted[name]:
        assert rank.wait() == 0, rank.said  # Lightning's exception is a SystemExit


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_decisions_it_made(tmp_path: Path) -> None:
    # By the clock of process zero not every epoch can be afforded; by that of the other one all of them.
    costs = ["--costs", 1.7, 0.0]
    whole = run(tmp_path / "whole", 2, "budgeted", *costs)
    assert whole[0] == {**whole[1], "overhead": whole[0]["overhead"]}  # each by its own clock
    assert whole[0]["epochs"] == [0, 4, 6]  # one before the run is cut, one after it, and some that cost too much
    cut = tmp_path / "cut"
    with started(cut, 2, "budgeted", *costs, "--pause", 5) as ranks:
        wait_for(lambda: all((cut / f"paused{rank}").exists() for rank in range(2)), ranks)
        for rank in ranks:
            rank.process.kill()
    resumed = run(tmp_path / "resumed", 2, "budgeted", *costs, "--ckpt", cut / "last.ckpt")
    for ours, theirs in zip(resumed, whole, strict=True):
        assert (ours["epochs"], ours["decisions"]) == (theirs["epochs"], theirs["decisions"])
        assert ours["c_t"][:2] == theirs["c_t"][:2]  # then dropout differs: Lightning does not resume random numbers
    assert resumed[0]["overhead"] == pytest.approx(whole[0]["overhead"])
