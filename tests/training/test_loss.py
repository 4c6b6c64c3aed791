"""The analyzed loss: `training_step` or `loss_fn`, without side effects, at the Trainer's precision."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from tests.training.broken import out_of_luck
from tests.training.modules import Classifier, Digits, callback, fit, freeze, loader, plain_loss, samples


class Returns(Classifier):
    """Returns another loss when an analysis calls it, that is, in evaluation mode."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if self.training else self.output(loss)


def nodes_of(folder: Path, module: Classifier) -> Any:
    """Train with one analysis at the end, and return its quadrature nodes."""
    observer = callback()
    fit(folder, observer, module=module, max_epochs=1)
    return freeze(observer.history[0].spectrum.nodes)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The quadrature nodes of a training_step that returns a tensor."""
    return nodes_of(tmp_path_factory.mktemp("plain"), Classifier())


@pytest.mark.parametrize(
    "output", [lambda loss: {"loss": loss, "text": "more"}, lambda loss: loss.reshape(1)], ids=["dict", "one_element"]
)
def test_the_forms_of_a_loss(output: Any, nodes: Any, tmp_path: Path) -> None:
    assert nodes_of(tmp_path, Returns(output)) == nodes


WITHOUT = "got a dict without 'loss': return it, or pass the callback `loss"


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda loss: {"other": loss}, MisconfigurationException, WITHOUT),
        (lambda loss: 0.5, MisconfigurationException, "got float"),
        (lambda loss: loss.expand(3), TypeError, r"the mean over the batch; got shape \(3,\)"),
    ],
    ids=["dict_without_loss", "number", "loss_per_sample"],
)
def test_no_loss(output: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        fit(tmp_path, callback(mode="eval"), module=Returns(output))


SIGNATURES: dict[str, Callable[..., Any]] = {
    "batch only": plain_loss,
    "another name": lambda self, batch, i: plain_loss(self, batch) + 0 * i,
    "index of the loader": lambda self, batch, batch_idx, dataloader_idx=0: (
        plain_loss(self, batch) + 0 * batch_idx + 0 * dataloader_idx
    ),
    "any arguments": lambda self, *args: plain_loss(self, args[-2]) + 0 * args[-1],
    "any keywords": lambda self, batch, **kwargs: plain_loss(self, batch),
}


@pytest.mark.parametrize("step", SIGNATURES.values(), ids=SIGNATURES)
def test_signatures(step: Callable[..., Any], nodes: Any, tmp_path: Path) -> None:
    module = type("Module", (Classifier,), {"training_step": step})
    assert nodes_of(tmp_path, module()) == nodes


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


def patched() -> Talkative:
    """Return a module with a `print` of its own instance only."""
    module = Talkative()
    module.print = lambda *_args: CALLS.append("print")  # type: ignore[method-assign]
    return module


def fails(module: Any, batch: Any) -> Tensor:
    module.training_step(batch, 0)
    return out_of_luck()


@pytest.mark.parametrize(
    ("make", "loss_fn", "counts"),
    [
        (Talkative, None, {}),
        (Talkative, fails, {}),
        (patched, fails, {"print": 5}),
        (Overriding, None, {"print": 5, "log": 10, "log_dict": 5}),  # Lightning's `log_dict` calls `log`
    ],
)
def test_muted_during_the_analysis_only(
    make: Callable[[], Talkative], loss_fn: Any, counts: dict[str, int], tmp_path: Path, capsys: Any
) -> None:
    """Also where it fails."""
    CALLS.clear()
    module, logger = make(), CSVLogger(tmp_path)
    names = ("print", "log", "log_dict")
    before = {name: vars(module).get(name) for name in names}
    observer = callback(loss_fn=loss_fn, on_error="warn", every_n_train_steps=2)
    with pytest.warns(RuntimeWarning, match="no luck") if loss_fn else contextlib.nullcontext():
        trainer = fit(tmp_path, observer, module=module, logger=logger, max_epochs=1)
    assert len(observer.history) == 2
    assert CALLS.count("analysis") >= 2
    assert {name: CALLS.count(name) for name in names} == dict.fromkeys(names, 0) | counts
    assert capsys.readouterr().out.split().count("c") == (5 if make is Talkative else 0)
    assert {name: vars(module).get(name) for name in names} == before
    assert trainer.loggers == [logger]
    assert module.logger is logger


def test_loss_fn_takes_the_place_of_training_step(tmp_path: Path) -> None:
    CALLS.clear()
    observer = callback(loss_fn=lambda module, batch: 2 * plain_loss(module, batch))
    module = fit(tmp_path, observer, module=Talkative(), max_epochs=1).lightning_module
    assert CALLS == ["training_step"] * 5
    batch = samples(observer.state_dict()["samples"]["training"]["indices"])
    assert observer.history[0].spectrum.loss == pytest.approx(2 * plain_loss(module, batch).item(), rel=1e-5)


@pytest.mark.parametrize(("num_samples", "layers"), [(16, []), (21, [nn.BatchNorm1d(6), nn.Dropout()])])
def test_the_loss_is_the_mean_over_the_samples(layers: list[nn.Module], num_samples: int, tmp_path: Path) -> None:
    observer = callback(num_samples=num_samples)
    module = fit(tmp_path, observer, module=Classifier(*layers)).lightning_module
    positions = observer.state_dict()["samples"]["training"]["indices"]
    assert len(set(positions)) == num_samples
    with torch.no_grad():
        expected = plain_loss(module.eval(), samples(positions)).item()
    assert observer.history[-1].spectrum.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", "float32"), ("64-true", "float64"), ("bf16-true", "bfloat16"), ("bf16-mixed", "float32")],
)
def test_precision(precision: Any, dtype: Any, tmp_path: Path) -> None:
    """The loss in the parameters' own type, and, under mixed precision, without autocast."""
    autocast, dtype = [], getattr(torch, dtype)

    class CreatesTensors(Classifier):
        """Creates a tensor in the middle of the computation, whose dtype is the default one at that time."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.training:
                autocast.append(torch.is_autocast_enabled("cpu"))
            return F.cross_entropy(self(batch[0]) @ torch.eye(10), batch[1])

    observer = callback(batch_size=16)
    data = loader(Digits(augment=lambda x: 20 * x))  # so large that rounding shows
    module = CreatesTensors()
    fit(tmp_path, observer, module=module, data=data, precision=precision, max_epochs=1)
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
    assert set(autocast) == {False}
