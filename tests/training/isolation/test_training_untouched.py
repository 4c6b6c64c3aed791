"""Training with the callback is bit-identical to training without it."""

import collections
import copy
import csv
import dataclasses
import functools
import io
import itertools
import multiprocessing
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import Sampler, default_collate, get_worker_info
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.training.isolation import training_snapshot
from lightning_hesd.training.isolation.tracked_states import TrackedValue
from tests.training.broken import out_of_luck
from tests.training.logs import rows
from tests.training.modules import (
    NOISES,
    Classifier,
    DataModule,
    Digits,
    Recorder,
    Validated,
    callback,
    fit,
    freeze,
    global_generators,
    loader,
    noise_of_all,
    own_warnings,
    plain_loss,
)
from tests.training.samples.drawn import FiniteStream

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


class SlottedMeter:
    """A running average that keeps its values in slots instead of a `__dict__`."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor) -> None:
        self.total += value.item()
        self.count += 1


class MovingAverage(Classifier):
    """Buffers updated as exponential moving averages; of a change through `.data` autograd takes no notice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(64))
        self.register_buffer("center_through_data", torch.zeros(64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for center in (self.center, self.center_through_data.data):
            center.mul_(0.9).add_(0.1 * batch[0].mean(0))
        return super().training_step([batch[0] - self.center - self.center_through_data, *batch[1:]], batch_idx)


class Switching(Classifier):
    """Trains with its batch normalization in eval mode, as fine-tuning does."""

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


class Ranked(Validated):
    """Saves checkpoints that are ranked by the outcome of the validation."""

    def configure_callbacks(self) -> list[pl.Callback]:
        return [ModelCheckpoint(monitor="val_loss", save_top_k=-1)]


def raises_every_other_time(module: Any, batch: Any) -> Tensor:
    """Leave a mess behind and fail, in every second epoch."""
    loss = plain_loss(module, batch)
    if module.current_epoch % 2 == 0:
        return loss
    module.train()
    module.mess = torch.rand(1)
    np.random.rand()  # noqa: NPY002
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    module.net[1].running_mean.add_(1.0)
    module.trainer.callbacks[0].batches.append("mess")
    return out_of_luck()


# Two runs, and everything about them ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Scenario:
    """A training run, and the options of the callbacks to leave it untouched."""

    module: Callable[[], pl.LightningModule] = Classifier
    data: Callable[[], Any] = lambda: loader(shuffle=True)
    callbacks: list[dict[str, Any]] = dataclasses.field(default_factory=lambda: [{}])
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    records: int = 2
    failures: int = 0


def saved_by(checkpoint: ModelCheckpoint) -> Any:
    """Return the names of the files of a checkpoint callback, and the weights and optimizer states in them."""
    files = {Path(path).name: torch.load(path, weights_only=False) for path in sorted(checkpoint.best_k_models)}
    assert len(files) == 2
    return freeze({name: [saved["state_dict"], saved["optimizer_states"]] for name, saved in files.items()})


def outcome(trainer: pl.Trainer, recorder: Recorder) -> dict[str, Any]:
    """Collect whatever a run leaves behind, except what the callback is there to add."""
    module = trainer.lightning_module
    train_loader = trainer.train_dataloader
    users = [c for c in trainer.checkpoint_callbacks if type(c) is ModelCheckpoint]
    return {
        "checkpoints": [(freeze(c.best_model_score), Path(c.best_model_path).name, saved_by(c)) for c in users],
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
        "progress": (trainer.global_step, trainer.current_epoch),
    }


def assert_untouched(scenario: Scenario, tmp_path: Path) -> None:
    """Run twice, with and without the callbacks, and compare."""
    outcomes = []
    for callbacks in ([], [callback(**options) for options in scenario.callbacks]):
        recorder = Recorder()
        folder = tmp_path / ("with" if callbacks else "without")
        parts = {"module": scenario.module(), "data": scenario.data(), "logger": CSVLogger(folder)}
        with own_warnings() as said:
            trainer = fit(folder, recorder, *callbacks, **parts, **scenario.trainer)
        assert len(said) == (1 if callbacks and scenario.failures else 0)
        outcomes.append(outcome(trainer, recorder))
    without, with_callback = outcomes
    assert [c.history for c in callbacks]
    for c in callbacks:
        assert len(c.history) == scenario.records
        assert sum(record.error is not None for record in c.history) == scenario.failures / len(callbacks)
    assert without["batches"], "the run must have trained for the comparison to mean anything"
    for key, value in without.items():
        assert with_callback[key] == value, f"{key} differ"


def batch_norm_and_dropout() -> Classifier:
    return Classifier(nn.BatchNorm1d(6), nn.Dropout(0.3))


def by_workers() -> Any:
    workers = {"num_workers": 2, "persistent_workers": True, "worker_init_fn": print}
    return loader(Digits(16, NOISES["torch"]), shuffle=True, **workers)


CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
TRAIN_MODE = {"name": "hesd_train", "mode": "train"}

SCENARIOS = {
    "augmentation": Scenario(data=lambda: loader(Digits(augment=noise_of_all), shuffle=True)),
    "stream": Scenario(data=lambda: loader(FiniteStream(200)), trainer={"limit_train_batches": 4}),
    "persistent_workers": Scenario(data=by_workers, callbacks=[{"num_samples": 8}]),
    "torchmetrics": Scenario(Metrics, callbacks=[{}, TRAIN_MODE]),
    "torchmetrics_at_steps": Scenario(Metrics, callbacks=[{"every_n_train_steps": 3}], records=3),
    "moving_average": Scenario(MovingAverage),
    "augmenting_module": Scenario(AugmentingModule),
    "accumulation_and_clipping": Scenario(trainer=CLIPPED, callbacks=[{"every_n_train_steps": 2}], records=3),
    "train_mode": Scenario(
        batch_norm_and_dropout, callbacks=[TRAIN_MODE, {**TRAIN_MODE, "name": "hesd_again", "strategy": "recompute"}]
    ),
    "mixed_modes": Scenario(
        Switching,
        callbacks=[{"every_n_train_steps": 3}, {"name": "hesd_kept", "mode": "keep", "every_n_train_steps": 3}],
        records=3,
    ),
    "validation_and_checkpoints": Scenario(
        lambda: Ranked(nn.Dropout(0.3)),
        callbacks=[{"checkpoint": "highest_c_t", "at_start": True}],
        trainer={"enable_checkpointing": True},
        records=3,
    ),
    "failing": Scenario(
        batch_norm_and_dropout,
        callbacks=[{"loss_fn": raises_every_other_time, "on_error": "warn"}],
        trainer={"max_epochs": 4},
        records=4,
        failures=2,
    ),
    "bf16-mixed": Scenario(lambda: Classifier(nn.Dropout(0.3)), trainer={"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_bit_identical(name: str, tmp_path: Path) -> None:
    assert_untouched(SCENARIOS[name], tmp_path)


def test_every_analysis_finds_the_module_as_training_left_it(tmp_path: Path) -> None:
    """Nothing that one analysis leaves behind, not even inside the module's own objects, reaches the next one."""
    first, second = callback(name="first", mode="train"), callback(name="second", mode="train")
    fit(tmp_path, first, second, module=batch_norm_and_dropout(), data=loader(Digits(augment=NOISES["torch"])))
    found = [[(freeze(r.spectrum.nodes), r.spectrum.loss) for r in each.history] for each in (first, second)]
    assert found[0] == found[1]


# Code that reaches out of its module ----------------------------------------------------------------------------------


class Priorities(Sampler[int]):
    """Draws the samples of highest priority first, which training changes."""

    def __init__(self) -> None:
        self.priorities = torch.arange(24.0)
        self.epoch = 0
        self.rng = torch.Generator().manual_seed(1)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Any:
        noise = torch.rand(24, generator=self.rng)
        return iter(torch.argsort(self.priorities + self.epoch * noise).tolist())


class Curriculum(Digits):
    """Weighs its samples by what training writes into it."""

    difficulty = 0

    def __init__(self) -> None:
        super().__init__(24)
        self.weights = torch.ones(24)
        self.factors = np.ones(24)
        self.notes = np.array([{"read": 0}, None], dtype=object)
        self.shared = multiprocessing.Value("d", 1.0)
        self.flags = bytearray(2)

    def __getitem__(self, position: int) -> Any:
        x, y, _ = super().__getitem__(position)
        return x * self.weights[position] * float(self.factors[position]) * self.shared.value, y, position


class Guided(DataModule):
    def __init__(self) -> None:
        super().__init__(lambda: loader(Curriculum(), sampler=Priorities()))
        self.seen: list[int] = []
        self.table = pd.DataFrame({"loss": np.zeros(24)})


class Neighbor(pl.Callback):
    """What a training step might find in the list of callbacks."""

    def __init__(self) -> None:
        self.counts = {"steps": 0}
        self.average = torch.zeros(64)
        self.network = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        self.accuracy = MulticlassAccuracy(10)
        self.lock = threading.Lock()


class Reaching(Classifier):
    """Acts in each training step, before it computes the loss."""

    counts: dict[str, int] = {}  # noqa: RUF012 - as in many a module
    steps = 0

    def __init__(self, act: Callable[[Any, Any], None]) -> None:
        super().__init__()
        type(self).counts, type(self).steps = {"steps": 0}, 0
        self.act = act
        self.meter = SlottedMeter()
        self.meters = [SlottedMeter()]
        self.ema = copy.deepcopy(self.net)
        self.replay: dict[str, Any] = {"x": torch.zeros(3, 64), "cursor": 0, "parts": functools.partial(print, [0])}
        self.sums = [torch.zeros(1), np.zeros(1)]
        self.by_class: collections.defaultdict[int, list[Any]] = collections.defaultdict(list)
        self.queue: queue.Queue[int] = queue.Queue()
        self.recent: collections.deque[int] = collections.deque(maxlen=3)
        self.classes, self.counted = set[int](), collections.Counter[int]()
        self.count, self.walk = itertools.count(), iter(range(1000))
        self.center = nn.Parameter(torch.zeros(64))
        self.center_optimizer = torch.optim.Adam([self.center], lr=0.1)
        self.text, self.file = io.StringIO(), None

    def on_fit_start(self) -> None:
        self.file = Path(self.trainer.default_root_dir, "notes").open("w", encoding="utf-8")  # noqa: SIM115

    def teardown(self, stage: str) -> None:
        self.file.close()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.act(self, batch)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        schedule = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "frequency": 10**6}
        return [optimizer], [schedule]


def slow_down(module: Reaching, steps: float) -> None:
    """Let what was counted decide on the training."""
    module.trainer.optimizers[0].param_groups[0]["lr"] = 0.05 / (1 + steps)


def step_schedule(module: Reaching, batch: Any) -> None:
    module.lr_schedulers().step()


def change_optimizer(module: Reaching, batch: Any) -> None:
    optimizer = module.optimizers()
    optimizer.param_groups[0]["lr"] *= 0.9
    for state in module.trainer.optimizers[0].state.values():
        state["exp_avg"].mul_(0.9)
        state["step"] += 1
    module.toggle_optimizer(optimizer)
    module.untoggle_optimizer(optimizer)


def let_optimizers_step(module: Reaching, batch: Any) -> None:
    distance = ((batch[0] - module.center) ** 2).mean()
    module.center_optimizer.zero_grad()
    distance.backward()
    module.center_optimizer.step()
    optimizer = module.optimizers()
    plain_loss(module, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def stop_early(module: Reaching, batch: Any) -> None:
    if not module.training:  # stands for any condition that only batches of an analysis meet
        trainer = module.trainer
        trainer.should_stop = True
        trainer.limit_train_batches = trainer.fit_loop.max_epochs = 1
        trainer.fit_loop.epoch_loop.batch_progress.current.ready += 7
        trainer.callback_metrics["own"] = torch.ones(1)
        trainer.callbacks.append(Neighbor())
        trainer.optimizers.clear()
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(mode=True)


def use_callbacks(module: Reaching, batch: Any) -> None:
    neighbor: Any = module.trainer.callbacks[0]
    neighbor.counts["steps"] += 1
    neighbor.average.lerp_(batch[0].mean(0), 0.1)
    neighbor.latest = batch[0]
    neighbor.network(batch[0][:, :2]).sum().backward()
    neighbor.optimizer.step()
    neighbor.accuracy.update(module(batch[0]), batch[1])
    slow_down(module, neighbor.counts["steps"] + float(neighbor.average.sum()))


def use_datamodule(module: Reaching, batch: Any) -> None:
    datamodule = module.trainer.datamodule
    datamodule.seen.append(len(batch[0]))
    datamodule.table.loc[batch[2].tolist(), "loss"] += 1
    slow_down(module, len(datamodule.seen) + datamodule.table["loss"].sum())


def use_dataset(module: Reaching, batch: Any) -> None:
    dataset = module.trainer.train_dataloader.dataset
    dataset.weights[batch[2]] *= 1.1
    dataset.factors[batch[2].numpy()] *= 0.9
    dataset.notes[0]["read"] += 1
    dataset.shared.value *= 1.01
    dataset.flags[0] += 1
    Curriculum.difficulty += 1
    slow_down(module, Curriculum.difficulty + dataset.flags[0] + dataset.notes[0]["read"])


def use_sampler(module: Reaching, batch: Any) -> None:
    sampler = module.trainer.train_dataloader.sampler
    sampler.set_epoch(sampler.epoch + 1)
    sampler.priorities[batch[2]] += 24
    sampler.priorities.numpy()[0] += 1  # which autograd does not notice
    torch.rand(3, generator=sampler.rng)


def use_own_objects(module: Reaching, batch: Any) -> None:
    type(module).steps += 1
    module.counts["steps"] += 1
    for meter in (module.meter, *module.meters):
        meter.update(batch[0].mean())
    with torch.no_grad():
        for average, value in zip(module.ema.parameters(), module.net.parameters(), strict=True):
            average.lerp_(value, 0.1)
    module.replay["x"][module.replay["cursor"] % 3] = batch[0][0]
    module.replay["cursor"] += 1
    module.replay["parts"].args[0][0] += 1
    module.sums[0].add_(1)
    module.sums[1] += 1
    module.sums.append(module.sums[0].clone())
    module.by_class[int(batch[1][0])].append(len(batch))
    module.queue.put(1)
    module.recent.append(int(batch[1][0]))
    module.classes.update(batch[1].tolist())
    module.counted.update(batch[1].tolist())  # adds instead of replacing
    total = module.steps + module.counts["steps"] + len(module.sums) + len(module.by_class) + module.queue.qsize()
    slow_down(module, total + float(module.sums[1][0]) + module.replay["parts"].args[0][0])


def use_iterators_and_files(module: Reaching, batch: Any) -> None:
    module.text.write("step ")
    module.file.write("step ")
    csv.writer(module.file).writerow(["step"])
    slow_down(module, next(module.count) + next(module.walk) + len(module.text.getvalue()))


def save_and_wait(module: Reaching, batch: Any) -> None:
    folder = Path(module.trainer.default_root_dir)
    module.trainer.save_checkpoint(folder / f"step{module.global_step}-{module.training}.ckpt")
    module.trainer.strategy.barrier()
    assert torch.equal(module.all_gather(torch.ones(1)), torch.ones(1))
    assert get_worker_info() is None
    assert module.trainer.log_dir == str(folder)


def use_everything(module: Reaching, batch: Any) -> None:
    """What differs afterwards says which of these was not undone."""
    for act in (step_schedule, change_optimizer, use_callbacks, use_datamodule, use_dataset, use_sampler):
        act(module, batch)
    use_iterators_and_files(module, batch)
    use_own_objects(module, batch)


REACHES = [use_everything, let_optimizers_step, stop_early, save_and_wait]


def reached(trainer: pl.Trainer, folder: Path, data: Any, neighbor: Any) -> dict[str, Any]:
    """Collect what a training step could reach."""
    module: Any = trainer.lightning_module
    dataset, sampler = trainer.train_dataloader.dataset, trainer.train_dataloader.sampler
    return {
        "weights": freeze(module.state_dict()),
        "optimizers": freeze([o.state_dict() for o in (*trainer.optimizers, module.center_optimizer)]),
        "schedule": freeze(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        "progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop, trainer.max_epochs),
        "limits": (trainer.limit_train_batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready),
        "callbacks": [type(c).__name__ for c in trainer.callbacks if not isinstance(c, HessianSpectrumCallback)],  # type: ignore[attr-defined]
        "metrics": sorted(key for key in trainer.callback_metrics if not key.startswith("hesd")),
        "neighbor": freeze([neighbor.counts, neighbor.average, neighbor.accuracy.tp]),
        "its optimizer": freeze([neighbor.optimizer.state_dict(), neighbor.network.state_dict()]),
        "datamodule": [data.seen, data.table.to_json()],
        "dataset": freeze([dataset.weights, dataset.factors, dataset.notes.tolist(), dataset.shared.value]),
        "flags": (bytes(dataset.flags), Curriculum.difficulty),
        "sampler": freeze([sampler.priorities, sampler.epoch, sampler.rng]),
        "classes": (module.steps, dict(module.counts)),
        "meters": freeze([module.meter, *module.meters]),
        "containers": freeze([module.replay["x"], module.replay["parts"].args[0], module.sums, dict(module.by_class)]),
        "queues": (list(module.queue.queue), list(module.recent)),
        "counts": (module.classes, module.counted),
        "iterators": (next(module.count), next(module.walk), module.text.getvalue()),
        "files": sorted((p.name, p.read_text()) for p in folder.glob("notes")),
        "checkpoints": sorted(p.name for p in folder.glob("*.ckpt")),
        "settings": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "random number generators": global_generators(),
    }


def reaching_run(
    act: Callable[[Any, Any], None], folder: Path, *callbacks: HessianSpectrumCallback, kind: Any = Reaching
) -> tuple[dict[str, Any], list[str]]:
    """Train, and return what can be reached afterwards, and what the package warned of."""
    folder.mkdir(exist_ok=True)
    Curriculum.difficulty = 0
    torch.manual_seed(0)
    neighbor, data = Neighbor(), Guided()
    with own_warnings() as said:
        trainer = fit(folder, neighbor, *callbacks, module=kind(act), data=data)
    return reached(trainer, folder, data, neighbor), said


@pytest.mark.parametrize("act", REACHES, ids=lambda act: act.__name__)
def test_bit_identical_where_the_training_step_reaches_out(act: Any, tmp_path: Path) -> None:
    observer = callback(every_n_train_steps=4, at_start=True, num_samples=8, steps=2)
    without, _ = reaching_run(act, tmp_path / "without")
    with_callback, said = reaching_run(act, tmp_path / "with", observer)
    for key, value in without.items():
        assert with_callback[key] == value, f"{key} differ"
    assert [record.error for record in observer.history] == [None] * 2
    assert not said


class Counting(Classifier):
    """Counts the batches that it makes, wherever it can, and lets their numbers decide on the training."""

    calls = 0

    def collate(self, samples: list[Any]) -> Any:
        neighbor, data = self.trainer.callbacks[0], self.trainer.datamodule
        self.calls += 1
        neighbor.counts["steps"] += 1
        neighbor.average += 1
        data.seen.append(len(samples))
        slow_down(self, neighbor.counts["steps"] + neighbor.average[0].item() + len(data.seen))
        return default_collate(samples)


class CountedData(Guided):
    def train_dataloader(self) -> Any:
        return loader(Digits(24), collate_fn=self.trainer.lightning_module.collate)


def test_reading_the_samples_leaves_no_traces_beyond_the_data(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [callback(num_samples=8, steps=2)]):
        neighbor, data = Neighbor(), CountedData()
        module = fit(tmp_path, neighbor, *callbacks, module=Counting(), data=data).lightning_module
        found.append(freeze([module.state_dict(), module.calls, neighbor.counts, neighbor.average, data.seen]))
    assert found[0] == found[1]


# Changes that cannot be undone ----------------------------------------------------------------------------------------

HIDDEN: list[Any] = []
"""Out of reach of the module and the Trainer."""


class Streaming(Reaching):
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.generator = (number for number in range(100))
        self.extra = iter(loader(Digits(16), shuffle=True))


def read_generator(module: Any, batch: Any) -> None:
    slow_down(module, next(module.generator))


def read_loader(module: Any, batch: Any) -> None:
    slow_down(module, float(next(module.extra)[0].sum()))


def step_hidden_optimizer(module: Any, batch: Any) -> None:
    weight, optimizer = HIDDEN
    optimizer.step()
    slow_down(module, weight.item())


def write_large_array(module: Any, batch: Any) -> None:
    factors = module.trainer.train_dataloader.dataset.factors
    factors[0] += 1
    slow_down(module, factors[0])


REFUSALS = {
    read_generator: r"reads from the iterator `self\.generator`",
    read_loader: r"reads from the iterator `self\.extra`",
    step_hidden_optimizer: r"lets an optimizer step \(SGD, to which neither",
    write_large_array: r"writes to an array of which no copy is kept because it is large \(.*`trainer\.train_",
}


@pytest.mark.parametrize("act", REFUSALS, ids=lambda act: act.__name__)
def test_changes_that_cannot_be_undone_are_refused(act: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training goes on as if there were no analyses; with a `loss_fn` that does without, there are some."""
    if act is write_large_array:
        monkeypatch.setattr(training_snapshot, "COPIED_BYTES", 100)
    outcomes = []
    shared: dict[str, Any] = {"num_samples": 8, "steps": 2, "epochs": [0]}
    observers = [callback(**shared, on_error="warn"), callback(**shared, loss_fn=plain_loss)]
    for name, callbacks in {"without": [], "refused": observers[:1], "advised": observers[1:]}.items():
        weight = nn.Parameter(torch.ones(()))
        weight.grad = torch.ones(())
        HIDDEN[:] = [weight, torch.optim.SGD([weight], lr=0.1)]
        found, _ = reaching_run(act, tmp_path / name, *callbacks, kind=Streaming)
        outcomes.append(found)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    [refused], [advised] = (observer.history for observer in observers)
    assert re.search(f"DisturbedTrainingError: the function that is analyzed {REFUSALS[act]}", refused.error)
    assert "pass the callback `loss_fn=`, a function" in refused.error
    assert advised.error is None


def test_a_large_tensor_is_found_changed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not copied, so one evaluation has changed it; there is no second one in this run."""
    monkeypatch.setattr(training_snapshot, "COPIED_BYTES", 60)
    calls = []

    def loss_fn(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        module.trainer.train_dataloader.dataset.weights[batch[2]] *= 1.1
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, on_error="warn", loss_fn=loss_fn)
    _, said = reaching_run(lambda *_: None, tmp_path, observer)
    assert len(calls) == 1
    assert len(said) == 1, "later analyses fail for the same reason"
    found, later = (record.error for record in observer.history)
    assert "changed `trainer.train_dataloader.dataset.weights` in place, of which no copy is kept" in found
    assert "changed in place `trainer.train_dataloader.dataset.weights` in an earlier analysis" in later

    monkeypatch.undo()
    reaching_run(lambda *_: None, tmp_path, observer)
    assert [record.error for record in observer.history] == [None] * 2, "another run begins anew"


def test_a_large_tensor_that_is_given_other_memory_gets_its_own_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_snapshot, "COPIED_BYTES", 0)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        weights = module.trainer.train_dataloader.dataset.weights
        weights.data = weights + 1
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn)
    found, _ = reaching_run(lambda *_: None, tmp_path, observer)
    assert found["dataset"][0] == freeze(torch.ones(24))
    assert [record.error for record in observer.history] == [None] * 2


def test_a_large_array_in_the_memory_of_a_tensor_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be made writable again if it were made read-only."""
    monkeypatch.setattr(training_snapshot, "COPIED_BYTES", 60)
    neighbor: Any = Neighbor()
    neighbor.values = torch.zeros(64).numpy()

    def loss_fn(module: Any, batch: Any) -> Tensor:
        neighbor.values[0] += float(module.current_epoch == 1)
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn, on_error="warn")
    with own_warnings() as said:
        fit(tmp_path, neighbor, observer)
    [text] = said
    assert re.search(r"`trainer\.callbacks\[0\]\.values` changed .* and was not restored", text)
    assert [record.error for record in observer.history] == [None] * 2
    neighbor.values[0] = 0  # as it can be


def test_a_failed_restoration_goes_on_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def restore(state: TrackedValue) -> None:
        if str(state.place).endswith("refusing"):
            out_of_luck()

    monkeypatch.setattr(TrackedValue, "restore", restore)
    neighbor: Any = Neighbor()
    neighbor.refusing, neighbor.forgetful = np.zeros(2), np.zeros(2)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        neighbor.refusing += 1
        neighbor.forgetful += 1
        neighbor.counts["steps"] += 1
        neighbor.average += 1
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn, on_error="warn")
    with own_warnings() as texts:
        trainer = fit(tmp_path, neighbor, observer)
    said = "".join(texts)
    assert "callbacks[0].refusing` changed during an analysis and was not restored (OSError('no luck'))" in said
    assert re.search(r"`trainer\.callbacks\[0\]\.forgetful` changed .* \(it does not take its former values\)", said)
    assert trainer.state.finished
    assert [record.error for record in observer.history] == [None] * 2
    assert neighbor.counts == {"steps": 0}
    assert not neighbor.average.any()


class Monitor(pl.Callback):
    """Counts on a thread of its own, and lets training steps count as well."""

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.steps = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.stop.wait(0.001):
            self.ticks.append(0.0)

    def on_fit_start(self, *_: Any) -> None:
        self.thread.start()

    def teardown(self, *_: Any, **__: Any) -> None:
        self.stop.set()
        self.thread.join()


def test_objects_of_threads_are_left_to_them(tmp_path: Path) -> None:
    monitor = Monitor()

    def loss_fn(module: Any, batch: Any) -> Tensor:
        monitor.steps += 1
        ticks = len(monitor.ticks)
        while len(monitor.ticks) == ticks:  # until the thread gets its turn
            pass
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn, on_error="warn")
    with own_warnings() as said:
        fit(tmp_path, monitor, observer, data=loader(Digits(16)))
    assert [record.error for record in observer.history] == [None] * 2
    assert len(said) == 2, "once for each attribute"
    for name, message in zip((".steps", ".ticks"), said, strict=True):
        assert f"`trainer.callbacks[0]{name}` changed during an analysis and was not restored" in message
        assert "it was left to the threads that may share it" in message
        assert "pass the callback `loss_fn=`" in message
    assert len(monitor.ticks) >= monitor.steps > 2, "nothing of what the thread did is lost"


def test_objects_that_cannot_be_read_are_skipped(tmp_path: Path) -> None:
    class Closed:
        def __getattribute__(self, name: str) -> Any:
            raise ValueError(name)

    class Endless(list[int]):
        def __iter__(self) -> Any:
            raise ValueError

        __len__ = __iter__

    neighbor: Any = Neighbor()
    odd = [Closed(), Endless(), {Closed(): 1}, memoryview(b""), object(), torch.eye(2).to_sparse(), re.compile("")]
    neighbor.odd = [*odd, torch.zeros(2, device="meta"), threading.local(), {"last": 0}]

    def loss_fn(module: Any, batch: Any) -> Tensor:
        neighbor.odd[-1]["last"] += 1
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn)
    fit(tmp_path, neighbor, observer)
    assert [record.error for record in observer.history] == [None] * 2
    assert neighbor.odd[-1] == {"last": 0}
