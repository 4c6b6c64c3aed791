"""The analyzed loss is the one that is trained, without its randomness, also where evaluation mode is another function.

Every stand-in comes with its training loss written out in formulas, of which the Hessian is taken.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.training import loss_mode
from tests.oracles import dense_hessian
from tests.training.broken import raising
from tests.training.modules import Classifier, callback, fit, freeze, loader, plain_loss
from tests.training.samples.drawn import FiniteStream

SAMPLES = 12
Weights = dict[str, Tensor]

X = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.arange(SAMPLES) % 2


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


class Base(pl.LightningModule):
    """A perceptron with a second head, in float64, initialized the same every time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.first, self.last, self.aux = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.double()

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.hidden(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Training losses in formulas ------------------------------------------------------------------------------------------


def entropy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.logsumexp(1) - (logits * F.one_hot(y, 2)).sum(1)).mean()


def hidden(w: Weights, x: Tensor) -> Tensor:
    return (x @ w["first.weight"].T + w["first.bias"]).tanh()


def head(w: Weights, name: str, h: Tensor) -> Tensor:
    return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def plain(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return entropy(head(w, "last", hidden(w, x)), y)


def with_auxiliary(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return plain(w, x, y) + 0.4 * entropy(head(w, "aux", hidden(w, x)), y)


def of_forces(w: Weights, x: Tensor, _: Tensor) -> Tensor:
    h, v = hidden(w, x), w["last.weight"][0]
    forces = ((1 - h.square()) * v) @ w["first.weight"]
    return (h @ v + w["last.bias"][0]).square().mean() + (forces + x).square().mean()


# Stand-ins ------------------------------------------------------------------------------------------------------------


class Unscale(nn.Module):
    """Acts in evaluation mode only, as chemprop's transform of outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else 5 * x + 1


class Transformed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.unscale = Unscale()

    def forward(self, x: Tensor) -> Tensor:
        return self.unscale(super().forward(x))


class TransformedWithHook(Transformed):
    """Says what evaluation means, as chemprop's MPNN."""

    def on_validation_model_eval(self) -> None:
        self.eval()
        self.unscale.train()


class TwoOutputs(Base):
    """Returns a second output in training only, as torchvision's GoogLeNet."""

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return (self.last(h), self.aux(h)) if self.training else self.last(h)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out, other = self(batch[0])
        return F.cross_entropy(out, batch[1]) + 0.4 * F.cross_entropy(other, batch[1])


class Auxiliary(Base):
    """Adds the loss of a second head in training only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        h = self.hidden(batch[0])
        loss = F.cross_entropy(self.last(h), batch[1])
        return loss + 0.4 * F.cross_entropy(self.aux(h), batch[1]) if self.training else loss


class ForceField(Base):
    """Keeps the graph of its forces in training only: in evaluation mode the loss has the same value."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        energy = self(x)[:, 0]
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training, retain_graph=True)
        return energy.square().mean() + (forces + batch[0]).square().mean()


class FunctionalDropout(Base):
    def hidden(self, x: Tensor) -> Tensor:
        return F.dropout(super().hidden(x), 0.5, training=self.training)


class CheckpointedDropoutAndHead(Auxiliary):
    def hidden(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return F.dropout(self.first(x).tanh(), 0.5, training=self.training)

        return checkpoint(block, x, use_reentrant=False)


class DropPath(nn.Module):
    """Stochastic depth, as timm writes it: neither a layer of PyTorch nor one of its functions."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 0.5, dtype=x.dtype)) if self.training else x


class DropPathAndHead(Auxiliary):
    def __init__(self) -> None:
        super().__init__()
        self.path = DropPath()

    def hidden(self, x: Tensor) -> Tensor:
        return self.path(super().hidden(x))


class Noisy(Base):
    """Adds noise of its own making in training."""

    def hidden(self, x: Tensor) -> Tensor:
        h = super().hidden(x)
        return h + torch.randn_like(h) if self.training else h


class AveragedWeights(Transformed):
    """Validates with other weights, as averages and schedule-free optimizers do, and with gradients."""

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.unscale.train()
        for p in self.parameters():
            p.data.mul_(0.5)
        torch.set_grad_enabled(False)


STAND_INS: dict[type[Base], tuple[Callable[..., Tensor], str, str | None]] = {
    # training loss, mode, what is said
    Base: (plain, "eval", None),
    Transformed: (plain, "deterministic", "evaluation mode is not its training without randomness"),
    TransformedWithHook: (plain, "eval", None),
    AveragedWeights: (plain, "eval", None),
    TwoOutputs: (with_auxiliary, "deterministic", "evaluation mode fails (too many values to unpack"),
    Auxiliary: (with_auxiliary, "deterministic", "evaluation mode is not its training without randomness"),
    ForceField: (of_forces, "deterministic", "evaluation mode is not its training without randomness"),
    FunctionalDropout: (plain, "eval", None),
    CheckpointedDropoutAndHead: (with_auxiliary, "deterministic", "mode is not its training without randomness"),
    DropPathAndHead: (with_auxiliary, "deterministic", "mode is not its training without randomness"),
    Noisy: (plain, "eval", "the loss in training mode is random"),
}


def said(caplog: pytest.LogCaptureFixture, caught: list[warnings.WarningMessage]) -> list[str]:
    """Return what is said of modes, as information or as a warning."""
    everything = [record.getMessage() for record in caplog.records] + [str(w.message) for w in caught]
    return [text for text in everything if text.startswith("lightning_hesd: the")]


def analyzed(tmp_path: Path, module: pl.LightningModule, **kwargs: Any) -> HessianSpectrumCallback:
    """Train for an epoch with an analysis of all samples at its end, by as many steps as there are parameters."""
    observer = callback(**{"steps": 60, "num_samples": SAMPLES, **kwargs})
    fit(tmp_path, observer, module=module, data=data(), max_epochs=1)
    return observer


@pytest.mark.parametrize("kind", STAND_INS)
def test_the_loss_is_that_of_training_without_randomness(
    kind: type[Base], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loss, mode, message = STAND_INS[kind]
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        observer = analyzed(tmp_path, module := kind())
    spectrum = observer.history[0].spectrum
    assert spectrum is not None
    written_out = dense_hessian(module, [(X, Y)], lambda m, batch: loss(dict(m.named_parameters()), *batch))
    expected = torch.linalg.eigvalsh(written_out)[[0, -1]].tolist()
    assert spectrum.loss == pytest.approx(loss(dict(module.named_parameters()), X, Y).item(), rel=1e-12)
    # Both are exact up to rounding in float64: there are more steps than parameters.
    assert [spectrum.lambda_min, spectrum.lambda_max] == pytest.approx(expected, abs=1e-9 * expected[-1])
    assert (spectrum.mode, spectrum.verified) == (mode, "yes")
    texts = said(caplog, caught)
    assert len(texts) == (message is not None)
    assert message is None or message in texts[0]


@pytest.mark.filterwarnings("ignore:.*is not its training without randomness:RuntimeWarning")
@pytest.mark.parametrize("kind", [AveragedWeights, CheckpointedDropoutAndHead])
def test_choosing_the_mode_leaves_training_as_it_is(kind: type[Base], tmp_path: Path) -> None:
    analyzed(tmp_path, module := kind())
    untouched = fit(tmp_path, module=kind(), data=data(), max_epochs=1).lightning_module
    assert freeze(module.state_dict()) == freeze(untouched.state_dict())
    assert [m.training for m in module.modules()] == [m.training for m in untouched.modules()]
    assert torch.is_grad_enabled()


def test_it_says_both_losses_and_that_of_training(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="is not its training without randomness") as caught:
        observer = analyzed(tmp_path, module := Transformed())
    (text,) = [str(w.message) for w in caught if "is not its training" in str(w.message)]
    found = re.search(r"is (\S+) in evaluation mode and (\S+) in .* reported (\S+) on average over its last 3", text)
    assert found is not None
    evaluation, training, reported = map(float, found.groups())
    assert evaluation == pytest.approx(F.cross_entropy(module.eval()(X), Y).item(), rel=1e-3)
    assert training == pytest.approx(F.cross_entropy(module.train()(X), Y).item(), rel=1e-3)
    assert training < reported < 1.2 * training, "before the weights moved on"
    assert "in mode 'deterministic'" in str(observer.history[0].spectrum)


# Layers of PyTorch ----------------------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """Batch normalization that is no subclass of PyTorch's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.running_mean
        self.running_mean.lerp_(x.mean(0).detach(), 0.1)
        return x - x.mean(0)


class FunctionalNorm(OwnNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, torch.ones(x.shape[1]), training=self.training)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(self.layer(x[:, None]))[0]
        return F.scaled_dot_product_attention(h, h, h, dropout_p=0.3 if self.training else 0.0)[:, 0]


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.BatchNorm1d(6), nn.Dropout(0.3), nn.RReLU(), nn.AlphaDropout(0.2)],
        lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))],
        lambda: [OwnNorm(6)],
        lambda: [FunctionalNorm(6)],
        lambda: [Attention()],
    ],
    ids=["batch_norm_and_dropout", "spectral_norm", "own_norm", "functional_norm", "attention"],
)
def test_usual_networks_are_analysed_in_evaluation_mode_as_ever(layers: Any, tmp_path: Path) -> None:
    nodes = {}
    for mode in ("auto", "eval"):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = Classifier(*layers())
        observer = callback(mode=mode)  # any warning fails the test
        fit(tmp_path, observer, module=module, max_epochs=1)
        assert observer.history[0].spectrum.mode == "eval"
        nodes[mode] = freeze(observer.history[0].spectrum.nodes)
    assert nodes["auto"] == nodes["eval"]


