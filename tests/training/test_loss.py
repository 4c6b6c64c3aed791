"""The analyzed loss: `training_step` or `loss_fn`, without side effects, at the Trainer's precision."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from tests.training.modules import Classifier, Digits, callback, fit, freeze, loader, plain_loss, samples

# What training_step returns, and what it takes ------------------------------------------------------------------------


class Returns(Classifier):
    """Returns another loss when an analysis calls it, that is, in evaluation mode."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if self.training else self.output(loss)


def nodes_of(tmp_path: Path, module: Classifier, **kwargs: Any) -> Any:
    """Train with one analysis at the end, and return its quadrature nodes."""
    observer = callback(**kwargs)
    fit(tmp_path, observer, module=module, max_epochs=1)
    return freeze(observer.history[0].spectrum.nodes)


@pytest.mark.parametrize(
    "output",
    [lambda loss: {"loss": loss}, lambda loss: {"loss": loss, "text": "more"}, lambda loss: loss.reshape(1)],
    ids=["dict", "dict_with_more", "one_element"],
)
def test_the_forms_of_a_loss(output: Any, tmp_path: Path) -> None:
    assert nodes_of(tmp_path, Returns(output)) == nodes_of(tmp_path, Classifier())


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            lambda loss: None,
            ValueError,
            "the loss function skipped all 2 batches, as a `training_step` that returns None",
        ),
        (
            lambda loss: {"other": loss},
            MisconfigurationException,
            "got a dict without 'loss': return it, or pass `loss",
        ),
        (lambda loss: 0.5, MisconfigurationException, "got float"),
        (lambda loss: loss.expand(3), TypeError, r"the mean over the batch; got shape \(3,\)"),
    ],
    ids=["none", "dict_without_loss", "number", "loss_per_sample"],
)
def test_no_loss(output: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        fit(tmp_path, callback(mode="eval"), module=Returns(output))

    observer = callback(on_error="warn", mode="eval")
    with pytest.warns(RuntimeWarning, match=message):
        trainer = fit(tmp_path, observer, module=Returns(output))
    assert trainer.global_step == 10
    assert trainer.state.finished
    assert [(record.spectrum, error.__name__ in record.error) for record in observer.history] == [(None, True)] * 2


class BatchOnly(Classifier):
    def training_step(self, batch: Any) -> Any:
        return plain_loss(self, batch)


class OtherName(Classifier):
    def training_step(self, batch: Any, i: int) -> Any:
        return plain_loss(self, batch) + 0 * i


class WithLoaderIndex(Classifier):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return plain_loss(self, batch) + 0 * batch_idx + 0 * dataloader_idx


class AnyArguments(Classifier):
    def training_step(self, *args: Any) -> Any:
        batch, batch_idx = args
        return plain_loss(self, batch) + 0 * batch_idx


class AnyKeywords(Classifier):
    def training_step(self, batch: Any, **kwargs: Any) -> Any:
        return plain_loss(self, batch)


@pytest.mark.parametrize("module", [BatchOnly, OtherName, WithLoaderIndex, AnyArguments, AnyKeywords])
def test_signatures(module: type[Classifier], tmp_path: Path) -> None:
    assert nodes_of(tmp_path, module()) == nodes_of(tmp_path, Classifier())


# Silence --------------------------------------------------------------------------------------------------------------

CALLS: list[str] = []
"""Out of the module's reach, hence of what is put back after an analysis."""


class Talkative(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = plain_loss(self, batch)
        CALLS.append("training_step" if self.training else "analysis")
        self.log("a", loss, on_step=True)
        self.log_dict({"b": loss})
        self.print("c")
        return loss


class Overriding(Talkative):
    """Has its own `log`, `log_dict` and `print`."""

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        if not name.startswith("hesd/"):
            CALLS.append("log")
        super().log(name, *args, **kwargs)

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        CALLS.append("log_dict")
        super().log_dict(*args, **kwargs)

    def print(self, *args: Any, **kwargs: Any) -> None:
        CALLS.append("print")


class Patched(Talkative):
    """Has a `print` of its own instance only."""

    def __init__(self) -> None:
        super().__init__()
        self.print = silent_print


def silent_print(*args: Any) -> None:
    CALLS.append("print")


def fails(module: Any, batch: Any) -> Tensor:
    module.training_step(batch, 0)
    msg = "failed on purpose"
    raise OSError(msg)


@pytest.mark.parametrize("loss_fn", [None, fails], ids=["", "also_after_an_error"])
@pytest.mark.parametrize("module_class", [Talkative, Overriding, Patched])
def test_muted_during_the_analysis_only(
    module_class: type[Talkative], loss_fn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CALLS.clear()
    module = module_class()
    logger = CSVLogger(tmp_path)
    before = {name: vars(module)[name] for name in ("log", "log_dict", "print") if name in vars(module)}
    observer = callback(loss_fn=loss_fn, on_error="warn", every_n_train_steps=2)
    if loss_fn is None:
        trainer = fit(tmp_path, observer, module=module, logger=logger, max_epochs=1)
    else:
        with pytest.warns(RuntimeWarning, match="failed on purpose"):
            trainer = fit(tmp_path, observer, module=module, logger=logger, max_epochs=1)
    assert len(observer.history) == 2
    assert CALLS.count("analysis") >= 2
    # Lightning's `log_dict` calls `log`.
    expected = {
        Talkative: {},
        Patched: {"print": 5},
        Overriding: {"print": 5, "log": 10, "log_dict": 5},
    }[module_class]
    for name in ("print", "log", "log_dict"):
        assert CALLS.count(name) == expected.get(name, 0)
    printed = capsys.readouterr().out.split()
    assert printed.count("c") == (5 if module_class is Talkative else 0)
    assert {name: vars(module)[name] for name in ("log", "log_dict", "print") if name in vars(module)} == before
    assert trainer.loggers == [logger]
    assert module.logger is logger


# Manual optimization --------------------------------------------------------------------------------------------------


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(plain_loss(self, batch))
        optimizer.step()


class TakesIterator(Classifier):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return plain_loss(self, batch)


@pytest.mark.parametrize(
    ("module", "message"),
    [(Manual, "manual optimization.*pass `loss_fn=`"), (TakesIterator, "takes a `dataloader_iter`.*pass `loss_fn=`")],
)
@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")  # Lightning's own, of an experimental feature
def test_a_training_step_that_cannot_be_called(module: type[Classifier], message: str, tmp_path: Path) -> None:
    untouched = freeze(module().state_dict())
    refused = module()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, callback(at_start=True), module=refused)
    assert freeze(refused.state_dict()) == untouched, "refused before the first step"

    observer, trained = callback(loss_fn=plain_loss), module()
    fit(tmp_path, observer, module=trained)
    assert [record.error for record in observer.history] == [None, None]
    without = fit(tmp_path, module=module()).lightning_module
    assert freeze(trained.state_dict()) == freeze(without.state_dict())


def test_loss_fn_takes_the_place_of_training_step(tmp_path: Path) -> None:
    CALLS.clear()
    observer = callback(loss_fn=lambda module, batch: 2 * plain_loss(module, batch))
    module = fit(tmp_path, observer, module=Talkative(), max_epochs=1).lightning_module
    assert CALLS == ["training_step"] * 5
    batch = samples(observer.state_dict()["samples"]["training"]["indices"])
    assert observer.history[0].spectrum.loss == pytest.approx(2 * plain_loss(module, batch).item(), rel=1e-5)


# The value of the loss, and its precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [16, 21])
@pytest.mark.parametrize("layers", [(), (partial(nn.BatchNorm1d, 6), nn.Dropout)], ids=["", "batch_norm_and_dropout"])
def test_the_loss_is_the_mean_over_the_samples(layers: Any, num_samples: int, tmp_path: Path) -> None:
    observer = callback(num_samples=num_samples)
    module = fit(tmp_path, observer, module=Classifier(*(layer() for layer in layers))).lightning_module
    positions = observer.state_dict()["samples"]["training"]["indices"]
    assert len(set(positions)) == num_samples
    with torch.no_grad():
        expected = plain_loss(module.eval(), samples(positions)).item()
    assert observer.history[-1].spectrum.loss == pytest.approx(expected, rel=1e-5)


class CreatesTensors(Classifier):
    """Creates a tensor in the middle of the computation, whose dtype is the default one at that time."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0]) @ torch.eye(10)
        return F.cross_entropy(logits, batch[1])


PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("module_class", [Classifier, CreatesTensors])
def test_precision(module_class: type[Classifier], precision: Any, tmp_path: Path) -> None:
    """The loss in the parameters' own type, and, under mixed precision, without autocast."""
    autocast = []

    class Watched(module_class):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.training:
                autocast.append(torch.is_autocast_enabled("cpu"))
            return super().training_step(batch, batch_idx)

    observer = callback(batch_size=16)
    data = loader(Digits(augment=lambda x: 20 * x))  # so large that rounding shows
    module = fit(tmp_path, observer, module=Watched(), data=data, precision=precision, max_epochs=1).lightning_module
    dtype = PRECISIONS[precision]
    assert {p.dtype for p in module.parameters()} == {dtype}
    x, y, _ = samples(observer.state_dict()["samples"]["training"]["indices"])
    with torch.no_grad():
        expected = plain_loss(module, (20 * x.to(dtype), y)).item()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = plain_loss(module, (20 * x.to(dtype), y)).item()
    assert observer.history[0].error is None
    assert observer.history[0].spectrum.loss == pytest.approx(expected, rel={torch.float64: 1e-12}.get(dtype, 1e-6))
    if precision == "bf16-mixed":
        assert expected != pytest.approx(rounded, rel=1e-4), "or autocast would not have shown"
    assert autocast
    assert not any(autocast)


def test_the_spectrum_under_mixed_precision_is_that_of_full_precision(tmp_path: Path) -> None:
    """At the same weights: the initial ones."""
    nodes = []
    for precision in ("32-true", "bf16-mixed"):
        observer = callback(at_start=True)
        fit(tmp_path, observer, precision=precision, max_epochs=1, data=loader())
        nodes.append([freeze(record.spectrum.nodes) for record in observer.history])
    assert nodes[0][0] == nodes[1][0]
    assert nodes[0][1] != nodes[1][1], "the training itself was another one"


def test_the_spectrum_is_that_of_the_loss_not_of_gradient_hooks(tmp_path: Path) -> None:
    """A hook that clips or scales gradients changes the training, and is none of the loss's derivatives."""
    calls: list[float] = []

    class WithHook(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].weight.register_hook(self.halve)

        def halve(self, gradient: Tensor) -> Tensor:
            calls.append(1.0)
            return gradient / 2

    nodes = []
    for module_class in (Classifier, WithHook):
        observer = callback(at_start=True)
        fit(tmp_path, observer, module=module_class(), data=loader())
        nodes.append([freeze(record.spectrum.nodes) for record in observer.history])
    assert nodes[0][0] == nodes[1][0], "of the same initial weights"
    assert nodes[0][1] != nodes[1][1], "the training itself was another one"
    assert len(calls) == 10, "once a batch, so that the hook is in place again"
