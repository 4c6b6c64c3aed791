"""The diagonal that optimizers divide by: read from their states, checked against the steps they take."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_hesd import SpectrumHistory, hessian_spectrum
from lightning_hesd.training.preconditioner import UnreadableOptimizerError, read_preconditioner
from tests.training.modules import Classifier, callback, fit, plain_loss, samples

LR = 0.01


def stepped(optimizer: Optimizer, p: nn.Parameter, gradient: Tensor | None = None) -> Optimizer:
    """Return the optimizer after one step with this gradient of p, by default of ones."""
    p.grad = torch.ones_like(p) if gradient is None else gradient
    optimizer.step()
    return optimizer


DIRECTIONS: dict[str, tuple[Callable[..., Optimizer], Callable[[dict[str, Any], Tensor], Tensor]]] = {
    # What is divided by D in a step of length LR, from state and gradient.
    "SGD": (lambda p: SGD(p, LR), lambda _, g: g),
    "SGD, momentum": (lambda p: SGD(p, LR, momentum=0.9), lambda s, _: s["momentum_buffer"]),
    "Adam": (lambda p: Adam(p, LR), lambda s, _: s["exp_avg"] / (1 - 0.9 ** float(s["step"]))),
    "AdamW": (
        lambda p: AdamW(p, LR, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0),
        lambda s, _: s["exp_avg"] / (1 - 0.8 ** float(s["step"])),
    ),
    "Adam, amsgrad": (lambda p: Adam(p, LR, amsgrad=True), lambda s, _: s["exp_avg"] / (1 - 0.9 ** float(s["step"]))),
    "RMSprop": (lambda p: RMSprop(p, LR), lambda _, g: g),
    "RMSprop, centered": (lambda p: RMSprop(p, LR, centered=True, alpha=0.8, eps=1e-4), lambda _, g: g),
    "Adagrad": (lambda p: Adagrad(p, LR, lr_decay=0.1, initial_accumulator_value=0.5), lambda _, g: g),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_it_is_what_the_last_step_divided_by(name: str) -> None:
    make, direction = DIRECTIONS[name]
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    optimizer = make([p])
    for _ in range(5):
        p.grad = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
    diagonal = read_preconditioner([optimizer]).diagonal[p]
    assert p.grad is not None
    expected = LR * direction(optimizer.state[p], p.grad) / diagonal
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-9, atol=1e-14)


def test_parameters_without_a_gradient_are_left_as_they_are() -> None:
    used, idle, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad = False
    diagonal = read_preconditioner([stepped(Adam([used, idle, frozen]), used)]).diagonal
    assert set(diagonal) == {used, idle}
    assert diagonal[idle].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "threshold"),
    [
        (lambda p: RMSprop(p, 0.1), 20.0),
        (lambda p: Adagrad(p, 0.1), 20.0),
        (lambda p: Adam(p, 0.1, betas=(0.9, 0.999)), 380.0),
        (lambda p: Adam(p, torch.tensor(0.1), capturable=False, foreach=False), 380.0),
    ],
)
def test_thresholds_of_stability(make: Callable[..., Optimizer], threshold: float) -> None:
    """Cohen et al.: preconditioned gradient descent 2/lr, Adam 2(1 + β₁)/((1 - β₁) lr)."""
    p = nn.Parameter(torch.ones(2))
    optimizer = stepped(make([p]), p)
    assert read_preconditioner([optimizer]).threshold == pytest.approx(threshold)
    optimizer.param_groups[0]["lr"] *= 0
    assert read_preconditioner([optimizer]).threshold is None


@pytest.mark.parametrize(
    "make",
    [
        SGD,
        lambda p, lr: SGD(p, lr, momentum=0.9),
        lambda p, lr: SGD(p, lr, momentum=0.9, dampening=0.5),
        lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True),
    ],
    ids=["plain", "heavy ball", "dampened", "Nesterov"],
)
@pytest.mark.parametrize("side", [0.98, 1.02])
def test_steps_diverge_beyond_the_threshold(make: Callable[..., Optimizer], side: float) -> None:
    """On a quadratic of curvature `side` times the threshold."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([p], 0.1)
    threshold = read_preconditioner([optimizer]).threshold
    assert threshold is not None
    for _ in range(2000):
        p.grad = side * threshold * p.detach()
        optimizer.step()
    assert (abs(p.item()) > 1e3) == (side > 1)


@pytest.mark.parametrize(
    "groups",
    [
        [{"lr": 0.1}, {"lr": 0.2}],
        [{"lr": 0.0}],
        [{"lr": 0.0, "momentum": 0.9, "nesterov": True}],
        [{"lr": 0.1, "momentum": 0.9, "dampening": 1.0}],
        [{"lr": 1e-320}],
        [{"lr": 0.0}, {"lr": 0.1}],
    ],
    ids=["different", "zero", "Nesterov", "fully dampened", "denormal", "beside another group"],
)
def test_steps_of_different_lengths_or_of_length_zero_have_no_threshold(groups: list[dict[str, Any]]) -> None:
    parameters = [{"params": [nn.Parameter(torch.ones(2))], **group} for group in groups]
    assert read_preconditioner([SGD(parameters, 0.1)]).threshold is None


