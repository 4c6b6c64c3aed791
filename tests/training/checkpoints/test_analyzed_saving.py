"""Checkpoints hold the analyzed weights, also if other code has changed the weights of the module."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, ModelPruning
from torch import Tensor

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from tests.training import scripted
from tests.training.modules import (
    Classifier,
    callback,
    fit,
    freeze,
    global_generators,
    loader,
    own_warnings,
    plain_loss,
)

EPOCHS = 3
STEPS = 5
"""Optimizer steps in an epoch."""


class Witness(pl.Callback):
    """Keeps the weights that are analyzed, and logs a metric that grows."""

    def __init__(self) -> None:
        self.analyzed: dict[int, dict[str, Tensor]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.analyzed[trainer.current_epoch] = copied(pl_module)
        self.log("epochs", float(trainer.current_epoch))


def changing(change: Callable[[Any], object]) -> pl.Callback:
    """Return a callback that changes the module at the ends of epochs."""
    return LambdaCallback(on_train_epoch_end=lambda _, module: torch.no_grad()(change)(module))


class SelfChanging(Classifier):
    """Changes itself at the ends of epochs."""

    def __init__(self, change: Callable[[Any], object]) -> None:
        super().__init__(torch.nn.BatchNorm1d(6))
        self.change = change

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        self.change(self)


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def effective(state: dict[str, Tensor]) -> Any:
    """The weights with their pruning, bit by bit."""
    orig = {name[:-5]: name for name in state if name.endswith("_orig")}
    plain = {name: value for name, value in state.items() if not name.endswith(("_orig", "_mask"))}
    return freeze(dict(sorted((plain | {n: state[o] * state[f"{n}_mask"] for n, o in orig.items()}).items())))


def observer(checkpoint: HessianCheckpoint, on_error: Any = "warn") -> HessianSpectrumCallback:
    return callback(loss_fn=plain_loss, checkpoint=checkpoint, on_error=on_error)


keeping = functools.partial(scripted.keeping, train_metric="epochs")


def trained(folder: Path, *callbacks: pl.Callback, **arguments: Any) -> tuple[pl.Trainer, list[str]]:
    """Train, and return what the package warned of."""
    with own_warnings() as said:
        trainer = fit(folder, *callbacks, enable_checkpointing=True, max_epochs=EPOCHS, data=loader(), **arguments)
    return trainer, said


def halve(module: Any) -> None:
    for p in module.parameters():
        p.mul_(0.5)


def replace_bias(module: Any) -> None:
    module.net[0].bias.data = torch.ones(6)


def reset_running_mean(module: Any) -> None:
    module.net[1].running_mean += 1


def tear(module: Any) -> None:
    module.net[0].weight.data[0, 0] = float("nan")
    module.net[0].weight.data[0, 0] = 0.0


BY_MODULE = {"halve": halve, "data": replace_bias, "buffer": reset_running_mean, "nan": tear}


@pytest.mark.parametrize(("what", "save_last"), [("halve", "link"), *((what, True) for what in BY_MODULE)])
def test_changes_by_the_module_come_after_the_analysis_and_the_file(what: str, save_last: Any, tmp_path: Path) -> None:
    witness, checkpoint = Witness(), keeping(dirpath=tmp_path / "c", save_last=save_last)
    trainer, said = trained(tmp_path, witness, observer(checkpoint), module=SelfChanging(BY_MODULE[what]))
    for candidate in checkpoint.candidates:
        saved = torch.load(candidate.path, weights_only=True)
        assert saved["global_step"] == candidate.global_step == STEPS * (candidate.epoch + 1)
        assert freeze(saved["state_dict"]) == freeze(witness.analyzed[candidate.epoch])
    assert [c.epoch for c in checkpoint.candidates] == list(range(EPOCHS))
    # What goes on is what the module made of it, in last.ckpt, too.
    last = freeze(trainer.lightning_module.state_dict())
    assert freeze(torch.load(checkpoint.last_model_path)["state_dict"]) == last
    [text] = said
    assert re.search(r"of epoch 0 were changed after their analysis \(net\.\d.*saves the analyzed weights", text)
    without = fit(tmp_path, module=SelfChanging(BY_MODULE[what]), max_epochs=EPOCHS, data=loader())
    assert last == freeze(without.lightning_module.state_dict())


@pytest.mark.parametrize("first", [True, False], ids=["pruned before", "pruned after"])
def test_pruning(first: bool, tmp_path: Path) -> None:
    """Lightning's first pruning gives parameters other names, and saves them with their pruning applied."""
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    witness, checkpoint = Witness(), keeping(dirpath=tmp_path / "c")
    order = [witness, observer(checkpoint)]
    _, said = trained(tmp_path, *([pruning, *order] if first else [*order, pruning]))
    assert len(said) == (0 if first else 1)
    assert len(checkpoint.candidates) == EPOCHS
    for candidate in checkpoint.candidates:
        saved = torch.load(candidate.path, weights_only=True)["state_dict"]
        assert effective(saved) == effective(witness.analyzed[candidate.epoch])
        assert Classifier().load_state_dict(saved)
    zeros = (torch.load(checkpoint.candidates[0].path)["state_dict"]["net.0.weight"] == 0).float().mean()
    assert zeros == pytest.approx(0.5 if first else 0.0, abs=0.1)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_weights_that_cannot_be_restored_are_not_ranked(on_error: Any, tmp_path: Path) -> None:
    """Of frozen parameters there are no copies."""
    module = Classifier(torch.nn.Linear(6, 6).requires_grad_(False))
    step = changing(lambda m: m.net[1].weight.add_(1) if m.current_epoch == 1 else None)
    checkpoint = keeping(dirpath=tmp_path / "c")
    spectra = observer(checkpoint, on_error)
    if on_error == "raise":
        with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="cannot be restored"):
            trained(tmp_path, Witness(), spectra, step, module=module)
        return
    _, [text] = trained(tmp_path, Witness(), spectra, step, module=module)
    assert [c.epoch for c in checkpoint.candidates] == [0, 2]
    assert re.search(r"epoch 1 were changed .*\(net\.1\.weight\).*does not rank them", text)


