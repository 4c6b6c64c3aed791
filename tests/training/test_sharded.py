"""Sharded parameters give the spectrum of whole ones and stay sharded; a failure on one rank hangs no other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_hesd.training.compat import strategies
from tests.training import processes

HERE = Path(__file__).parent
EXACT = 1e-12
"""Of float64: sums over ranks are taken in another order."""

Found = list[dict[str, Any]]
"""By rank."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launches write to."""
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def launched(folder: Path) -> list[Found]:
    """Return the findings of analyses on two ranks and on three, and of training runs on one rank and on two."""
    spectra, training = HERE / "sharded_spectra.py", HERE / "sharded_run.py"
    return processes.run_together(
        (spectra, folder / "spectra 2", 2, "--thorough", 1),
        (spectra, folder / "spectra 3", 3),
        (training, folder / "run 1", 1),
        (training, folder / "run 2", 2, "--all", 1),
    )


@pytest.fixture(scope="module")
def spectra(launched: list[Found]) -> Found:
    return launched[0]


@pytest.fixture(scope="module")
def alone(launched: list[Found]) -> dict[str, Any]:
    """An ordinary training run."""
    main: dict[str, Any] = launched[2][0]["main"]
    return main


@pytest.fixture(scope="module")
def runs(launched: list[Found]) -> Found:
    return launched[3]


@pytest.mark.parametrize(("ranks", "analyses"), [(2, 10), (3, 1)])
def test_spectra_are_those_of_whole_parameters(launched: list[Found], ranks: int, analyses: int) -> None:
    """Three ranks share two batches."""
    first, *others = launched[ranks - 2]
    assert (len(others) + 1, len(first["expected"])) == (ranks, analyses)
    for name, expected in first["expected"].items():
        found = first["spectra"][name]
        assert all(rank["spectra"][name] == found for rank in others)
        for key in ("steps", "strategy", "num_samples", "dimension"):
            assert found[key] == expected[key]
        # What the record states of rounding, of which that of differences is the largest part; the loss has its own.
        is_coarse = name == "float32" or name.startswith("differences")
        allowed = expected["rounding"] if is_coarse else EXACT * expected["lambda_max"]
        for key in ("lambda_min", "lambda_max"):
            assert found[key] == pytest.approx(expected[key], abs=allowed)
        assert found["c_t"] == pytest.approx(expected["c_t"], abs=4 * allowed / expected["lambda_max"])
        assert found["layers"].keys() == expected["layers"].keys()
        assert bool(found["layers"]) != (name == "recompute")  # it keeps no Krylov basis
        for layer, (trace, weight) in expected["layers"].items():
            assert found["layers"][layer][0] == pytest.approx(trace, abs=expected["dimension"] * allowed)
            assert found["layers"][layer][1] == pytest.approx(weight, abs=1e-6 if allowed < 1e-9 else 1e-3)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6 if name == "float32" else EXACT)
        assert bool(found["losses along"]) == (name == "random signs")
        assert found["losses along"] == pytest.approx(expected["losses along"], rel=1e-8)


def test_the_spectra_tell_something(spectra: Found) -> None:
    """They are not all the same, and one Lanczos run stops before its last step."""
    found = spectra[0]["spectra"]
    assert len({round(s["lambda_max"], 6) for s in found.values()}) >= 3
    assert found["graph"]["c_t"] < -0.01
    assert found["stopped early"]["steps"] < found["graph"]["steps"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("shortcut", ["OutOfStepError: the ranks take different paths"] * 2),
        ("broken", ["AnotherRankFailedError: ", "MemoryError: no memory here"]),
        ("infinite", ["AnotherRankFailedError: ", "ArithmeticError: the loss of batch 1 is inf"]),
        ("kinked", ["ArithmeticError: the Hessian-vector product of one of the batches 0, 1 is NaN"] * 2),
        ("opaque", ["UnsupportedShardingError: the loss uses a sharded parameter of shape (5, 6)"] * 2),
    ],
)
def test_a_failure_has_its_message_and_leaves_the_ranks_in_step(spectra: Found, loss: str, message: list[str]) -> None:
    for rank, expected in zip(spectra, message, strict=True):
        assert rank["failures"][loss].startswith(expected)
        assert rank["failures"]["afterwards"] == repr(rank["spectra"]["graph"]["c_t"])


