"""When analyses run, and what they may cost, with clocks that go by the test: nothing here depends on real time."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.training.compat.strategies import wait_for_device
from tests.training.logs import ListLogger
from tests.training.scripted import Epoch, ScriptedModule, loader, make_spectrum, make_trainer, run_script

SECONDS_PER_BATCH = 10  # of which an epoch of the script has two


@dataclass
class Clock:
    """A clock that stands still unless told otherwise."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Training(pl.Callback):
    """Lets the batches of training take their time; `fail_at` interrupts it in that epoch."""

    def __init__(self, clock: Clock, fail_at: int | None = None) -> None:
        self.clock = clock
        self.fail_at = fail_at

    def on_train_batch_start(self, trainer: pl.Trainer, *_args: Any) -> None:
        self.clock.now += SECONDS_PER_BATCH
        if trainer.current_epoch == self.fail_at:
            msg = "power cut"
            raise RuntimeError(msg)


def make_callback(clock: Clock, costs: Any = 5, **arguments: Any) -> HessianSpectrumCallback:
    """A callback whose analyses take `costs` seconds, or as long as a function of their number says."""
    callback = HessianSpectrumCallback(loss_fn=lambda module, _: module.weight**2, num_samples=2, **arguments)
    callback.budget._clock = clock

    def analyze(*_args: Any, **_kwargs: Any) -> Any:
        clock.now += costs(len(callback.history)) if callable(costs) else costs
        return make_spectrum(-0.1)

    callback._recorder._analyzers["training"].analyze = analyze  # type: ignore[method-assign]
    return callback


def fit(
    folder: Path,
    callback: HessianSpectrumCallback,
    *others: pl.Callback,
    epochs: int = 10,
    fail_at: int | None = None,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> pl.Trainer:
    training = Training(callback.budget._clock, fail_at)  # type: ignore[arg-type]
    arguments.setdefault("enable_checkpointing", callback.checkpoint is not None)
    trainer = make_trainer(folder, [training, callback, *others], epochs, **arguments)
    trainer.fit(ScriptedModule([Epoch(None)] * epochs), loader(), ckpt_path=ckpt_path)
    return trainer


def analyzed(callback: HessianSpectrumCallback) -> list[tuple[int, int]]:
    return [(record.epoch, record.global_step) for record in callback.history]


def epochs_in(callback: HessianSpectrumCallback) -> list[int]:
    return [record.epoch for record in callback.history]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [(0, 2), (1, 4), (2, 6), (3, 8), (4, 10)]),
        ({"every_n_epochs": 2}, [(1, 4), (3, 8)]),
        ({"epochs": range(0, 100, 3)}, [(0, 2), (3, 8)]),
        ({"epochs": []}, []),
        ({"at_start": True, "every_n_epochs": 3}, [(-1, 0), (2, 6)]),
        ({"every_n_train_steps": 3}, [(1, 3), (2, 6), (4, 9)]),
        ({"every_n_train_steps": 1, "max_overhead": None}, [(step // 2, step + 1) for step in range(10)]),
    ],
)
def test_without_a_limit_the_schedule_decides(
    tmp_path: Path, arguments: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    callback = make_callback(Clock(), **arguments)
    fit(tmp_path, callback, epochs=5)
    assert analyzed(callback) == expected


@pytest.mark.parametrize(
    ("arguments", "costs", "expected"),
    [
        # Two batches an epoch make 20 s; the k-th analysis of 5 s fits once 5 k <= 0.125 * 20 * epochs.
        ({"max_overhead": 0.125}, 5, [0, 3, 5, 7, 9]),
        ({"max_overhead": 0.25}, 5, list(range(10))),
        ({"max_overhead": 0.125, "at_start": True}, 5, [-1, 3, 5, 7, 9]),
        ({"max_overhead": 0.125, "every_n_epochs": 3}, 5, [2, 5, 8]),
        ({"max_overhead": 0.125, "epochs": [1, 2, 4, 9]}, 5, [1, 4, 9]),
        ({"max_overhead": 0.125, "every_n_train_steps": 2}, 5, [0, 3, 5, 7, 9]),
        # The next one is expected to take as long as the last one, not as long as the others on average.
        ({"max_overhead": 0.125}, lambda n: [5, 10, 5][n], [0, 3, 9]),
        ({"max_overhead": 0.125}, lambda n: [20, 0, 0, 0][n], [0]),
        ({"max_overhead": 0.125}, lambda n: 10 if n == 0 else 0.5, [0, 7, 8, 9]),
    ],
)
def test_analyses_run_as_far_as_the_training_so_far_pays_for_them(
    tmp_path: Path, arguments: dict[str, Any], costs: Any, expected: list[int]
) -> None:
    callback = make_callback(Clock(), costs, **arguments)
    fit(tmp_path, callback)
    assert epochs_in(callback) == expected
    assert len(callback.budget.state_dict()["decisions"]) <= 1, "however long the run"


def test_failed_analyses_cost_time_too(tmp_path: Path) -> None:
    def costs(number: int) -> float:
        if number == 0:
            callback.budget._clock.now += 5  # type: ignore[attr-defined]
            msg = "out of memory"
            raise MemoryError(msg)
        return 5

    callback = make_callback(Clock(), costs, max_overhead=0.125)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        fit(tmp_path, callback)
    assert epochs_in(callback) == [0, 3, 5, 7, 9]
    assert [record.spectrum is None for record in callback.history] == [True, False, False, False, False]


def test_writing_counts_and_waiting_for_the_device_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training has queued on a device is training, and what an analysis writes is part of it.

    What is written once more is neither, because the module logs a metric at the end of the epoch.
    """
    clock = Clock()
    callback = make_callback(clock, 5)

    def take(seconds: float, *_args: Any) -> None:
        clock.now += seconds

    monkeypatch.setattr("lightning_hesd.training.compat.strategies.wait_for_device", partial(take, 40))
    monkeypatch.setattr(callback.history, "save", partial(take, 7))
    fit(tmp_path, callback, epochs=1)
    state = callback.budget.state_dict()
    assert (state["training_seconds"], state["analysis_seconds"]) == (60, 12)


def test_waiting_for_a_device_means_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one of the kind Lightning has set for the process; Apple's takes no number."""
    waited: list[str] = []
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", partial(waited.append, kind))
    for device in ("cpu", "cuda:1", "mps:0"):
        wait_for_device(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device))))  # type: ignore[arg-type]
    assert waited == ["cuda", "mps"]


