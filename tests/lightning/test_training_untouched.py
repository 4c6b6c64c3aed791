"""Training with the callback is bit-identical to training without it."""

from __future__ import annotations

import collections
import csv
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import IterableDataset, WeightedRandomSampler
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_hesd import HessianSpectrumCallback

from .modules import (
    NOISES,
    Classifier,
    DataModule,
    Digits,
    NoisyDigits,
    Recorder,
    callback,
    digits,
    fit,
    freeze,
    global_generators,
    loader,
    plain_loss,
)

# Modules and data that an analysis could disturb ----------------------------------------------------------------------


class Metrics(Classifier):
    """Logs metrics as objects, and computes one by hand at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.acc = MulticlassAccuracy(10)
        self.collection = MetricCollection({"top2": MulticlassAccuracy(10, top_k=2), "micro": MulticlassAccuracy(10)})
        self.by_hand = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        logits = self(batch[0])
        self.acc(logits, batch[1])
        self.collection(logits, batch[1])
        self.by_hand.update(loss)
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.log_dict(self.collection, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()


class Meter:
    """The running average of many a training script."""

    def __init__(self) -> None:
        self.total, self.count, self.last, self.trace = 0.0, 0, None, []

    def update(self, value: Tensor) -> None:
        self.total += value.item()
        self.count += 1
        self.last = value.detach().clone()
        self.trace.append(self.count)


class SlottedMeter:
    """A running average that keeps its values in slots instead of a `__dict__`."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor) -> None:
        self.total += value.item()
        self.count += 1


class Hoarder(Classifier):
    """Keeps all it can from every step, and uses it at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.by_kind: dict[str, Any] = {"classes": [], "nested": {"sums": [0]}}
        self.steps = 0
        self.last_logits: Tensor | None = None
        self.meter = Meter()
        self.seen_classes: set[int] = set()
        self.recent: collections.deque[float] = collections.deque(maxlen=3)
        self.per_class: collections.defaultdict[int, int] = collections.defaultdict(int)
        self.total_in_place = torch.zeros(1)
        self.totals_of_numpy = np.zeros(2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        self.by_kind["classes"].extend(batch[1].tolist())
        self.by_kind["nested"]["sums"].append(float(batch[0].sum()))
        self.steps += 1
        self.last_logits = self(batch[0]).detach()
        self.meter.update(loss)
        self.seen_classes.update(batch[1].tolist())
        self.recent.append(loss.item())
        self.per_class[int(batch[1][0])] += 1
        self.total_in_place += loss.detach()
        self.totals_of_numpy += loss.item()
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean_of_list", torch.stack(self.losses).mean())
        self.log("samples_in_epoch", float(len(self.by_kind["classes"])))
        self.log("meter", self.meter.total / self.meter.count)
        self.losses.clear()
        self.by_kind["classes"] = []


class CounterHoarder(Classifier):
    """A Counter is a dict whose `update` adds instead of replacing."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: collections.Counter[int] = collections.Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.classes.update(batch[1].tolist())
        return super().training_step(batch, batch_idx)


