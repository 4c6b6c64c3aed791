"""The monitor in real trainings: its values, its alarm, what it costs, and that training does not notice it."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_hesd import SharpnessMonitor
from lightning_hesd.numerics.analysis.tracking import SEARCH_PRODUCTS, TRACKING_PRODUCTS
from lightning_hesd.training.compat import strategies
from lightning_hesd.training.sharpness_monitor import GRADIENTS_PER_MEASUREMENT, GRADIENTS_PER_SEARCH
from lightning_hesd.training.tracked_record import TrackedRecord, gives_alarm
from tests.oracles import dense_hessian
from tests.training.broken import out_of_luck
from tests.training.logs import read_csv
from tests.training.modules import (
    SIZE,
    Classifier,
    Copies,
    Recorder,
    callback,
    fit,
    freeze,
    global_generators,
    loader,
    own_warnings,
    pickled,
    plain_loss,
    samples,
)
from tests.training.samples.drawn import FiniteStream


def monitor(every: int = 5, **arguments: Any) -> SharpnessMonitor:
    """Return a monitor whose failures fail the test unless it says otherwise."""
    return SharpnessMonitor(every, **{"num_samples": 16, "on_error": "raise", **arguments})


class Sgd(Classifier):
    """Trained by SGD, with a learning rate that is multiplied by `factor` after each step."""

    def __init__(self, lr: float = 0.1, factor: float = 1.0) -> None:
        super().__init__()
        self.lr, self.factor = lr, factor

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Adam(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


# Values ---------------------------------------------------------------------------------------------------------------


def test_tracked_values_are_those_of_the_dense_hessian(tmp_path: Path) -> None:
    copies, tracked = Copies(), monitor(5, num_samples=SIZE)
    fit(tmp_path, tracked, copies, module=Sgd(), max_epochs=4)
    assert [record.global_step for record in tracked.history] == [1, 2, 4, 5, 10, 15, 20]
    everything = samples(list(range(SIZE)))
    for record in tracked.history[::2]:
        net = copies.networks[record.global_step]
        hessian = dense_hessian(net, [everything], plain_loss)
        largest = torch.linalg.eigvalsh(hessian)[-1].item()
        assert 0.9 * largest <= record.tracked_lambda_max <= largest * (1 + 1e-5)
        assert record.tracked_stability_ratio == pytest.approx(record.tracked_lambda_max / (2 / 0.1))
        assert record.headroom == pytest.approx(1 / record.tracked_stability_ratio)
        gradients = torch.autograd.grad(plain_loss(net, everything), list(net.parameters()))
        slope = torch.cat([g.flatten() for g in gradients]).double()
        assert record.batch_sharpness == pytest.approx(float(slope @ hessian @ slope / (slope @ slope)), rel=1e-4)


def test_a_full_analysis_calibrates(tmp_path: Path) -> None:
    """On the same samples the ratio is that of the two estimates alone; the epochs end between two measurements."""
    spectra = callback(num_samples=SIZE, steps=60, preconditioner="optimizer")
    tracked = monitor(4, num_samples=SIZE)
    fit(tmp_path, spectra, tracked, module=Adam(), max_epochs=3)
    assert [record.global_step for record in tracked.history] == [1, 2, 4, 5, 8, 10, 12, 15]
    by_step = {record.global_step: record for record in tracked.history}
    assert by_step[4].calibration is by_step[4].headroom is None
    for full in spectra.history:
        found = by_step[full.global_step]
        assert 1 - 1e-5 <= found.calibration <= 1.01
        assert found.calibration == pytest.approx(full.spectrum.lambda_max / found.tracked_lambda_max)
        if full.global_step < 8:  # Adam's averages are young
            assert found.tracked_stability_ratio is None
            continue
        assert 0.95 <= found.tracked_stability_ratio / full.stability_ratio <= 1 + 1e-5
        assert found.headroom == pytest.approx(1 / found.tracked_stability_ratio / found.calibration)
    assert by_step[8].calibration == by_step[5].calibration


def test_fewer_samples_are_calibrated_to_those_of_the_analysis(tmp_path: Path) -> None:
    spectra, tracked = callback(num_samples=SIZE, steps=60), monitor(5, num_samples=8)
    fit(tmp_path, tracked, spectra, module=Sgd())
    assert [record.global_step for record in tracked.history] == [1, 2, 4, 5, 10], "once per step"
    found, full = tracked.history[-1], spectra.history[-1].spectrum
    assert found.calibration * found.tracked_lambda_max == pytest.approx(full.lambda_max)
    assert found.calibration < 0.95
    metrics = {key for record in spectra.history for key in record.metrics}
    assert metrics == {"train_loss", "train_loss_step", "train_loss_epoch"}, "those of the network"


def test_what_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    tracked = monitor()
    trainer = fit(tmp_path, tracked, callback(), module=Sgd(), logger=logger)
    keys = {"tracked_lambda_max", "tracked_stability_ratio", "batch_sharpness", "calibration", "headroom"}
    last = tracked.history[-1].scalars("sharpness")
    assert set(last) == {f"sharpness/{key}" for key in keys}
    for key, value in last.items():
        assert trainer.callback_metrics[key] == pytest.approx(value)
    rows = read_csv(tmp_path / "metrics.csv")
    logged = [float(row["sharpness/tracked_lambda_max"]) for row in rows if row["sharpness/tracked_lambda_max"]]
    found = [record.tracked_lambda_max for record in tracked.history]
    assert all(min(abs(value - other) for other in logged) < 1e-5 for value in found)
    assert len(logged) == len(found) + 2, "a search follows each analysis, of which both are right after a measurement"


# Training -------------------------------------------------------------------------------------------------------------


class Noisy(Classifier):
    """With dropout, batch norm, an accuracy, and a counter that is no buffer."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.3), nn.BatchNorm1d(6))
        self.accuracy = MulticlassAccuracy(10)
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def trained(tmp_path: Path, *callbacks: pl.Callback) -> Any:
    module, recorder = Noisy(), Recorder()
    trainer = fit(tmp_path, recorder, *callbacks, module=module, accumulate_grad_batches=2, max_epochs=3)
    metrics = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("sharpness")}
    gradients = [p.grad for p in module.parameters()]
    parts = [module.state_dict(), trainer.optimizers[0].state_dict(), gradients, module.count, metrics]
    return freeze([*parts, recorder.batches, recorder.modes]), global_generators()