class SignDescent(SGD):
    """Steps of its own, whatever class it extends."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad.sign()


def test_subclasses_are_read_as_the_class_they_derive_from_beside_other_optimizers() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    read = read_preconditioner([type("Own", (SGD,), {})([p], 0.1), SGD([q], 0.1)])
    assert read.is_identity
    assert read.threshold == pytest.approx(20.0)


def test_unreadable_optimizers_say_so() -> None:
    p = nn.Parameter(torch.ones(2))
    for optimizer, message in (
        (SignDescent([p]), "the preconditioner of SignDescent cannot be read"),
        (SGD([p], maximize=True), "SGD steps along the gradient"),
        (LBFGS([p]), "the preconditioner of LBFGS cannot be read; known are SGD, Adam"),
        (Adam([p]), "holds no 'exp_avg_sq': it has made no step yet"),
        (stepped(Adam([p], eps=0.0), p, torch.tensor([1.0, 0.0])), r"Adam divides .* \(2,\) by values from 0 to 1"),
    ):
        with pytest.raises(UnreadableOptimizerError, match=message):
            read_preconditioner([optimizer])


class Trained(Classifier):
    """A classifier with another optimizer, and a scheduler if there is to be one."""

    def __init__(self, make: Callable[..., Optimizer], schedule: Callable[[Optimizer], Any] | None = None) -> None:
        super().__init__()
        self.make = make
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def observer_of(**options: Any) -> Any:
    return callback(preconditioner="optimizer", **options)


def test_the_callback_computes_preconditioned_spectra(tmp_path: Path) -> None:
    spectra = observer_of(at_start=True, steps=6)
    trainer = fit(tmp_path, spectra, module=Trained(lambda p: Adam(p, LR)), logger=CSVLogger(tmp_path))
    start, *_, record = spectra.history
    assert start.preconditioned is None
    batch = samples(list(spectra.state_dict()["samples"]["training"]["indices"]))
    read, module = read_preconditioner(trainer.optimizers), trainer.lightning_module
    theirs = hessian_spectrum(module, [batch], plain_loss, steps=6, preconditioner=read.named(module))
    assert record.preconditioned.lambda_max == pytest.approx(theirs.lambda_max, rel=1e-4)
    assert record.preconditioned.matrix == "preconditioned hessian"
    assert record.stability_threshold == read.threshold == pytest.approx(3800.0)
    assert record.stability_ratio == pytest.approx(theirs.lambda_max / 3800.0, rel=1e-4)
    metrics = trainer.callback_metrics
    assert metrics["hesd/stability_ratio"].item() == pytest.approx(record.stability_ratio, rel=1e-6)
    assert metrics["hesd_pre/c_t"].item() == pytest.approx(record.preconditioned.c_t, rel=1e-6)


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1), lambda p: Adam(p, 0.01)], ids=["SGD", "Adam"])
def test_the_last_step_of_a_cosine_schedule_has_no_stability_ratio(
    tmp_path: Path, make: Callable[..., Optimizer]
) -> None:
    spectra = observer_of(monitor_gradients=True)
    module = Trained(make, lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    trainer = fit(tmp_path, spectra, module=module, logger=CSVLogger(tmp_path))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    before, last = spectra.history
    assert before.stability_ratio is not None
    assert last.preconditioned is not None
    assert (last.error, last.stability_threshold, last.stability_ratio) == (None, None, None)
    saved = SpectrumHistory.load(trainer.log_dir or tmp_path)
    assert [r.stability_ratio for r in saved] == [before.stability_ratio, None]


def test_gradient_descent_is_preconditioned_by_one_and_diagonals_can_be_given(tmp_path: Path) -> None:
    diagonals = {name: torch.full_like(p, 4.0) for name, p in Classifier().named_parameters()}
    spectra, given = observer_of(), callback(name="given", preconditioner=diagonals)
    trainer = fit(tmp_path, spectra, given)
    record, scaled = spectra.history[-1], given.history[-1]
    assert record.preconditioned.nodes.tolist() == record.spectrum.nodes.tolist()
    lr = 0.1 * 0.7**2  # that of the next epoch: the scheduler has been there before the callback
    ratio = trainer.callback_metrics["hesd/stability_ratio"].item()
    assert ratio == pytest.approx(record.spectrum.lambda_max * lr / 3.8, rel=1e-5)
    assert scaled.preconditioned.lambda_max == pytest.approx(scaled.spectrum.lambda_max / 4, rel=1e-4)
    assert scaled.stability_ratio is None


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1), lambda p: Adam(p, 0.01)], ids=["SGD", "Adam"])
def test_frozen_weights_are_not_seen_by_the_optimizer(tmp_path: Path, make: Callable[..., Optimizer]) -> None:
    module = Trained(lambda p: make([q for q in p if q.requires_grad]))
    module.net[0].requires_grad_(False)
    spectra = observer_of(include_frozen=True)
    fit(tmp_path, spectra, module=module, max_epochs=1)
    (record,) = spectra.history
    assert record.spectrum.dimension == 65 * 6 + 7 * 10
    assert record.preconditioned.dimension == 7 * 10


def test_unreadable_optimizers_cost_a_warning_and_nothing_else(tmp_path: Path) -> None:
    spectra = observer_of(on_error="warn")
    with pytest.warns(RuntimeWarning, match="no preconditioned spectra.*the preconditioner of Rprop") as said:
        fit(tmp_path, spectra, module=Trained(lambda p: torch.optim.Rprop(p, 0.01)))
    assert len([w for w in said if "no preconditioned spectra" in str(w.message)]) == 1
    assert [(r.error, r.preconditioned) for r in spectra.history] == [(None, None)] * 2
    assert all(r.spectrum is not None and math.isfinite(r.spectrum.c_t) for r in spectra.history)