@pytest.mark.parametrize("stop_after", [1, 4])  # epochs with an analysis and epochs without one
def test_a_resumed_run_goes_on_with_its_budget(tmp_path: Path, stop_after: int) -> None:
    whole = make_callback(Clock(), 5, max_overhead=0.125)
    fit(tmp_path, whole)

    first = make_callback(Clock(), 5, max_overhead=0.125)
    trainer = fit(tmp_path, first, epochs=stop_after)
    first.budget._clock.now += 1e6  # type: ignore[attr-defined]  # the machine stands idle, which is no training
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    resumed = make_callback(Clock(now=-3.0), 5, max_overhead=0.125)  # the clock of a new program starts elsewhere
    fit(tmp_path, resumed, ckpt_path=tmp_path / "last.ckpt")
    assert analyzed(resumed) == analyzed(whole)
    assert resumed.budget.state_dict() == whole.budget.state_dict()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_is_decided_on_once(tmp_path: Path, resumed: bool) -> None:
    """With accumulated gradients several batches end at one step; only the first of them asks.

    A resumed run meets the last step again, when there is more time to spend than at the decision.
    """
    path = None
    for epochs in (3, 4) if resumed else (4,):
        callback = make_callback(Clock(), 5, max_overhead=0.15, every_n_train_steps=1)
        trainer = fit(tmp_path, callback, epochs=epochs, accumulate_grad_batches=2, ckpt_path=path)
        trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    # After 70 s, in the middle of epoch 3, an analysis would fit; it would be of the weights of epoch 2.
    assert analyzed(callback) == [(0, 1), (3, 4)]


def test_an_interruption_stops_the_clock(tmp_path: Path) -> None:
    callback = make_callback(Clock(), 5, max_overhead=0.125)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, callback, fail_at=4)
    callback.budget._clock.now += 1e6  # type: ignore[attr-defined]
    assert callback.budget.state_dict()["training_seconds"] == 4 * 20 + 10


def test_refitting_goes_on_and_a_new_trainer_starts_anew(tmp_path: Path) -> None:
    callback = make_callback(Clock(), 5, max_overhead=0.125)
    for _ in range(2):
        trainer = fit(tmp_path, callback, epochs=4)
        assert epochs_in(callback) == [0, 3]
        assert callback.budget.state_dict()["training_seconds"] == 80
        callback.budget._clock.now += 1e6  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = 6
    trainer.fit(ScriptedModule([Epoch(None)] * 6), loader())
    assert epochs_in(callback) == [0, 3, 5]
    assert callback.budget.state_dict()["training_seconds"] == 120


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [5 / 20, 10 / 40, 15 / 60]),
        ({"at_start": True}, [None, 10 / 20, 15 / 40, 20 / 60]),
        ({"every_n_train_steps": 3}, [5 / 30, 10 / 60]),
        ({"max_overhead": 0.2}, [5 / 20, 10 / 60]),
    ],
)
def test_overhead_is_logged(tmp_path: Path, arguments: dict[str, Any], expected: list[float | None]) -> None:
    logger = ListLogger()
    callback = make_callback(Clock(), 5, **arguments)
    trainer = fit(tmp_path, callback, epochs=3, logger=logger)
    logged = [metrics.get("hesd/overhead") for metrics in logger.metrics if "hesd/c_t" in metrics]
    assert logged == [pytest.approx(value) for value in expected]  # which went through float32
    assert trainer.callback_metrics["hesd/overhead"] == pytest.approx(expected[-1])


def test_analyses_of_another_callback_are_not_training(tmp_path: Path) -> None:
    clock = Clock()
    cheap, dear = make_callback(clock, 5, at_start=True), make_callback(clock, 100, at_start=True, name="dear")
    trainer = fit(tmp_path, cheap, dear, epochs=3)
    assert trainer.callback_metrics["hesd/overhead"] == pytest.approx(20 / 60)
    assert trainer.callback_metrics["dear/overhead"] == pytest.approx(400 / 60)


def test_the_real_clock_runs(tmp_path: Path) -> None:
    """With a limit that no machine is fast enough to reach."""
    callback = HessianSpectrumCallback(loss_fn=lambda module, _: module.weight**2, num_samples=2, max_overhead=1e-9)
    trainer = run_script(tmp_path, [Epoch(None)] * 3, [callback])
    assert epochs_in(callback) == [0]
    assert trainer.callback_metrics["hesd/overhead"] > 0
    assert callback.budget.state_dict()["training_seconds"] > 0