def test_training_is_bit_identical(tmp_path: Path) -> None:
    tracked = monitor(1, mode="deterministic")
    assert trained(tmp_path, tracked) == trained(tmp_path)
    assert [record.global_step for record in tracked.history] == list(range(1, 10))


def test_the_cost_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all gradients and products of a run, each of which calls `torch.autograd.grad` once per batch."""
    grad, calls = torch.autograd.grad, [0]

    def counting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return grad(*arguments, **options)

    class Counts(pl.Callback):
        """Comes after the monitor."""

        seen: list[int] = []  # noqa: RUF012

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(calls[0])

    monkeypatch.setattr(torch.autograd, "grad", counting)
    tracked = monitor(1, num_samples=8, mode="eval")
    fit(tmp_path, tracked, Counts(), module=Adam(), max_epochs=4)
    costs = [after - before for before, after in pairwise(Counts.seen)]
    assert len(costs) == len(tracked.history) - 1
    for cost, record in zip(costs, tracked.history[1:], strict=True):
        assert record.products <= 1 + TRACKING_PRODUCTS
        assert cost == 2 + record.products
        assert 2 + 2 * record.products <= GRADIENTS_PER_MEASUREMENT == 12
    assert 2 + 2 * tracked.history[0].products <= GRADIENTS_PER_SEARCH == 2 + 2 * (SEARCH_PRODUCTS + 1)


# The alarm ------------------------------------------------------------------------------------------------------------


def last_loss(trainer: pl.Trainer) -> float:
    return float(trainer.callback_metrics["train_loss_step"])


def test_an_alarm_precedes_divergence(tmp_path: Path) -> None:
    """The learning rate grows by a tenth in every step; the loss of chance is 2.3."""
    tracked = monitor(5, num_samples=SIZE)
    with own_warnings() as said:
        trainer = fit(tmp_path, tracked, module=Sgd(0.05, 1.1), max_epochs=14)
    assert last_loss(trainer) > 5
    alarms = [text for text in said if "near the edge of stability" in text]
    assert len(alarms) == 1
    step = next(
        late.global_step for early, late in pairwise(tracked.history) if max(early.headroom, late.headroom) < 1.2
    )
    assert f"after step {step}" in alarms[0]
    assert "`headroom=1.2`" in alarms[0]
    assert step < 60 < trainer.global_step


def test_no_alarm_in_a_healthy_training(tmp_path: Path) -> None:
    tracked = monitor(5, num_samples=SIZE)
    with own_warnings() as said:
        trainer = fit(tmp_path, tracked, module=Sgd(0.1), max_epochs=14)
    assert last_loss(trainer) < 2
    assert min(record.headroom for record in tracked.history) > 2
    assert not said


def test_early_stopping_stops_before_divergence(tmp_path: Path) -> None:
    stop = EarlyStopping(
        "sharpness/headroom", mode="max", divergence_threshold=1.0, patience=10**9, check_on_train_epoch_end=True
    )
    with own_warnings() as said:
        trainer = fit(tmp_path, monitor(5, num_samples=SIZE), stop, module=Sgd(0.05, 1.1), max_epochs=14)
    assert 0 < stop.stopped_epoch < 13
    assert last_loss(trainer) < 5
    assert len(said) <= 1


def test_one_low_value_is_no_alarm() -> None:
    quiet: list[list[float | None]] = [[], [0.5], [0.5, 2.0, 0.5]]
    for headrooms in [*quiet, [2.0, 1.1, 1.1], [1.1, None, 1.1, 3.0]]:
        records = [TrackedRecord(step, 3, 2.0, None, None, None, value) for step, value in enumerate(headrooms)]
        assert gives_alarm(records, 1.2) is (headrooms not in quiet)


# Resuming, copies -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """With the same samples, and without a second alarm."""
    whole, first, second = (monitor(5, dataloader=loader(), seed=seed) for seed in (0, 0, 1))

    def alarms(tracked: SharpnessMonitor, folder: Path, ckpt_path: Path | None = None) -> int:
        save = ModelCheckpoint(folder, filename="half", every_n_epochs=6, save_top_k=-1)
        arguments: dict[str, Any] = {"ckpt_path": ckpt_path, "enable_checkpointing": True, "max_epochs": 8}
        with own_warnings() as said:
            fit(folder, tracked, save, module=Sgd(0.05, 1.2), **arguments)
        return len([text for text in said if "edge of stability" in text])

    assert alarms(whole, tmp_path / "whole") == 1
    assert alarms(first, tmp_path / "first") == 1
    assert alarms(second, tmp_path / "second", tmp_path / "first" / "half.ckpt") == 0
    steps = [record.global_step for record in whole.history]
    assert [record.global_step for record in second.history] == steps
    assert second.history[: steps.index(30) + 1] == first.history[: steps.index(30) + 1]
    assert second._analyzer.samples._drawn == first._analyzer.samples._drawn


def test_a_damaged_state_is_refused() -> None:
    tracked = monitor()
    for shape in ((2, 3), (7,)):
        with pytest.raises(ValueError, match="`records` of a SharpnessMonitor must be"):
            tracked.load_state_dict({"records": torch.zeros(shape, dtype=torch.float64), "samples": {}})
    for value in (torch.nan, torch.inf):
        records = torch.full((1, 7), value, dtype=torch.float64)
        with pytest.raises(ValueError, match="`global_step` and `products` of a tracked record must be finite"):
            tracked.load_state_dict({"records": records, "samples": {}})
    empty = monitor()
    empty.load_state_dict(tracked.state_dict())
    assert empty.history == []


def test_the_original_shows_the_records_of_its_copy(tmp_path: Path) -> None:
    tracked = monitor()
    copied = copy.deepcopy(tracked)
    fit(tmp_path, copied, module=Sgd())
    assert tracked.history == copied.history != []
    again = pickled(copied)
    assert again.history == copied.history
    assert again.every_n_train_steps == 5
    assert again._tracker._vectors == []
    assert len(copied._tracker._vectors) == 1


# What can go wrong ----------------------------------------------------------------------------------------------------


class Unknown(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return closure()


def of_two_rates(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": first}, {"params": others, "lr": 0.2}], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (Unknown, "the stability threshold of Unknown is not known; those of SGD, Adam"),
        (of_two_rates, "the parameter groups of SGD have different stability thresholds"),
    ],
)
def test_without_a_threshold_the_eigenvalue_is_tracked(optimizer: Any, reason: str, tmp_path: Path) -> None:
    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters())

    tracked = monitor()
    with own_warnings() as said:
        fit(tmp_path, tracked, module=Module())
    [text] = said
    assert "`sharpness/headroom` is not known" in text
    assert reason in text
    assert all(record.tracked_lambda_max > 0 and record.headroom is None for record in tracked.history)


def test_a_failure_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    tracked = monitor(1, loss_fn=out_of_luck, on_error="warn", mode="eval")
    with own_warnings() as said:
        trainer = fit(tmp_path, tracked, module=Sgd())
    [text] = said
    assert "SharpnessMonitor has no value after step 1. OSError: no luck" in text
    assert trainer.global_step == 10
    assert tracked.history == []
    with pytest.raises(OSError, match="no luck"):
        fit(tmp_path, monitor(1, loss_fn=out_of_luck, mode="eval"), module=Sgd())


@pytest.mark.parametrize(
    ("sharded", "reason"),
    [(True, "OSError: no luck"), (False, "pass the callback `loss_fn=`")],
    ids=["sharded", "by hand"],
)
def test_what_cannot_be_tracked_has_a_reason_and_no_number(
    sharded: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked, module = monitor(1, on_error="warn"), Sgd()
    module.automatic_optimization = sharded
    if sharded:  # which takes several processes
        monkeypatch.setattr(strategies, "check_whole", out_of_luck)
    with own_warnings() as said:
        fit(tmp_path, tracked, module=module)
    [text] = said
    assert "SharpnessMonitor will not track the sharpness. " in text
    assert reason in text
    assert "HessianSpectrumCallback" not in text
    assert tracked.history == []


def test_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(strategies.MisconfigurationException, match="another callback with `name='sharpness'`"):
        fit(tmp_path, monitor(), callback(name="sharpness"), module=Sgd())
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own check
        fit(tmp_path, monitor(), monitor(), module=Sgd())
    fit(tmp_path, monitor(), monitor(name="other"), module=Sgd())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every_n_train_steps` must be a positive integer"),
        ({"num_samples": 0}, "`num_samples` must be a positive integer"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"headroom": float("inf")}, "`headroom` must be a finite number above 0"),
        ({"headroom": True}, "`headroom` must be a finite number above 0"),
        ({"mode": "trian"}, "`mode` must be"),
        ({"on_error": "ignore"}, "`on_error` must be"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor(**arguments)


def test_options_that_it_does_not_have() -> None:
    for option in ("steps", "probes", "track_eigenvectors"):
        with pytest.raises(TypeError, match=f"SharpnessMonitor has no option '{option}'"):
            monitor(**{option: 7})
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_sample'"):
        monitor(num_sample=1, num_samples=2)


def test_batches_that_cannot_be_drawn_are_kept_from_training(tmp_path: Path) -> None:
    tracked = monitor()
    fit(tmp_path, tracked, module=Sgd(), data=loader(FiniteStream(99)), limit_train_batches=5)
    assert [record.global_step for record in tracked.history] == [1, 2, 4, 5, 10]
