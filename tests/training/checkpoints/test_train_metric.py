"""Which values of a logged metric belong to the analyzed weights: no other is ever ranked."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchmetrics import MeanMetric, SumMetric

from lightning_hesd import HessianCheckpoint
from lightning_hesd.spectra.selection import Candidate
from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
from tests.training.modules import Classifier, callback, fit, loader, own_warnings, plain_loss
from tests.training.scripted import earliest, keeping

EPOCHS = 3
STEPS = 5
"""Optimizer steps in an epoch."""


class Logging(Classifier):
    """Logs in many ways what tells when it was logged: the global step before, times a hundred, plus one."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self.mean, self.total = MeanMetric(), SumMetric()

    @property
    def now(self) -> float:
        return 100.0 * self.global_step + 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % self.every == 0:
            self.log("step", self.now, on_step=True, on_epoch=False)
        self.log("both", self.now, on_step=True, on_epoch=True, batch_size=1)
        self.log("max", self.now, on_step=False, on_epoch=True, reduce_fx="max")
        if batch_idx == 0:
            self.log("early", self.now, on_step=False, on_epoch=True)
        self.mean.update(self.now)
        self.total.update(1.0)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("total", self.total, on_step=False, on_epoch=True)
        return plain_loss(self, batch)

    def on_train_start(self) -> None:
        self.log("at_start", self.now)

    def on_train_epoch_start(self) -> None:
        self.log("start", self.now)

    def on_train_batch_end(self, *_args: Any) -> None:
        self.log("batch_end", self.now, on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        self.log("end", self.now)
        self.trainer.callback_metrics["direct"] = torch.tensor(self.now)
        others: dict[str, Any] = {"text": "fine", "vector": torch.ones(2), "complex": torch.tensor(1j)}
        self.trainer.callback_metrics[1] = torch.tensor(1.0)  # type: ignore[index]  # no name
        self.trainer.callback_metrics["numpy"] = np.float32(self.now)  # type: ignore[assignment]
        self.trainer.callback_metrics.update(others)


analyzing = functools.partial(callback, steps=2, num_samples=8, loss_fn=plain_loss)


class Spied(HessianCheckpoint):
    """Remembers the metric with which each step was ranked."""

    def __init__(self, key: str, folder: Path) -> None:
        super().__init__(earliest, train_metric=key, tolerance=1e9, require_mp=False, dirpath=folder)
        self.seen: dict[int, float] = {}

    def _consider(self, trainer: Any, record: SpectrumRecord, score: float, criterion: float) -> Candidate | None:
        assert trainer.global_step == record.global_step
        self.seen[record.global_step] = score
        return super()._consider(trainer, record, score, criterion)


def ranked(
    folder: Path, *keys: str, module: Logging | None = None, schedule: dict[str, Any] | None = None, **arguments: Any
) -> dict[str, tuple[dict[int, float], str]]:
    """Train once, and return by metric with which values steps were ranked, and what was said."""
    checkpoints = {key: Spied(key, folder) for key in keys}
    observer = analyzing(**{"on_error": "warn", **(schedule or {})})
    trainer = {"max_epochs": EPOCHS, "enable_checkpointing": True, "limit_val_batches": 0, "data": loader()}
    with own_warnings() as said:
        fit(folder, observer, *checkpoints.values(), module=module or Logging(), **{**trainer, **arguments})
    assert not any(name.startswith("hesd") for record in observer.history for name in record.metrics)
    found = {}
    for key, checkpoint in checkpoints.items():
        texts = [text for text in said if "does not rank" in text and f"train_metric={key!r}" in text]
        assert len(texts) <= 1
        found[key] = (checkpoint.seen, "".join(texts))
    return found


def recorded(folder: Path, *keys: str) -> dict[str, dict[int, float]]:
    """Return the metrics of the records of a training, by step."""
    [index] = folder.rglob("index.json")
    history = SpectrumHistory.load(index.parent)
    return {key: {r.global_step: r.metrics[key] for r in history if key in r.metrics} for key in keys}


AT_ENDS = {  # of epochs: what each metric is then
    "step": [401, 901, 1401],
    "both": [201, 701, 1201],
    "both_epoch": [201, 701, 1201],
    "both_step": [401, 901, 1401],
    "max": [401, 901, 1401],
    "early": [1, 501, 1001],
    "mean": [201, 701, 1201],
    "total": [5, 5, 5],
    "batch_end": [501, 1001, 1501],
    "end": [501, 1001, 1501],
    "direct": [501, 1001, 1501],
    "numpy": [501, 1001, 1501],
}


def test_at_the_ends_of_epochs(tmp_path: Path) -> None:
    found = ranked(tmp_path, *AT_ENDS, "at_start", "start", "nowhere")
    assert found.pop("at_start")[0] == found.pop("start")[0] == {}
    those = r"not among those logged so far, \['at_start', 'batch_end', .*'total', 'vector'\]"
    assert re.search(those, found.pop("nowhere")[1])
    expected = {key: dict(zip([5, 10, 15], values, strict=True)) for key, values in AT_ENDS.items()}
    assert found == {key: (values, "") for key, values in expected.items()}
    others = ("at_start", "start", "text", "vector", "complex")
    assert recorded(tmp_path, *AT_ENDS, *others) == {**expected, **{key: {} for key in others}}


EVERY_STEP = {2: 101.0, 4: 301.0, 6: 501.0, 8: 701.0, 10: 901.0}

WITHIN = {
    "step": EVERY_STEP,
    "both": EVERY_STEP,
    # Step 10 is the last of its epoch, whose mean it waits for.
    "both_epoch": {10: 701.0},
    "max": {10: 901.0},
    "mean": {10: 701.0},
    "end": {10: 1001.0},
    "batch_end": {10: 1001.0},
    "direct": {10: 1001.0},
}


def test_within_epochs(tmp_path: Path) -> None:
    found = ranked(tmp_path, *WITHIN, "start", schedule={"every_n_train_steps": 2}, max_epochs=2)
    assert found.pop("start")[0] == {}
    assert {key: seen for key, (seen, _) in found.items()} == WITHIN
    for key, (seen, said) in found.items():
        assert bool(said) == (len(seen) < 5), key
        assert not said or "does not rank the analysis of epoch 0 after step 2, nor later ones like it" in said
    # Records wait until the weights change: for the module's `on_train_batch_end`, and for means over the epoch.
    later = {"batch_end": {step: 100.0 * step + 1 for step in EVERY_STEP}, "both": {**EVERY_STEP, 10: 701.0}}
    assert recorded(tmp_path, *WITHIN, "start") == {**WITHIN, **later, "start": {}}


def test_one_that_is_logged_now_and_then(tmp_path: Path) -> None:
    """The logged value stays, and is not that of the steps after."""
    schedule = {"every_n_train_steps": 1}
    found = ranked(tmp_path, "step", "both", module=Logging(every=3), schedule=schedule, max_epochs=1)
    seen, said = found["step"]
    assert seen == {1: 1, 4: 301}
    assert "after step 2, nor later ones like it: the metric was last logged for older weights" in said
    assert list(found["both"][0]) == [1, 2, 3, 4, 5]
    assert recorded(tmp_path, "step") == {"step": seen}
    accumulated = ranked(tmp_path / "a", "step", schedule=schedule, max_epochs=1, accumulate_grad_batches=2)
    assert accumulated["step"] == ({1: 1, 2: 101, 3: 201}, "")


def test_values_of_an_earlier_run_say_nothing_of_the_next(tmp_path: Path) -> None:
    """The second run ends within an epoch, after as many batches as the first one had."""

    class Stopping(Logging):
        def on_train_batch_end(self, *_args: Any) -> None:
            self.trainer.should_stop = self.global_step == 4

    observer = analyzing()
    for folder, batches in (("first", 4), ("second", STEPS)):
        limits = {"limit_train_batches": batches, "limit_val_batches": 0, "min_epochs": 0, "max_epochs": 1}
        fit(tmp_path / folder, observer, module=Stopping(every=2), data=loader(), **limits)
        assert [record.global_step for record in observer.history] == [4]
        assert "step" not in observer.history[-1].metrics, folder  # it was logged for step 3


EVERY_FOURTH = {"val_check_interval": 4, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    ("arguments", "schedule", "expected", "missed"),
    [
        ({"check_val_every_n_epoch": 2}, {}, {10: 1001}, True),
        ({"check_val_every_n_epoch": 2}, {"epochs": [1]}, {10: 1001}, False),
        ({"val_check_interval": 2}, {}, {}, True),  # the last one is before the last step
        (EVERY_FOURTH, {"every_n_train_steps": 2}, {4: 401, 8: 801, 12: 1201}, True),
    ],
)
def test_of_validation(
    arguments: dict[str, Any], schedule: dict[str, Any], expected: dict[int, float], missed: bool, tmp_path: Path
) -> None:
    class WithValidation(Logging):
        def val_dataloader(self) -> Any:
            return loader()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.now, batch_size=1)

    module = WithValidation()
    seen, said = ranked(tmp_path, "val", module=module, schedule=schedule, limit_val_batches=1, **arguments)["val"]
    assert seen == expected
    assert bool(said) == missed
    assert recorded(tmp_path, "val") == {"val": seen}