class Filtering(Classifier):
    """Saves a part of its weights, or others."""

    def __init__(self, others: bool) -> None:
        super().__init__()
        self.others = others

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        biases = {name: value for name, value in checkpoint["state_dict"].items() if "bias" in name}
        checkpoint["state_dict"] = {name: value + self.others for name, value in biases.items()}


@pytest.mark.parametrize(
    ("module", "callbacks", "whereabouts"),
    [
        (Classifier, [EMAWeightAveraging(decay=0.5)], "in the same file, as `current_model_state`"),
        (lambda: Filtering(others=True), [], "not in the file"),
        (lambda: Filtering(others=False), [], None),
    ],
    ids=["averages", "others", "a part"],
)
def test_hooks_that_save_other_weights_are_named(
    module: Callable[[], Classifier], callbacks: list[pl.Callback], whereabouts: str | None, tmp_path: Path
) -> None:
    witness, checkpoint = Witness(), keeping(dirpath=tmp_path / "c")
    _, said = trained(tmp_path, witness, observer(checkpoint), *callbacks, module=module())
    assert len(said) == (0 if whereabouts is None else 1)
    if whereabouts is not None:
        assert re.search(rf"`state_dict` of checkpoints has other weights.*'net\.0\..*{whereabouts}", said[0])
    if callbacks:
        saved = torch.load(checkpoint.best_model_path)["current_model_state"]
        assert freeze(saved) == freeze(witness.analyzed[0])


def test_weights_alone_are_the_analyzed_ones_too(tmp_path: Path) -> None:
    witness, checkpoint = Witness(), keeping(dirpath=tmp_path / "c", save_weights_only=True)
    trained(tmp_path, witness, observer(checkpoint), changing(halve))
    for candidate in checkpoint.candidates:
        saved = torch.load(candidate.path, weights_only=True)
        assert "optimizer_states" not in saved
        assert freeze(saved["state_dict"]) == freeze(witness.analyzed[candidate.epoch])


class Saved(Classifier):
    """Does what it should not when it is saved, and fails in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.saves = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saves += 1
        self.net[0].bias.data += torch.rand(6)
        if self.saves > 1 or self.current_epoch > 0:
            msg = "cannot be saved"
            raise ValueError(msg)


def test_saving_changes_no_training_and_may_fail(tmp_path: Path) -> None:
    """Without the rule, training would call no hook of saving."""
    fit(tmp_path / "without", module=(plain := Saved()), max_epochs=2)
    before = global_generators()
    spectra = observer(rule := HessianCheckpoint(require_mp=False, tolerance=9.0, save_last=True))
    with own_warnings() as said:
        fit(tmp_path / "with", spectra, module=(module := Saved()), max_epochs=2)
    assert (freeze(copied(module)), module.saves, global_generators()) == (freeze(copied(plain)), 0, before)
    assert sum("ValueError: cannot be saved" in text for text in said) == 2, "the second epoch of rule and last.ckpt"
    assert [c.epoch for c in rule.candidates] == [0]
