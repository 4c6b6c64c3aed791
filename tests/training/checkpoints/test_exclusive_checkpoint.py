"""Files of checkpoints: no two states share one, and neighbors neither lose theirs nor take ours."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.training.checkpoints.exclusive_checkpoint import is_written_as, may_coincide, prefix
from tests.training.broken import out_of_luck
from tests.training.modules import own_warnings
from tests.training.scripted import (
    STEPS_PER_EPOCH,
    Epoch,
    ScriptedModule,
    ScriptedSource,
    keeping,
    loader,
    make_trainer,
    run_script,
)

SCRIPT = [Epoch(-0.1, loss=loss, accuracy=0.5) for loss in (0.4, 0.3, 0.2)]
"""Each epoch has a better loss than the one before: with a rule that prefers the earliest all stay candidates."""

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


def step_in(path: str | Path) -> Any:
    return torch.load(path, weights_only=True)["global_step"]


def assert_own_files(checkpoint: HessianCheckpoint, epochs: int = len(SCRIPT)) -> None:
    """Every candidate has a file of its own, with its own state in it."""
    assert [c.epoch for c in checkpoint.candidates] == list(range(epochs))
    assert len({os.path.realpath(c.path) for c in checkpoint.candidates}) == epochs
    for candidate in checkpoint.candidates:
        assert step_in(candidate.path) == candidate.global_step == STEPS_PER_EPOCH * (candidate.epoch + 1)
    assert checkpoint.best is not None
    assert checkpoint.best_model_path == checkpoint.best.path
    assert step_in(checkpoint.best_model_path) == checkpoint.best.global_step


class Failing(ScriptedModule):
    """Fails in its last epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        fails = self.current_epoch == len(SCRIPT) - 1 and batch_idx == 1
        return out_of_luck() if fails else super().training_step(batch, batch_idx)


UNCOUNTED: dict[str, Any] = {"enable_version_counter": False}
UNNAMED: dict[str, Any] = {"auto_insert_metric_name": False}
FIXED: dict[str, Any] = {"filename": "best", **UNCOUNTED}


@pytest.mark.parametrize(
    "arguments",
    [
        {"filename": "best"},
        FIXED,
        {"filename": "{train_acc:.1f}", **UNCOUNTED},
        {"filename": "{train_acc:.1f}/{epoch:d}", **UNNAMED},
        {"filename": "last", "save_last": True, **UNCOUNTED},
        {"save_weights_only": True, **UNCOUNTED},
    ],
    ids=["fixed", "fixed, no counter", "colliding metric", "folder", "called last", "weights"],
)
def test_each_candidate_has_a_file_of_its_own(tmp_path: Path, arguments: dict[str, Any]) -> None:
    checkpoint = keeping(dirpath=tmp_path, **arguments)
    run_script(tmp_path, SCRIPT, [ScriptedSource(SCRIPT), checkpoint])
    assert_own_files(checkpoint)
    if "save_last" in arguments:
        assert Path(checkpoint.last_model_path).name == "last.ckpt"
        assert step_in(checkpoint.last_model_path) == 6


@pytest.mark.parametrize("arguments", [{}, FIXED])
def test_an_exception_has_a_file_of_its_own(tmp_path: Path, arguments: dict[str, Any]) -> None:
    if "save_on_exception" not in ModelCheckpoint.__init__.__annotations__:
        pytest.skip("this version of Lightning has no such option")
    checkpoint = keeping(dirpath=tmp_path, save_on_exception=True, save_last="link", **arguments)
    trainer = make_trainer(tmp_path, [ScriptedSource(SCRIPT), checkpoint], 3)
    with pytest.raises(OSError, match="no luck"):
        trainer.fit(Failing(SCRIPT), loader())
    assert_own_files(checkpoint, 2)
    (exception,) = tmp_path.glob("*-exception.ckpt")
    assert step_in(exception) == step_in(checkpoint.last_model_path) == 5


def neighbor(**arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**{"save_top_k": -1, **arguments})


DEFAULT = "hesd-earliest-epoch=0-step=2"

NEIGHBORS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # Arguments of ours, of theirs, and the name of our first file.
    "defaults": ({}, {}, DEFAULT),
    "no counters": (UNCOUNTED, UNCOUNTED, DEFAULT),
    "one file": ({}, {**UNCOUNTED, "save_top_k": 1, "filename": "x"}, DEFAULT),
    "same name": ({"filename": "best"}, {"filename": "best"}, "hesd-earliest-best"),
    "same name, no counters": (FIXED, {**FIXED, "save_top_k": 1}, "hesd-earliest-best"),
    "their default": ({"filename": "{epoch}-{step}"}, {}, DEFAULT),
    "numbers": ({**UNNAMED, "filename": "{epoch}"}, {**UNNAMED, "filename": "{step}"}, "hesd-earliest-0"),
    "other names": ({"filename": "mine-{epoch}"}, {"filename": "theirs-{epoch}"}, "mine-epoch=0"),
    "last": ({"save_last": True}, {"save_last": True}, DEFAULT),
}