def test_it_raises_if_the_callback_is_to_raise(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="does not rank the analysis of epoch 0 after step 2"):
        ranked(tmp_path, "step", module=Logging(every=3), schedule={"every_n_train_steps": 1, "on_error": "raise"})


def test_a_batch_of_several_steps(tmp_path: Path) -> None:
    """With manual optimization a batch may end with any step."""

    class Manual(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(plain_loss(self, batch))
                optimizer.step()
            self.log("step", self.now)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    module, observer = Manual(), analyzing(every_n_train_steps=2)
    module.automatic_optimization = False
    fit(tmp_path, observer, module=module, data=loader(), max_epochs=1)
    assert [record.metrics["step"] for record in observer.history] == [201, 401, 601, 801, 1001]


def test_a_metric_that_is_no_longer_logged_is_old(tmp_path: Path) -> None:
    class Once(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 0:
                self.log("once", 1.0, on_step=False, on_epoch=True)
            return plain_loss(self, batch)

    seen, said = ranked(tmp_path, "once", module=Once(), max_epochs=2)["once"]
    assert seen == {5: 1.0}
    assert "does not rank the analysis of epoch 1 after step 10" in said


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update``:UserWarning")
def test_metrics_that_the_module_resets_are_logged_as_without_the_callback(tmp_path: Path) -> None:
    """Lightning computes them when they are asked for, and would keep the value."""

    class Resetting(Logging):
        def on_train_epoch_end(self) -> None:
            self.total.reset()
            self.mean.update(1e6)

    def logged(*callbacks: Any) -> dict[str, Any]:
        trainer = fit(tmp_path, *callbacks, module=Resetting(), data=loader(), max_epochs=1)
        return {key: float(trainer.callback_metrics[key]) for key in ("total", "mean")}

    assert logged(analyzing()) == logged()


def test_the_weights_wait_with_the_analysis(tmp_path: Path) -> None:
    """The analysis of the last step is ranked at the end of the epoch, after others have had the module."""

    class Changing(Logging):
        def on_train_batch_end(self, *_args: Any) -> None:
            with torch.no_grad():
                self.net[0].weight.mul_(0.5)

    states: dict[int, torch.Tensor] = {}
    checkpoint = keeping(train_metric="max", tolerance=1e9, dirpath=tmp_path)

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        # Later ones are beside the weights.
        states.setdefault(module.global_step, module.net[0].weight.detach().clone())
        return plain_loss(module, batch)

    observer = analyzing(loss_fn=loss_fn, checkpoint=checkpoint, every_n_train_steps=STEPS, on_error="warn")
    with pytest.warns(RuntimeWarning, match="changed after their analysis"):
        fit(tmp_path, observer, module=Changing(), data=loader(), max_epochs=2, enable_checkpointing=True)
    assert [c.global_step for c in checkpoint.candidates] == [5, 10]
    for candidate in checkpoint.candidates:
        saved = torch.load(candidate.path, weights_only=True)
        assert torch.equal(saved["state_dict"]["net.0.weight"], states[candidate.global_step])