class SlottedHoarder(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.meter = SlottedMeter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.meter.update(loss)
        return loss


class MovingAverage(Classifier):
    """A buffer updated as an exponential moving average; through `.data`, autograd does not count the change."""

    def __init__(self, *, through_data: bool) -> None:
        super().__init__()
        self.through_data = through_data
        self.register_buffer("center", torch.zeros(64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        center = self.center.data if self.through_data else self.center
        center.mul_(0.9).add_(0.1 * batch[0].mean(0))
        return super().training_step([batch[0] - self.center, *batch[1:]], batch_idx)


class Switching(Classifier):
    """Trains with its batch normalisation in eval mode, as fine-tuning does."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(6), nn.Dropout(0.3))

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()


class AugmentingModule(Classifier):
    """Augments whole batches, from a generator of its own, and keeps running statistics of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(1)
        self.register_buffer("mean", torch.zeros(64))
        self.num_batches = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x = batch[0] + 0.3 * torch.randn(batch[0].shape, generator=self.rng)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.num_batches += 1
        return [x - self.mean, *batch[1:]]


class AugmentingDataModule(DataModule):
    """Augments whole batches, the more the later, from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(lambda: loader(shuffle=True))
        self.rng = np.random.default_rng(1)
        self.num_batches = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.num_batches += 1
        noise = torch.tensor(self.rng.normal(size=batch[0].shape), dtype=torch.float32)
        return [batch[0] + 0.1 * self.num_batches * noise, *batch[1:]]


class Stream(IterableDataset[Any]):
    """Goes on where it stopped: what is read once is gone."""

    def __init__(self) -> None:
        self.cursor = 0

    def __iter__(self) -> Any:
        while self.cursor < 200:
            self.cursor += 1
            yield digits()[0][self.cursor], digits()[1][self.cursor], self.cursor


class RaisesEveryOtherTime:
    """A `loss_fn` that leaves a mess behind before it fails, in every second epoch."""

    def __call__(self, module: Any, batch: Any) -> Tensor:
        loss = plain_loss(module, batch)
        if module.current_epoch % 2 == 1:
            module.train()
            module.mess = torch.rand(1)
            np.random.rand()  # noqa: NPY002
            module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
            module.net[1].running_mean.add_(1.0)
            msg = "every second time"
            raise OSError(msg)
        return loss


# Two runs, and everything about them ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Scenario:
    """A training run, and the callbacks to leave it untouched."""

    module: Callable[[], pl.LightningModule] = Classifier
    data: Callable[[], Any] = lambda: loader(shuffle=True)
    callbacks: Callable[[], list[HessianSpectrumCallback]] = lambda: [callback()]
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    records: int = 2
    failures: int = 0


def outcome(trainer: pl.Trainer, recorder: Recorder, data: Any) -> dict[str, Any]:
    """Collect whatever a run leaves behind, except what the callback is there to add."""
    module = trainer.lightning_module
    train_loader = trainer.train_dataloader
    return {
        "random number generators": global_generators(),
        "batches": freeze(recorder.batches),
        "modes": recorder.modes,
        "final modes": [m.training for m in module.modules()],
        "weights and buffers": freeze(module.state_dict()),
        "gradients": freeze([p.grad for p in module.parameters()]),
        "optimizer": freeze(trainer.optimizers[0].state_dict()["state"]),
        "scheduler": freeze(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        "metrics": freeze({k: v for k, v in trainer.callback_metrics.items() if not k.startswith("hesd")}),
        "rows": rows(Path(trainer.log_dir) / "metrics.csv"),
        "attributes": freeze({k: v for k, v in vars(module).items() if not k.startswith("_")}),
        "metric objects": freeze([vars(metric) for metric in module.modules() if isinstance(metric, Metric)]),
        "dataset": freeze(vars(train_loader.dataset)),
        "loader's generator": freeze(train_loader.generator),
        "datamodule": freeze([getattr(data, name, None) for name in ("rng", "num_batches")]),
        "progress": (trainer.global_step, trainer.current_epoch),
    }


def rows(path: Path) -> list[dict[str, str]]:
    """Read the CSV logger's rows, without the callback's columns and the rows that hold nothing else."""
    with path.open(newline="", encoding="utf-8") as file:
        read = [{k: v for k, v in row.items() if not k.startswith("hesd") and v != ""} for row in csv.DictReader(file)]
    return [row for row in read if set(row) - {"epoch", "step"}]


def assert_untouched(scenario: Scenario, tmp_path: Path) -> None:
    """Run twice, with and without the callbacks, and compare."""
    outcomes = []
    for callbacks in ([], scenario.callbacks()):
        recorder, data = Recorder(), scenario.data()
        folder = tmp_path / ("with" if callbacks else "without")
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "lightning_hesd", RuntimeWarning)
            trainer = fit(
                folder,
                recorder,
                *callbacks,
                module=scenario.module(),
                data=data,
                logger=CSVLogger(folder),
                **scenario.trainer,
            )
        assert len([w for w in caught if w.category is RuntimeWarning]) == (scenario.failures if callbacks else 0)
        outcomes.append(outcome(trainer, recorder, data))
    without, with_callback = outcomes
    assert [c.history for c in callbacks]
    for c in callbacks:
        assert len(c.history) == scenario.records
        assert sum(record.error is not None for record in c.history) == scenario.failures / len(callbacks)
    assert without["batches"], "the run must have trained for the comparison to mean anything"
    for key, value in without.items():
        assert with_callback[key] == value, f"{key} differ"


def weighted_loader() -> Any:
    return loader(sampler=WeightedRandomSampler(torch.arange(40.0), 24, generator=torch.Generator().manual_seed(2)))


SCENARIOS = {
    "plain": Scenario(),
    "dropout": Scenario(lambda: Classifier(nn.Dropout(0.5))),
    "batch_norm": Scenario(lambda: Classifier(nn.BatchNorm1d(6))),
    **{
        f"augmentation_from_{name}": Scenario(data=lambda noise=noise: loader(Digits(augment=noise), shuffle=True))
        for name, noise in NOISES.items()
    },
    "dataset_with_generator": Scenario(data=lambda: loader(NoisyDigits(), shuffle=True)),
    "loader_with_generator": Scenario(
        data=lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    ),
    "sampler_with_generator": Scenario(data=weighted_loader),
    "stream": Scenario(data=lambda: loader(Stream()), trainer={"limit_train_batches": 4}),
    "datamodule": Scenario(data=lambda: DataModule(lambda: loader(shuffle=True))),
    "torchmetrics": Scenario(Metrics),
    "torchmetrics_in_train_mode": Scenario(Metrics, callbacks=lambda: [callback(mode="train")]),
    "hoarder": Scenario(Hoarder),
    "hoarder_at_steps": Scenario(Hoarder, callbacks=lambda: [callback(every_n_train_steps=3)], records=3),
    "counter": Scenario(CounterHoarder),
    "slots": Scenario(SlottedHoarder),
    "moving_average": Scenario(lambda: MovingAverage(through_data=False)),
    "moving_average_through_data": Scenario(lambda: MovingAverage(through_data=True)),
    "augmenting_module": Scenario(AugmentingModule),
    "augmenting_datamodule": Scenario(data=AugmentingDataModule),
    "accumulation": Scenario(
        trainer={"accumulate_grad_batches": 2},
        callbacks=lambda: [callback(every_n_train_steps=1)],
        records=6,
    ),
    "clipping": Scenario(trainer={"gradient_clip_val": 0.1}),
    "train_mode": Scenario(
        lambda: Classifier(nn.BatchNorm1d(6), nn.Dropout(0.3)), callbacks=lambda: [callback(mode="train")]
    ),
    "keep_mode": Scenario(Switching, callbacks=lambda: [callback(mode="keep", every_n_train_steps=2)], records=5),
    "mixed_modes": Scenario(Switching, callbacks=lambda: [callback(every_n_train_steps=2)], records=5),
    "at_start": Scenario(
        lambda: Classifier(nn.BatchNorm1d(6), nn.Dropout(0.3)), callbacks=lambda: [callback(at_start=True)], records=3
    ),
    "several_epochs": Scenario(trainer={"max_epochs": 4}, callbacks=lambda: [callback(2)]),
    "failing": Scenario(
        lambda: Classifier(nn.BatchNorm1d(6), nn.Dropout(0.3)),
        callbacks=lambda: [callback(loss_fn=RaisesEveryOtherTime(), on_error="warn")],
        trainer={"max_epochs": 4},
        records=4,
        failures=2,
    ),
    "two_callbacks": Scenario(
        Hoarder, callbacks=lambda: [callback(name="hesd"), callback(name="hesd_train", mode="train", seed=1)]
    ),
    "bf16_mixed": Scenario(lambda: Classifier(nn.Dropout(0.3)), trainer={"precision": "bf16-mixed"}),
    "bf16_true": Scenario(lambda: Classifier(nn.Dropout(0.3)), trainer={"precision": "bf16-true"}),
    "float64": Scenario(lambda: Classifier(nn.Dropout(0.3)), trainer={"precision": "64-true"}),
    "recomputed_products": Scenario(
        lambda: Classifier(nn.BatchNorm1d(6), nn.Dropout(0.3)),
        callbacks=lambda: [callback(mode="train", strategy="recompute")],
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_bit_identical(name: str, tmp_path: Path) -> None:
    assert_untouched(SCENARIOS[name], tmp_path)


@pytest.mark.parametrize("persistent", [True, False])
def test_bit_identical_with_workers(persistent: bool, tmp_path: Path) -> None:
    def data() -> Any:
        dataset = Digits(size=16, augment=NOISES["torch"])
        return loader(dataset, shuffle=True, num_workers=2, persistent_workers=persistent)

    assert_untouched(Scenario(data=data, callbacks=lambda: [callback(num_samples=8)]), tmp_path)


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", plain_loss(self, batch))


def test_bit_identical_with_validation_and_checkpoints(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [callback(checkpoint="highest_c_t", at_start=True)]):
        folder = tmp_path / str(len(callbacks))
        checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1)
        trainer = fit(
            folder,
            checkpoint,
            *callbacks,
            module=Validated(nn.Dropout(0.3)),
            data=DataModuleWithValidation(lambda: loader(shuffle=True)),
            enable_checkpointing=True,
        )
        saved = [torch.load(path, weights_only=False) for path in sorted(checkpoint.best_k_models)]
        assert len(saved) == 2
        states.append(
            {
                "checkpoints": freeze([{k: c[k] for k in ("state_dict", "optimizer_states")} for c in saved]),
                "files": [Path(path).name for path in sorted(checkpoint.best_k_models)],
                "ranking": freeze(checkpoint.best_model_score),
                "best": Path(checkpoint.best_model_path).name,
                "random number generators": global_generators(),
                "metrics": freeze({k: v for k, v in trainer.callback_metrics.items() if not k.startswith("hesd")}),
            }
        )
    assert states[0] == states[1]


class DataModuleWithValidation(DataModule):
    def val_dataloader(self) -> Any:
        return loader(Digits(16))


class WritesToTheLogger(Classifier):
    """Talks to the logger behind Lightning's back, which `self.log` being silent does not stop."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.logger.experiment.add_scalar("direct/loss", loss.detach(), self.global_step)
        self.loggers[0].log_metrics({"direct/again": loss.item()}, self.global_step)
        return loss


@pytest.mark.parametrize(
    "schedule", [{}, {"every_n_train_steps": 5}, {"at_start": True, "epochs": []}], ids=["epochs", "steps", "start"]
)
def test_no_events_of_the_module_from_an_analysis(schedule: dict[str, Any], tmp_path: Path) -> None:
    events = []
    for callbacks in ([], [callback(**schedule)]):
        folder = tmp_path / str(len(callbacks))
        fit(folder, *callbacks, module=WritesToTheLogger(), logger=TensorBoardLogger(folder), max_epochs=1)
        read = EventAccumulator(str(folder / "lightning_logs" / "version_0")).Reload()
        # Lightning adds the epoch to whatever is logged, so it comes with the callback's scalars too.
        tags = [tag for tag in read.Tags()["scalars"] if tag != "epoch" and not tag.startswith("hesd/")]
        events.append({tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags})
    assert len(callbacks[0].history) == 1
    assert read.Tags()["histograms"] == ["hesd/density"]
    assert len(events[0]["direct/loss"]) == len(events[0]["direct/again"]) == 5
    assert events[1] == events[0]


def test_every_analysis_finds_the_module_as_training_left_it(tmp_path: Path) -> None:
    """Nothing that one analysis leaves behind, not even inside the module's own objects, reaches the next one."""
    first, second = callback(name="first", mode="train"), callback(name="second", mode="train")
    module = Classifier(nn.BatchNorm1d(6), nn.Dropout(0.3))
    fit(tmp_path, first, second, module=module, data=loader(Digits(augment=NOISES["torch"])))
    for one, other in zip(first.history, second.history, strict=True):
        assert freeze(one.spectrum.nodes) == freeze(other.spectrum.nodes)
        assert one.spectrum.loss == other.spectrum.loss