# What is asked for, and when it is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "loss"), [("eval", None), ("deterministic", plain), ("train", plain), ("keep", plain)]
)
def test_the_mode_can_be_asked_for(mode: Any, loss: Any, tmp_path: Path) -> None:
    observer = analyzed(tmp_path, module := Transformed(), mode=mode)
    spectrum = observer.history[0].spectrum
    expected = F.cross_entropy(module.eval()(X), Y) if loss is None else loss(dict(module.named_parameters()), X, Y)
    assert spectrum.loss == pytest.approx(expected.item(), rel=1e-12)
    assert spectrum.mode == mode


class FailingEverywhere(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step < 3:
            return super().training_step(batch, batch_idx)
        return raising(ArithmeticError("nothing" if self.training else "nothing in evaluation mode"))()


def test_a_loss_that_fails_in_both_modes_fails_as_in_evaluation_mode(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError, match="nothing in evaluation mode"):
        analyzed(tmp_path, FailingEverywhere())


def test_the_choice_is_made_once_and_kept_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    choose = loss_mode.LossMode._choose
    monkeypatch.setattr(loss_mode.LossMode, "_choose", lambda *args: made.append(1) or choose(*args))
    first, resumed = (callback(generalization_dataloader=data(), num_samples=SAMPLES, layers="auto") for _ in range(2))
    with pytest.warns(RuntimeWarning, match="is not its training"):
        trainer = fit(tmp_path, first, module=Transformed(), data=data(), max_epochs=2)
    assert len(made) == 1
    assert {s.mode for r in first.history for s in [*r.spectra.values(), *r.layers.values()]} == {"deterministic"}

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, resumed, module=Transformed(), data=data(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert len(made) == 1
    assert [record.spectrum.mode for record in resumed.history] == ["deterministic"] * 3

    fit(tmp_path, resumed, module=Base(), data=data(), max_epochs=1)
    assert len(made) == 2
    assert [record.spectrum.mode for record in resumed.history] == ["eval"]


OF_ONES_OWN = {"dataloader": loader(), "loss_fn": plain_loss}


@pytest.mark.parametrize(
    ("options", "made", "first"),
    [
        ({}, loader, "`training_step` over 10 samples of the training data in 2 batches"),
        (OF_ONES_OWN, loader, "`loss_fn` over 10 samples of `dataloader` in 2 batches"),
        ({}, lambda: loader(FiniteStream(40)), "`training_step` over the first 10 samples of training"),
    ],
    ids=["training", "own", "kept"],
)
def test_verbose_says_what_is_analyzed(
    options: Any, made: Any, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, callback(verbose=True, num_samples=10, **options), data=made(), max_epochs=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "analyzed" in line]
    assert said[0] == f"hesd: the mean loss of {first} is analyzed"
    assert said[1].startswith("hesd: the loss is analyzed in evaluation mode (the same loss and gradient as in ")
    assert len(said) == 2