@pytest.mark.parametrize(("name", "first"), [(name, bool(number % 2)) for number, name in enumerate(NEIGHBORS)])
def test_a_neighbor_in_the_same_folder_has_the_files_it_would_have_alone(
    name: str, first: bool, tmp_path: Path
) -> None:
    ours, theirs, expected = NEIGHBORS[name]
    run_script(tmp_path / "alone", SCRIPT, [neighbor(dirpath=tmp_path / "alone", **theirs)])
    folder = tmp_path / "together"
    checkpoint, other = keeping(dirpath=folder, **ours), neighbor(dirpath=folder, **theirs)
    run_script(folder, SCRIPT, [ScriptedSource(SCRIPT), *([checkpoint, other] if first else [other, checkpoint])])
    assert_own_files(checkpoint)
    own = {Path(c.path).name for c in checkpoint.candidates} | {Path(checkpoint.last_model_path).name}
    assert Path(checkpoint.best_model_path).stem == expected
    alone = {path.name: step_in(path) for path in (tmp_path / "alone").glob("*.ckpt")}
    assert {path.name: step_in(path) for path in folder.glob("*.ckpt") if path.name not in own} == alone


@pytest.mark.parametrize("arguments", [{}, FIXED])
def test_two_rules_in_one_folder(arguments: dict[str, Any], tmp_path: Path) -> None:
    rules = [keeping(dirpath=tmp_path, tolerance=tolerance, save_last=True, **arguments) for tolerance in (98.0, 99.0)]
    run_script(tmp_path, SCRIPT, [ScriptedSource(SCRIPT), *rules])
    for rule in rules:
        assert_own_files(rule)
    assert len({c.path for rule in rules for c in rule.candidates}) == 2 * len(SCRIPT)


def test_names_of_files() -> None:
    """Those of rules become a part of them, and templates of names may coincide."""
    assert prefix("hesd", "highest_c_t") == "hesd-highest_c_t"
    assert prefix("layer {0}: a%b", "<lambda>") == "layer_0_a_b-lambda"
    assert prefix("ü", "") == "own-own"
    assert HessianCheckpoint(lambda record: 0.0).name_prefix == "hesd-lambda"
    assert HessianCheckpoint(max).name_prefix == "hesd-max"

    other = ModelCheckpoint(filename="best-v{epoch}", auto_insert_metric_name=False)
    assert may_coincide("best", other, auto_insert_metric_name=True)
    assert not may_coincide("best-epoch", other, auto_insert_metric_name=True)
    assert may_coincide("best-v{epoch}", ModelCheckpoint(filename="best"), auto_insert_metric_name=False)
    assert not may_coincide("{epoch}", ModelCheckpoint(filename="{step}"), auto_insert_metric_name=True)
    nested = ModelCheckpoint(filename="a/{hesd/c_t}-{epoch}")
    assert may_coincide("a/{hesd/c_t:.3f}-{epoch:02d}", nested, auto_insert_metric_name=True)
    assert not may_coincide("b/{hesd/c_t}-{epoch}", nested, auto_insert_metric_name=True)


class Appending(Callback):
    """Adds callbacks when the Trainer is about to train."""

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.callbacks.extend(self.callbacks)


class SelfAppending(ScriptedModule):
    """Adds callbacks when Lightning has set up those that there are."""

    callbacks: tuple[Callback, ...] = ()

    def setup(self, stage: str) -> None:
        self.trainer.callbacks.extend(self.callbacks)


def spectra(**arguments: Any) -> HessianSpectrumCallback:
    return HessianSpectrumCallback(loss_fn=lambda m, _: (m.weight - 9) ** 2, num_samples=2, **arguments)


ADDITIONS: dict[str, Callable[..., object]] = {
    "before": lambda trainer, *callbacks: trainer.callbacks.__setitem__(slice(0), callbacks),
    "after": lambda trainer, *callbacks: trainer.callbacks.extend(callbacks),
    "in_setup": lambda _, *callbacks: setattr(SelfAppending, "callbacks", callbacks),
    "when_training_starts": lambda trainer, *callbacks: trainer.callbacks.append(Appending(*callbacks)),
}