def test_weights_stay_as_they_were_and_each_rank_holds_its_share_of_the_vectors(spectra: Found) -> None:
    """Basis and vectors are halved; what remains is a layer, gathered, and the graph of the batch."""
    assert all(rank["untouched"] for rank in spectra)
    alone = spectra[0]["expected bytes"]
    assert alone > 10 * spectra[0]["parameters"]
    assert all(rank["bytes"] < 0.6 * alone for rank in spectra)


def test_records_are_those_of_one_rank(alone: dict[str, Any], runs: Found) -> None:
    for rank in runs:
        main = rank["main"]
        assert not main["said"]
        for name, records in alone["records"].items():
            for mine, theirs in zip(records, main["records"][name], strict=True):
                assert theirs["epoch"] == mine["epoch"]
                assert theirs["num_samples"] == 50
                for key in ("c_t", "lambda_max"):
                    assert theirs[key] == pytest.approx(mine[key], rel=1e-9)
        assert main["layers"]["few"] == pytest.approx(alone["layers"]["few"], rel=1e-9, abs=1e-12)
    assert len({record["c_t"] for record in alone["records"]["hesd"]}) == 2


@pytest.mark.usefixtures("runs")
def test_training_is_the_same_to_the_last_bit(folder: Path) -> None:
    for rank in range(2):
        names = ("main", "failing", "bare")
        *analyzed, bare = (torch.load(folder / "run 2" / name / f"weights{rank}.pt") for name in names)
        assert any(p.numel() == 0 for p in bare) == (rank == 1)
        assert all(all(map(torch.equal, weights, bare)) for weights in analyzed)


def test_the_best_checkpoint_is_a_folder_that_can_be_resumed_from(alone: dict[str, Any], runs: Found) -> None:
    for rank in runs:
        best = Path(rank["main"]["best"])
        assert best.name == Path(alone["best"]).name
        assert [Path(path).name for path in rank["main"]["kept"]] == [Path(p).name for p in alone["kept"]]
        assert (best / "meta.pt").is_file()
        # Candidates that were outdone are gone; the other one is Lightning's own.
        folders = {path.name for path in best.parent.iterdir()}
        assert folders == {"last.ckpt", best.name, best.name.removeprefix("hesd-highest_c_t-")}
        records = rank["resumed"]["records"]["hesd"]
        assert records[:2] == rank["main"]["records"]["hesd"]
        assert [record["epoch"] for record in records] == [0, 1, 2]
        assert records[2]["c_t"] != records[1]["c_t"]


def test_a_failure_on_one_rank_is_recorded_on_all_and_training_goes_on(runs: Found) -> None:
    causes = ["AnotherRankFailedError", "MemoryError: no memory here"]
    for rank, cause in zip(runs, causes, strict=True):
        records = rank["failing"]["records"]["hesd"]
        assert [record["epoch"] for record in records] == [0, 1]
        assert all(record["error"].startswith(cause) for record in records)
        assert rank["failing"]["steps"] == rank["bare"]["steps"]
        assert Path(rank["failing"]["best"]).is_dir()


def test_unavailable_options_are_refused_and_the_rest_is_done(runs: Found) -> None:
    for rank in runs:
        (plain,), (sampling,) = (rank["failing"]["records"][name] for name in ("refused", "sampling"))
        assert plain["c_t"] == rank["main"]["records"]["hesd"][0]["c_t"]
        assert sampling["error"].startswith("ValueError: sampling errors are not available for sharded parameters")
    said = "".join(runs[0]["failing"]["said"])
    for option in ("preconditioner", "monitor_gradients"):
        assert said.count(f"`{option}` is not available with ModelParallelStrategy") == 1


def test_tensor_parallelism_is_refused_before_training(runs: Found) -> None:
    message = "MisconfigurationException: ModelParallelStrategy(tensor_parallel_size=2) splits layers over ranks"
    for rank in runs:
        (record,) = rank["split"]["records"]["hesd"]
        assert record["error"].startswith(message)
        assert rank["split"]["steps"] > 0
    assert runs[0]["split"]["said"][0].startswith(f"lightning_hesd: there will be no spectra. {message}")


@pytest.mark.parametrize("strategy", [FSDPStrategy(), DeepSpeedStrategy.__new__(DeepSpeedStrategy)])
def test_strategies_that_cannot_run_here_are_refused_by_their_name(strategy: Any) -> None:
    """They need a GPU, or a package of its own; the Trainer only hands them over."""
    with pytest.raises(MisconfigurationException, match=rf"{type(strategy).__name__} shards .* ModelParallelStrategy"):
        strategies.check_strategy(SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]
