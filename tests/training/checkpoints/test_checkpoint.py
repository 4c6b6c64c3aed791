"""HessianCheckpoint in a real Trainer, judged by the weights in the files it leaves."""

import contextlib
import errno
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.strategies import DDPStrategy

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.training.checkpoints.placement import keep_weights
from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
from tests.training.broken import out_of_luck
from tests.training.modules import Validated, callback, fit, own_warnings
from tests.training.scripted import (
    Epoch,
    ScriptedModule,
    ScriptedSource,
    epoch_of,
    keeping,
    loader,
    make_trainer,
    run_script,
)


@contextlib.contextmanager
def warns(pattern: str) -> Iterator[None]:
    """Expect a warning of the package; unlike pytest.warns, let others of its warnings pass."""
    with pytest.warns(RuntimeWarning) as caught:
        yield
    assert any(re.search(pattern, str(warning.message)) for warning in caught)


SCRIPT = [
    Epoch(-0.9, lambda_max=1.0, loss=0.5, accuracy=0.50),
    Epoch(-0.2, lambda_max=4.0, loss=0.12, accuracy=0.99),
    Epoch(None, lambda_max=9.0, loss=0.10, accuracy=1.00),
    Epoch(-0.3, lambda_max=2.0, loss=0.11, accuracy=1.00),
    Epoch(-0.1, lambda_max=3.0, loss=0.30, accuracy=0.90),
]


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("highest_c_t", {"tolerance": 0.0}, 3),
        ("highest_c_t", {"tolerance": 0.05}, 1),
        ("lowest_max_eigenvalue", {"tolerance": 1.0}, 3),
        ("lowest_max_eigenvalue", {"tolerance": 1.0, "require_mp": False}, 0),
        ("lowest_max_eigenvalue", {"tolerance": 0.005, "train_metric": "train_acc"}, 3),
        ("highest_c_t", {"tolerance": 0.15, "train_metric": "train_acc"}, 4),
        ("highest_c_t", {"tolerance": 0.0, "train_metric": "train_acc", "train_metric_mode": "min"}, 0),
    ],
)
def test_the_file_it_names_holds_the_weights_of_the_pick(
    rule: Any, options: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    """What is picked is tested against brute force in `test_selection.py`."""
    checkpoint = HessianCheckpoint(rule, dirpath=tmp_path, save_last=True, **options)
    run_script(tmp_path, SCRIPT, [ScriptedSource(SCRIPT), checkpoint])
    assert epoch_of(checkpoint.best_model_path) == expected
    assert epoch_of(str(tmp_path / "last.ckpt")) == len(SCRIPT) - 1
    kept = {str(path) for path in tmp_path.glob("*epoch=*.ckpt")}
    assert kept == {*checkpoint.best_k_models, checkpoint.best_model_path}


def test_only_files_that_can_still_be_picked_stay_on_disk(tmp_path: Path) -> None:
    checkpoint = HessianCheckpoint(dirpath=tmp_path)
    run_script(tmp_path, SCRIPT, [ScriptedSource(SCRIPT), checkpoint])
    # Epoch 1 has the better C_t, epoch 3 the better loss; epoch 4's loss is out of reach.
    assert sorted(epoch_of(str(path)) for path in tmp_path.glob("*.ckpt")) == [1, 3]
    kept = {"epoch=1-step=4.ckpt": torch.tensor(-0.2), "epoch=3-step=8.ckpt": torch.tensor(-0.3)}
    assert checkpoint.best_k_models == {str(tmp_path / f"hesd-highest_c_t-{name}"): kept[name] for name in kept}
    assert checkpoint.best_model_score == torch.tensor(-0.2)


def spectra(**options: Any) -> HessianSpectrumCallback:
    """A callback that analyzes the scripted module; its loss is least after the first epoch."""
    return HessianSpectrumCallback(loss_fn=lambda module, _: (module.weight - 1) ** 2, num_samples=2, **options)


class Bringing(ScriptedModule):
    """A library's module, with a checkpoint callback of its own."""

    def __init__(self, script: list[Epoch], brought: Checkpoint) -> None:
        super().__init__(script)
        self.brought = brought

    def configure_callbacks(self) -> list[Any]:
        return [self.brought]


by_accuracy = partial(ModelCheckpoint, monitor="train_acc", mode="max", save_on_train_epoch_end=True)


class Own(ModelCheckpoint):
    """A library's subclass."""


@pytest.mark.parametrize(
    ("make", "kept", "way"),
    [
        (by_accuracy, True, "first"),
        (by_accuracy, True, "last"),
        (by_accuracy, True, "module"),
        (lambda: ModelCheckpoint(save_last=True), True, "last"),
        (lambda: ModelCheckpoint(dirpath=tempfile.mkdtemp()), True, "module"),
        (Own, True, "first"),
        (OnExceptionCheckpoint, False, "last"),  # knows no best one
        (None, False, "last"),
    ],
    ids=["monitor", "monitor last", "monitor of module", "last", "dirpath", "subclass", "exception", "Lightning's"],
)
@pytest.mark.filterwarnings("ignore:.*ckpt_path=None", "ignore:.*no last checkpoint")  # of OnExceptionCheckpoint
def test_the_best_checkpoint_of_others_stays_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any, kept: bool, way: str
) -> None:
    theirs = make(tmp_path) if make is OnExceptionCheckpoint else make and make()
    observer = spectra(checkpoint="highest_c_t")
    given = [theirs] if theirs is not None and way != "module" else []
    trainer = make_trainer(tmp_path, [*given, observer] if way == "first" else [observer, *given], 3)
    module = Bringing(SCRIPT, theirs) if way == "module" else ScriptedModule(SCRIPT)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer.fit(module, loader())
    pick = observer.checkpoint.best_model_path
    assert epoch_of(pick) == 0
    assert Path(pick).name == "hesd-highest_c_t-epoch=0-step=2.ckpt"
    assert torch.load(pick, weights_only=True)["global_step"] == 2
    assert not list(tmp_path.rglob("*-v1*"))
    [said] = [line for line in caplog.messages if line.startswith("hesd: highest C_t picks epoch 0, ")]
    assert pick in said
    if kept:
        assert trainer.checkpoint_callback is theirs
        assert epoch_of(theirs.best_model_path) == 2
        assert "`callback.checkpoint.best_model_path`" in said
    else:
        assert trainer.checkpoint_callback is observer.checkpoint
        assert '`ckpt_path="best"` loads it' in said
    if theirs is None:
        default = trainer.checkpoint_callbacks[-1]
        assert type(default) is ModelCheckpoint
        assert Path(default.best_model_path).name == "epoch=2-step=6.ckpt"
    # Sets up the callbacks once more. Lightning does not warn of several: the user has one at most.
    trainer.test(module, loader(), ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == (theirs.best_model_path if kept else pick)
    assert (trainer.checkpoint_callback is observer.checkpoint) is not kept


def test_of_several_checkpoint_callbacks_of_the_user_lightning_warns(tmp_path: Path) -> None:
    theirs = [by_accuracy(dirpath=tmp_path / name) for name in "ab"]
    theirs[1].mode = "min"  # so that their states differ
    module, trainer = ScriptedModule(SCRIPT), make_trainer(tmp_path, [*theirs, spectra(checkpoint="highest_c_t")], 1)
    trainer.fit(module, loader())
    with pytest.warns(UserWarning, match="multiple `ModelCheckpoint` callbacks"):
        trainer.test(module, loader(), ckpt_path="best", verbose=False)


def test_one_that_stands_alone_comes_after_a_plain_one_of_the_user(tmp_path: Path) -> None:
    ours, theirs = HessianCheckpoint(dirpath=tmp_path / "ours"), ModelCheckpoint()
    trainer = run_script(tmp_path, SCRIPT[:2], [ScriptedSource(SCRIPT), ours, theirs])
    assert trainer.checkpoint_callback is ours  # no HessianSpectrumCallback orders them here
    ours, theirs = HessianCheckpoint(dirpath=tmp_path / "again" / "ours"), ModelCheckpoint()
    trainer = run_script(tmp_path / "again", SCRIPT[:2], [spectra(), ours, theirs])
    assert trainer.checkpoint_callback is theirs
    assert epoch_of(theirs.best_model_path) == 1
    assert epoch_of(ours.best_model_path) == 0


def test_every_record_is_ranked_once(tmp_path: Path) -> None:
    """With gradient accumulation the next epoch's first batch ends at the step of the last record."""
    ranked: list[int] = []

    def rule(record: SpectrumRecord) -> float:
        ranked.append(record.epoch)
        return 0.0

    script = [Epoch(-0.1)] * 4
    checkpoint = HessianCheckpoint(rule, dirpath=tmp_path)
    run_script(tmp_path, script, [ScriptedSource(script), checkpoint], accumulate_grad_batches=2)
    assert ranked == [0, 1, 2, 3]


def test_a_last_link_never_dangles(tmp_path: Path) -> None:
    # The last two epochs have no checkpoint of their own: one is beaten, the other not analyzed.
    script = [Epoch(-0.2, loss=0.3), Epoch(-0.9, loss=0.1), Epoch(-0.1, loss=0.11), Epoch(-0.3, loss=0.12), Epoch(None)]
    for epochs in range(1, len(script) + 1):
        folder = tmp_path / str(epochs)
        checkpoint = HessianCheckpoint(dirpath=folder, save_last="link")
        run_script(folder, script[:epochs], [ScriptedSource(script), checkpoint])
        assert epoch_of(str(folder / "last.ckpt")) == epochs - 1


def fails_at_epoch_1(record: SpectrumRecord) -> float:
    return out_of_luck() if record.epoch == 1 else -record.epoch


@pytest.mark.parametrize(
    ("script", "rule", "message", "expected"),
    [
        # Without mainly positive candidates the metric decides.
        ([Epoch(-0.7, loss=0.10), Epoch(-0.9, loss=0.09), Epoch(-0.8, loss=0.2)], "highest_c_t", r"positive \(MP\)", 1),
        # Without anything to rank the final weights are kept.
        (
            [Epoch(math.nan), Epoch(0, error=True)],
            "highest_c_t",
            r"\(the analysis of epoch 1 failed: .*final weights",
            1,
        ),
        (
            [Epoch(math.nan), Epoch(None)],
            "highest_c_t",
            r"epoch \(the spectrum of epoch 0 has no C_t: no curvature\)",
            1,
        ),
        ([Epoch(None)], "highest_c_t", r"\(no epoch was analyzed\)", 0),
        (SCRIPT, fails_at_epoch_1, r"rule of HessianCheckpoint failed at epoch 1.*no luck", 3),
    ],
    ids=["MN", "failed", "undefined", "nothing", "failure"],
)
def test_where_a_rule_cannot_decide_it_says_so(
    script: list[Epoch], rule: Any, message: str, expected: int, tmp_path: Path
) -> None:
    checkpoint = HessianCheckpoint(rule, dirpath=tmp_path)
    with warns(message):
        run_script(tmp_path, script, [ScriptedSource(script), checkpoint], quiet=False)
    assert epoch_of(checkpoint.best_model_path) == expected


def test_every_rule_by_name_and_all_at_once(tmp_path: Path) -> None:
    rules = [HessianCheckpoint(rule, tolerance=1e9, require_mp=False) for rule in RULES]
    observer = callback(generalization_dataloader="val", preconditioner="optimizer", checkpoint=rules)
    trainer = fit(tmp_path, observer, module=Validated(), max_epochs=3, enable_checkpointing=True)
    assert observer.checkpoints == rules
    assert observer.checkpoint is rules[0]
    assert [c for c in trainer.checkpoint_callbacks if isinstance(c, HessianCheckpoint)] == rules
    for each, rule in zip(rules, RULES.values(), strict=True):
        scores = [rule.score(record) for record in observer.history]
        assert each.best is not None
        assert each.best.epoch == scores.index(max(scores)), rule.name
        assert torch.load(each.best_model_path, weights_only=True)["epoch"] == each.best.epoch


TIED = [
    Epoch(-0.30, accuracy=0.900, scatter=0.05),
    Epoch(-0.20, accuracy=0.905, scatter=0.05),
    # The errors of the first and the third epoch are the same, so that their difference is certain; those of neighbors
    # are independent, and differences below 0.115 are not evident.
    Epoch(-0.12, accuracy=0.902, scatter=0.05),
]


@pytest.mark.parametrize(
    ("ties", "epochs", "expected"),
    [(None, 2, 1), (None, 3, 2), ("first", 2, 0), ("first", 3, 1), ("metric", 2, 1), ("metric", 3, 1)],
)
def test_ties(ties: Any, epochs: int, expected: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rule = HessianCheckpoint("highest_c_t", train_metric="train_acc", ties=ties, dirpath=tmp_path)
    run_script(tmp_path, TIED[:epochs], [ScriptedSource(TIED[:epochs]), rule])
    assert epoch_of(rule.best_model_path) == expected
    rivals = {(2, 0): [1], (2, 1): [0], (3, 1): [0, 2], (3, 2): [1]}[epochs, expected]
    assert [record.epoch for record in rule.rivals] == rivals
    assert f"Within two standard errors of it are epochs {', '.join(map(str, rivals))}." in caplog.text


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_ties_in_a_resumed_run(tmp_path: Path) -> None:
    options: Any = {"train_metric": "train_acc", "ties": "first", "dirpath": tmp_path, "save_last": True}
    run_script(tmp_path, TIED[:2], [ScriptedSource(TIED), HessianCheckpoint(**options)])
    resumed = HessianCheckpoint(**options)
    trainer = make_trainer(tmp_path, [ScriptedSource(TIED), resumed], 2)
    trainer.fit(ScriptedModule(TIED), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert epoch_of(resumed.best_model_path) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "`rule` must be one of 'highest_c_t', 'lowest_max_eigenvalue', .*, or a function.*'best'"),
        ({"tolerance": -0.1}, "`tolerance` must not be negative, got -0.1"),
        ({"train_metric": "train_acc", "train_metric_mode": "up"}, "'min' or 'max', got 'up'"),
        ({"train_metric": "train_loss"}, "train_metric_mode='min'"),
        ({"monitor": "val_loss"}, "`monitor='val_loss'` would contradict"),
        ({"every_n_train_steps": 10}, "`every_n_train_steps=10` would contradict"),
        ({"rule": "lowest_trace", "ties": "first"}, "`ties='first'` needs a rule whose errors are known"),
        ({"rule": len, "ties": "first"}, "`ties='first'` needs a rule whose errors are known"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        HessianCheckpoint(**arguments)
    with pytest.raises(MisconfigurationException, match="the rule 'last' twice with the same options"):
        HessianSpectrumCallback(checkpoint=["last", "lowest_trace", "last"])


def test_without_a_spectrum_callback_it_keeps_the_final_weights(tmp_path: Path) -> None:
    checkpoint = HessianCheckpoint(dirpath=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"but the final weights.*add HessianSpectrumCallback\(\)") as caught:
        run_script(tmp_path, SCRIPT, [checkpoint], quiet=False)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert epoch_of(checkpoint.best_model_path) == 4


def test_alone_it_cannot_choose_between_two_spectrum_callbacks(tmp_path: Path) -> None:
    checkpoint = HessianCheckpoint(dirpath=tmp_path)
    first, second = (ScriptedSource(SCRIPT, name=name) for name in ("first", "second"))
    with warns("'first', 'second'"):
        run_script(tmp_path, SCRIPT, [first, second, checkpoint], quiet=False)
    assert epoch_of(checkpoint.best_model_path) == 4
    first.on_error = "raise"
    with pytest.raises(MisconfigurationException, match="'first', 'second'"):
        run_script(tmp_path, SCRIPT, [first, second, HessianCheckpoint()])


def test_a_rule_works_without_checkpointing(tmp_path: Path) -> None:
    observer = spectra(checkpoint="highest_c_t")
    with pytest.warns(RuntimeWarning, match="enable_checkpointing=False.*are written all the same") as caught:
        trainer = run_script(tmp_path, SCRIPT, [observer], enable_checkpointing=False, quiet=False)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert epoch_of(observer.checkpoint.best_model_path) == 0
    assert trainer.checkpoint_callback is observer.checkpoint
    assert trainer.test(dataloaders=loader(), ckpt_path="best", verbose=False) == [{"weight": 2.0}]
    with pytest.raises(MisconfigurationException, match="enable_checkpointing=False"):
        run_script(tmp_path, SCRIPT, [spectra(checkpoint="highest_c_t", on_error="raise")], enable_checkpointing=False)


class Plateau(ScriptedModule):
    """Lowers its rate when the C_t of its epochs stays where it is."""

    interval = "epoch"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        config = {"scheduler": scheduler, "monitor": "hesd_gen/c_t", "interval": self.interval, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


class PlateauOfSteps(Plateau):
    interval = "step"


stopping, saving = (partial(kind, monitor="hesd/c_t", mode="max") for kind in (EarlyStopping, ModelCheckpoint))

NEVER = "logged values persist"
EVERY_EPOCH = "analyze every epoch, and set `check_on_train_epoch_end=True`"

READERS: list[tuple[dict[str, Any], Any, str | None]] = [
    # The schedule, a callback or a module that reads C_t, and what the warning says.
    ({"every_n_epochs": 2}, stopping(strict=False), rf"EarlyStopping\(monitor='hesd/c_t'\): {NEVER}"),
    ({"every_n_train_steps": 1}, stopping(), rf"EarlyStopping\(monitor='hesd/c_t'\): {NEVER}"),
    ({}, stopping(check_on_train_epoch_end=False), f"before the epoch is analyzed.*{EVERY_EPOCH}"),
    ({}, stopping(), None),
    ({}, stopping(check_on_train_epoch_end=True, monitor="train_acc"), None),
    ({}, stopping(check_on_train_epoch_end=True), None),
    ({"every_n_epochs": 2}, saving(save_on_train_epoch_end=True), f"monitor='hesd/c_t'.*{NEVER}"),
    ({"max_overhead": 0.1}, saving(save_on_train_epoch_end=True), f"monitor='hesd/c_t'.*{NEVER}"),
    ({}, saving(), "monitor='hesd/c_t'.*save_on_train_epoch_end=True"),
    ({"every_n_epochs": 2}, Plateau, r"ReduceLROnPlateau with monitor='hesd_gen/c_t'.*`interval='epoch'`"),
    ({}, PlateauOfSteps, r"ReduceLROnPlateau with monitor='hesd_gen/c_t'.*`interval='epoch'`"),
    ({}, Plateau, None),
]


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key", "ignore:ReduceLROnPlateau conditioned")
@pytest.mark.parametrize(("schedule", "reader", "message"), READERS)
def test_readers_of_stale_values_are_warned_of(
    tmp_path: Path, schedule: dict[str, Any], reader: Any, message: str | None
) -> None:
    module, beside = (reader(SCRIPT), []) if isinstance(reader, type) else (ScriptedModule(SCRIPT), [reader])
    trainer = make_trainer(tmp_path, [*beside, spectra(**schedule)], epochs=2)
    with own_warnings() as said:
        trainer.fit(module, loader())
    assert len(said) == (message is not None)
    assert message is None or re.search(message, said[0])


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    observer = spectra(checkpoint="highest_c_t")
    run_script(tmp_path, SCRIPT, [observer], fast_dev_run=True)
    assert len(observer.history) == 1
    assert not list(tmp_path.rglob("*.*"))


# The scale of the loss ------------------------------------------------------------------------------------------------


FALLING = [Epoch(-0.1, loss=1.0), Epoch(-0.3, loss=0.2), Epoch(-0.2, loss=0.04), Epoch(-0.5, loss=0.0)]


@pytest.mark.parametrize(("unit", "offset"), [(1, 0), (1e-6, -1e-6), (3e4, -1e5)])
def test_neither_the_unit_of_the_loss_nor_a_constant_term_makes_a_difference(
    tmp_path: Path, unit: float, offset: float
) -> None:
    script = [replace(epoch, loss=unit * epoch.loss + offset) for epoch in FALLING]
    checkpoint = HessianCheckpoint(dirpath=tmp_path)
    run_script(tmp_path, script, [ScriptedSource(script), checkpoint])
    assert epoch_of(checkpoint.best_model_path) == 2  # 0.04 lies within 5 % of the drop from 1 to 0, and 0.2 does not
    assert checkpoint.selection.tolerance == pytest.approx(0.05 * unit)
    assert checkpoint.qualified_steps == [6, 8]


@pytest.mark.parametrize(
    ("losses", "epoch", "tolerance"),
    [
        ([0.3, 0.31, 0.4], 0, 0.0),  # no progress: equals only
        ([0.3, 0.3, 0.3], 2, 0.0),
        ([0.5, 2.0, 0.1, 0.115], 3, 0.02),  # the first loss counts, not the highest
        ([math.inf, 1.0, 0.5, 0.51], 3, 0.025),  # the first finite one
    ],
)
def test_progress_is_counted_from_the_first_loss(
    tmp_path: Path, losses: list[float], epoch: int, tolerance: float
) -> None:
    script = [Epoch(-0.5 + 0.1 * number, loss=loss) for number, loss in enumerate(losses)]
    checkpoint = HessianCheckpoint(dirpath=tmp_path)
    run_script(tmp_path, script, [ScriptedSource(script), checkpoint])
    assert epoch_of(checkpoint.best_model_path) == epoch
    assert checkpoint.selection.tolerance == pytest.approx(tolerance)


def test_a_tolerance_that_is_given_is_absolute(tmp_path: Path) -> None:
    assert HessianCheckpoint(tolerance=0.05).tolerance == 0.05
    assert HessianCheckpoint(train_metric="train_acc").tolerance == 0.01
    assert HessianCheckpoint(train_metric="train_acc", train_metric_mode="min").tolerance is None
    script = [replace(epoch, loss=3e4 * epoch.loss) for epoch in FALLING]
    checkpoint = HessianCheckpoint(tolerance=0.05, dirpath=tmp_path)
    run_script(tmp_path, script, [ScriptedSource(script), checkpoint])
    assert epoch_of(checkpoint.best_model_path) == 3


def test_a_resumed_run_counts_progress_from_its_first_loss(tmp_path: Path) -> None:
    """Also where the history does not come along."""
    checkpoint = HessianCheckpoint(dirpath=tmp_path / "first", save_last=True)
    run_script(tmp_path, FALLING[:2], [ScriptedSource(FALLING), checkpoint])
    for name in ("hesd", "new"):
        resumed, source = HessianCheckpoint(dirpath=tmp_path / name), ScriptedSource(FALLING)
        source.forgets = name == "new"
        trainer = make_trainer(tmp_path, [source, resumed], 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(ScriptedModule(FALLING), loader(), ckpt_path=checkpoint.last_model_path)
        assert epoch_of(resumed.best_model_path) == 2
        assert resumed.qualified_steps == [6, 8]


class KeepingSource(ScriptedSource):
    """Keeps the weights of its analyses, as HessianSpectrumCallback does."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        keep_weights(trainer, self, pl_module)


RISING_AND_FALLING = [Epoch(-0.5), Epoch(-0.1), Epoch(-0.3)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_resumed_from_the_checkpoint_of_another_callback_after_weights_have_changed(tmp_path: Path) -> None:
    """That callback saves before the pick of the epoch is known, and the file of the pick before it is then deleted."""

    last = tmp_path / "theirs" / "last.ckpt"

    def trained(epochs: int, ckpt_path: Path | None) -> tuple[HessianCheckpoint, list[str]]:
        own = HessianCheckpoint(dirpath=tmp_path / "own")
        change = LambdaCallback(on_train_epoch_end=lambda _, module: module.weight.data.add_(1.0))
        theirs = ModelCheckpoint(dirpath=last.parent, save_last=True)
        source = KeepingSource(RISING_AND_FALLING)
        with own_warnings() as said:
            trainer = make_trainer(tmp_path, [source, change, theirs, own], epochs)
            trainer.fit(ScriptedModule(RISING_AND_FALLING), loader(), ckpt_path=ckpt_path)
        return own, said

    trained(2, None)
    own, said = trained(3, last)
    assert [c.epoch for c in own.candidates] == [1]
    assert not any("gone" in text for text in said)
    assert Path(own.best_model_path).name == "hesd-highest_c_t-epoch=1-step=4.ckpt"


# A disk that is full --------------------------------------------------------------------------------------------------


class FullDisk(TorchCheckpointIO):
    """Has no room for checkpoints of a rule after these epochs, nor for any last.ckpt."""

    def __init__(self, *epochs: int) -> None:
        self.names = ("last.ckpt", *(f"hesd-highest_c_t-epoch={epoch}-" for epoch in epochs))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if Path(path).name.startswith(self.names):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning", "ignore:It is recommended to use .self.log")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_cannot_be_written_costs_no_more_than_the_file(ranks: int, tmp_path: Path) -> None:
    """Ranks that write nothing do not wait for ever for the one that has failed."""
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if ranks > 1 else "auto"
    observer = callback(on_error="warn", checkpoint=HessianCheckpoint(require_mp=False, tolerance=9.0, save_last=True))
    options = {"enable_checkpointing": True, "plugins": [FullDisk(1)], "limit_train_batches": 4}
    with own_warnings() as said:
        trainer = fit(tmp_path, observer, max_epochs=3, devices=ranks, strategy=strategy, **options)
    assert trainer.state.finished
    assert [record.error for record in observer.history] == [None] * 3
    rule = observer.checkpoint
    assert {c.epoch for c in rule.candidates} <= {0, 2}
    assert rule.best_model_path == rule.best.path
    assert Path(rule.best_model_path).is_file()
    told = [text for text in said if "could not write" in text]
    if ranks == 1:
        assert len(told) == 2, "one of the rule's, and of last.ckpt the first of three"
        assert sum("No space left on device" in text and "epoch=1-step=8.ckpt" in text for text in told) == 1


class Unreliable(TorchCheckpointIO):
    """Writes all checkpoints but that of the second epoch, and deletes none."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "epoch=1-" in Path(path).name:
            raise RuntimeError("the storage\ndoes not answer")
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        if Path(path).exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))


def test_failures_of_a_plugin_do_not_end_training(tmp_path: Path) -> None:
    script = [Epoch(c_t) for c_t in (-0.5, -0.4, -0.3, -0.2)]
    rule = HessianCheckpoint(dirpath=tmp_path / "rule")
    lose = LambdaCallback(on_train_epoch_start=lambda trainer, _: trainer.current_epoch == 3 and third.unlink())
    third = tmp_path / "rule" / "hesd-highest_c_t-epoch=2-step=6.ckpt"
    with own_warnings() as said:
        run_script(tmp_path, script, [ScriptedSource(script), lose, rule], quiet=False, plugins=[Unreliable()])
    unwritten, undeleted = said
    assert re.search(r"could not write .*epoch=1-step=4.ckpt. RuntimeError: the storage\ndoes not answer", unwritten)
    assert re.search(r"epoch=0-step=2.ckpt is not needed any more, but cannot be deleted \(.*Permission", undeleted)
    assert epoch_of(rule.best_model_path) == 3


def test_without_room_for_any_file_there_is_no_pick_and_no_training_if_the_callback_is_to_raise(tmp_path: Path) -> None:
    options = {"enable_checkpointing": True, "plugins": [FullDisk(0, 1)], "limit_train_batches": 4}
    observer = callback(on_error="warn", checkpoint="highest_c_t", at_start=True)
    with warns("could not write .*hesd-highest_c_t-epoch=1-step=8.ckpt"):
        trainer = fit(tmp_path / "warn", observer, **options)
    assert trainer.state.finished
    assert observer.checkpoint.best_model_path == ""
    observer = callback(on_error="raise", checkpoint=HessianCheckpoint(require_mp=False))
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path / "raise", observer, **options)


def test_a_mock_of_a_checkpoint_callback_is_no_neighbor(tmp_path: Path) -> None:
    """It has the methods of its class, and none of the attributes that `__init__` sets."""
    observer = callback(on_error="raise", checkpoint="highest_c_t")
    mock = Mock(spec=ModelCheckpoint, state_key="mock")
    mock.state_dict.return_value = {}
    trainer = fit(tmp_path, observer, mock, enable_checkpointing=True)
    assert trainer.state.finished
    assert Path(observer.checkpoint.best_model_path).is_file()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning", "ignore:The dirpath has changed")
def test_a_run_resumed_from_a_checkpoint_of_another_callback_knows_all_candidates(tmp_path: Path) -> None:
    """Others save first; and a whole run may be moved to another folder."""
    script = [Epoch(-0.3), Epoch(-0.1), Epoch(-0.2)]

    def run(folder: Path, epochs: int, **options: Any) -> list[HessianCheckpoint]:
        rules = [keeping(), HessianCheckpoint("highest_c_t", train_metric="train_acc", tolerance=1.0)]
        last = ModelCheckpoint(folder / "own", save_last=True)
        trainer = make_trainer(folder, [last, ScriptedSource(script), *rules], epochs)
        trainer.fit(ScriptedModule(script), loader(), **options)
        assert "save_checkpoint" not in vars(trainer)
        return rules

    first = run(tmp_path / "first", 2)
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = run(tmp_path / "moved", 3, ckpt_path=tmp_path / "moved" / "own" / "last.ckpt")
    for before, rule, left in zip(first, resumed, ([0], [1]), strict=True):
        assert [epoch_of(c.path) for c in rule.candidates] == left
        assert Path(rule.best_model_path).name == Path(before.best_model_path).name


class Away(pl.Callback):
    """Changes the working directory after the first epoch, and is not comparable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, *_: Any) -> None:
        os.chdir(self.folder)

    def __eq__(self, other: object) -> bool:
        raise TypeError(type(other))

    __hash__ = object.__hash__


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    away = Away(tmp_path.parent)
    observer = callback(checkpoint=keeping(), num_samples=8, steps=2)
    fit(Path("run"), observer, away, enable_checkpointing=True)
    assert {Path(c.path).is_file() for c in observer.checkpoint.candidates} == {True}
    assert len(SpectrumHistory.load(tmp_path / "run")) == 2


def test_files_of_another_run_in_the_same_folder_stay_and_are_told_from_the_pick(tmp_path: Path) -> None:
    """Two runs at the same time find the same paths free."""
    script, rule = [Epoch(-0.3), Epoch(-0.2), Epoch(-0.1)], HessianCheckpoint("highest_c_t", tolerance=1.0)

    def overwrite(trainer: pl.Trainer, *_: Any) -> None:
        if rule.best_model_path and trainer.current_epoch != 2:
            torch.save({"of": "another run"}, rule.best_model_path)

    other = LambdaCallback(on_train_epoch_start=overwrite, on_train_end=overwrite)
    with warns("epoch=2-step=6.ckpt is the file of the pick, and another run has overwritten it"):
        run_script(tmp_path, script, [ScriptedSource(script), other, rule], quiet=False)
    files = list(Path(rule.dirpath).glob("hesd*"))
    assert [torch.load(path).get("of") for path in files] == ["another run"] * 2, "epochs 0 and 2"