@pytest.mark.parametrize("way", ADDITIONS)
@pytest.mark.parametrize("alone", [True, False])
def test_callbacks_added_after_construction(
    way: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(SelfAppending, "callbacks", ())
    checkpoint, other = keeping(), neighbor()
    trainer = make_trainer(tmp_path, [other], len(SCRIPT))
    ADDITIONS[way](trainer, *([checkpoint, spectra()] if alone else [spectra(checkpoint=checkpoint)]))
    with patch.object(other, "setup", wraps=other.setup) as setup, patch.object(other, "on_train_start") as start:
        trainer.fit(SelfAppending(SCRIPT), loader())
    assert_own_files(checkpoint)
    assert Path(checkpoint.dirpath) == tmp_path / "checkpoints"
    assert trainer.checkpoint_callback is other
    assert (setup.call_count, start.call_count) == (1, 1)
    assert {step_in(path) for path in other.best_k_models or [other.best_model_path]} <= {2, 4, 6}
    kinds = [isinstance(callback, Checkpoint) for callback in trainer.callbacks]
    assert kinds == sorted(kinds)
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("own", [True, False])
def test_the_trainer_may_have_tested_before_it_fits(own: bool, tmp_path: Path) -> None:
    checkpoint = keeping(**({"dirpath": tmp_path / "own", "filename": "best"} if own else {}))
    trainer = make_trainer(tmp_path, [spectra(checkpoint=checkpoint)], 2)
    for work in (trainer.test, trainer.test, trainer.fit, trainer.test):
        work(ScriptedModule(SCRIPT), loader())
    assert_own_files(checkpoint, 2)
    expected = "own/best.ckpt" if own else "checkpoints/hesd-earliest-epoch=0-step=2.ckpt"
    assert Path(checkpoint.best_model_path) == tmp_path / expected


def resumed(folder: Path, path: str, epochs: int = 3, **arguments: Any) -> tuple[HessianCheckpoint, list[str]]:
    """Go on from a checkpoint, and return what was warned of."""
    script = [*SCRIPT, Epoch(-0.1, loss=0.1)][:epochs]
    checkpoint = keeping(**{"dirpath": folder, **FIXED, **arguments})
    trainer = make_trainer(folder, [ScriptedSource(script), checkpoint], epochs)
    with own_warnings() as said:
        trainer.fit(ScriptedModule(script), loader(), ckpt_path=path)
    return checkpoint, said


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_that_another_run_has_overwritten_is_no_candidate(weights_only: bool, tmp_path: Path) -> None:
    first = keeping(dirpath=tmp_path, filename="best", save_last=True)
    run_script(tmp_path, SCRIPT, [ScriptedSource(SCRIPT), first])
    last = tmp_path / "kept.ckpt"
    Path(first.last_model_path).rename(last)
    other = keeping(dirpath=tmp_path, **FIXED, save_weights_only=weights_only)
    run_script(tmp_path, SCRIPT[:1], [ScriptedSource(SCRIPT), other])
    assert other.best_model_path == first.best_model_path  # overwritten
    checkpoint, [text] = resumed(tmp_path, str(last), 4)
    assert [c.epoch for c in checkpoint.candidates] == [1, 2, 3]
    assert first.candidates[0].path in text
    for candidate in checkpoint.candidates:
        assert step_in(candidate.path) == candidate.global_step


def test_half_a_file_is_no_candidate(tmp_path: Path) -> None:
    first = keeping(dirpath=tmp_path, save_last=True)
    run_script(tmp_path, SCRIPT, [ScriptedSource(SCRIPT), first])
    torn = Path(first.candidates[1].path)
    torn.write_bytes(torn.read_bytes()[:500])
    checkpoint, [_] = resumed(tmp_path, first.last_model_path, 4)
    assert [c.epoch for c in checkpoint.candidates] == [0, 2, 3]


def test_files_of_other_formats_are_trusted(tmp_path: Path) -> None:
    sharded, own = tmp_path / "sharded", tmp_path / "own"
    sharded.mkdir()
    own.write_text("some other format")
    assert is_written_as(str(sharded), "mark")
    torch.save({"lightning_hesd_candidate": "mark"}, sharded / "meta.pt")
    assert is_written_as(str(sharded), "mark")
    assert not is_written_as(str(sharded), "another")
    assert is_written_as(str(own), "mark")
    assert not is_written_as(str(tmp_path / "none"), "")
    assert not is_written_as("unknown://protocol/file", "")


@pytest.mark.parametrize("by_link", [False, True])
def test_the_file_resumed_from_stays(by_link: bool, tmp_path: Path) -> None:
    script = [Epoch(-0.5, loss=0.5), Epoch(-0.1, loss=0.1)]
    first = HessianCheckpoint(dirpath=tmp_path, save_last="link")
    run_script(tmp_path, script[:1], [ScriptedSource(script), first])
    path = first.last_model_path if by_link else first.best_model_path
    assert Path(path).is_symlink() == by_link
    second = HessianCheckpoint(dirpath=tmp_path, enable_version_counter=False)
    trainer = make_trainer(tmp_path, [ScriptedSource(script), second], 2)
    trainer.fit(ScriptedModule(script), loader(), ckpt_path=path)
    assert [c.epoch for c in second.candidates] == [1]  # the first epoch is beaten
    assert step_in(first.best_model_path) == 2
