"""Products from Jacobians of the outputs are those with the dense Hessian, or are not used."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import layer_spectra
from lightning_hesd.numerics.analysis.preparation import opened_operators
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.blocks import blocks
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.parameters import select_parameters
from lightning_hesd.numerics.operators import output_jacobians
from lightning_hesd.numerics.operators.diagonal_block import block_products
from tests import cases, oracles

REASON = "Jacobians of the outputs"


class Residual(nn.Module):
    """Convolutions with batch norm beside a shortcut, at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU()),
            *(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x[:, :, ::2, ::2])


class Tied(nn.Module):
    """The same weights in two layers, with others between them."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.between, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.between(self.twice(x).relu()).relu()).relu())


def perceptron(*between: nn.Module, outputs: int = 3) -> nn.Module:
    first, *others = between
    layers = [module for activation in (first, *others) for module in (nn.Linear(6, 6), activation)]
    return nn.Sequential(*layers, nn.Linear(6, outputs))


def images() -> nn.Module:
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    stem = (nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2))
    return nn.Sequential(*stem, Residual(), nn.Dropout(0.5), *pooled)


SUITABLE: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: perceptron(nn.ReLU(), nn.Hardtanh()),
    "images": images,
    "images, channels last": lambda: images().to(memory_format=torch.channels_last),
    "tied": Tied,
    "normalized": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    # What is curved in a layer itself does not matter.
    "layer norm in layers": lambda: perceptron(nn.LayerNorm(6), nn.ReLU()),
    "gated": lambda: nn.Sequential(nn.Bilinear(6, 6, 6), nn.ReLU(), nn.Linear(6, 3)),
}


UNSUITABLE: dict[str, Callable[[], nn.Module]] = {
    "GELU": lambda: perceptron(nn.GELU(), nn.ReLU()),
    "tanh": lambda: perceptron(nn.ReLU(), nn.Tanh()),
    "layer norm": lambda: perceptron(nn.ReLU(), cases.Applied(lambda x: F.layer_norm(x, (6,)))),
    "product": lambda: perceptron(cases.Applied(lambda x: x * x.sigmoid())),
    # These two differ too little for a comparison of products to tell it from rounding.
    "slightly curved": lambda: perceptron(cases.Applied(lambda x: x + 1e-13 * x**3), nn.ReLU()),
    "samples that mix": lambda: perceptron(nn.ReLU(), cases.Applied(lambda x: x - 1e-12 * x.mean(0))),
    "many outputs": lambda: perceptron(nn.ReLU(), outputs=33),
}


def problem(name: str, network: Callable[[], nn.Module]) -> cases.Problem:
    torch.manual_seed(0)
    module = network().double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.running_var, layer.weight, layer.bias, layer.running_mean):
                nn.init.uniform_(tensor, 0.5, 1.5)
    shape = (1, 8, 8) if name.startswith("images") else (6,)
    batches = [(torch.randn(n, *shape, dtype=torch.float64), torch.randint(3, (n,))) for n in (4, 3)]
    return cases.Problem(module, batches, bilinear_cross_entropy if name == "gated" else cases.cross_entropy)


def bilinear_cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module[1:](module[0](batch[0], batch[0])), batch[1])


def uses_jacobians(given: cases.Problem, **options: Any) -> bool:
    """Return whether Jacobians give the products; if so, check those of all blocks against the dense Hessian."""
    module, batches, loss_fn = given
    chosen = analysis_options(**options)
    parameters = blocks(module, "auto", select_parameters(module, chosen))
    generator = torch.Generator().manual_seed(1)
    with opened_operators(module, weighted_batches(batches), loss_fn, chosen, list(parameters.values())) as (found, _):
        if REASON not in found[0].risk.strategy_reason:
            return False
        vectors = [torch.randn(b.dimension, generator=generator, dtype=torch.float64) for b in found]
        results = block_products(found, vectors)
    everything = list(module.parameters())
    sizes = [p.numel() for p in everything]
    rows = dict(zip(everything, torch.arange(sum(sizes)).split(sizes), strict=True))
    hessian = oracles.dense_hessian(*given)
    for block, v, result in zip(parameters.values(), vectors, results, strict=True):
        at = torch.cat([rows[p] for p in block])
        expected = hessian[at][:, at] @ v
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12 * (1 + float(expected.norm())))
    return True


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_jacobians, "MIN_BLOCKS", 1)


@pytest.mark.parametrize("name", SUITABLE)
def test_products_are_those_with_the_dense_hessian(name):
    assert uses_jacobians(problem(name, SUITABLE[name]))


@pytest.mark.parametrize("name", UNSUITABLE)
def test_other_networks_keep_their_products(name):
    assert not uses_jacobians(problem(name, UNSUITABLE[name]))


@pytest.mark.parametrize("samples", [2, 3, 4, 7])
def test_samples_that_mix_in_a_single_place(samples):
    """By so little that a comparison of products does not tell it from rounding."""
    batch = (torch.randn(samples, 6, dtype=torch.float64), torch.randint(3, (samples,)))
    for to, other in itertools.permutations(range(samples), 2):
        mixing = torch.eye(samples, dtype=torch.float64)
        mixing[to, other] = 1e-12
        module, _, loss_fn = problem("mixing", lambda: perceptron(nn.ReLU(), cases.Applied(mixing.matmul)))  # noqa: B023
        assert not uses_jacobians(cases.Problem(module, [batch], loss_fn))


def contrast(module: nn.Module, batch: Any) -> Tensor:
    """A loss in which samples mix; its second derivative is taken as a whole."""
    outputs = module(batch[0])
    return (outputs @ outputs.T).logsumexp(1).mean()


@pytest.mark.parametrize(
    ("loss_fn", "is_suitable"),
    [
        (lambda m, b: cases.cross_entropy(m, b) + sum(p.square().sum() for p in m.parameters()) / 10, False),
        (contrast, True),
        (lambda m, b: m(b[0]).mean(), True),
        (lambda m, b: m(b[0]).relu().mean(), True),
        (lambda m, b: b[0].mean(), False),
    ],
    ids=["penalty", "contrast", "linear", "piecewise linear", "constant"],
)
def test_losses(loss_fn, is_suitable):
    module, batches, _ = problem("normalized", SUITABLE["normalized"])
    assert uses_jacobians(cases.Problem(module, batches, loss_fn)) == is_suitable


GGN = {"output_fn": lambda m, b: m(b[0]), "output_loss": lambda o, b: F.cross_entropy(o, b[1]), "matrix": "ggn"}


@pytest.mark.parametrize(
    "options",
    [{"strategy": "graph"}, {"strategy": "recompute"}, {"memory_budget": 60_000}, GGN],
    ids=["graph", "recompute", "little memory", "another matrix"],
)
def test_options_that_want_other_products_or_leave_no_room(options, monkeypatch):
    made: list[output_jacobians.JacobianProducts] = []
    monkeypatch.setattr(output_jacobians, "JacobianProducts", lambda *_: made.append(_))
    assert not uses_jacobians(problem("images", images), **options)
    assert not made  # not even a second graph, for which there is no room


@pytest.mark.parametrize(("least", "is_used"), [(3, True), (4, False), (5, False)])
def test_few_blocks_are_not_worth_it(least, is_used, monkeypatch):
    monkeypatch.setattr(output_jacobians, "MIN_BLOCKS", least)
    # Four blocks, one of which makes the outputs.
    assert uses_jacobians(problem("images", images)) == is_used


def test_a_wrong_product_is_not_used(monkeypatch):
    products = output_jacobians.JacobianProducts
    curved = products._curvature_of_loss
    monkeypatch.setattr(products, "_curvature_of_loss", lambda self, tangent: 1.001 * curved(self, tangent))
    assert not uses_jacobians(problem("perceptron", SUITABLE["perceptron"]))


class Idle(nn.Module):
    """A layer whose weights do not count, which its backward pass says in its own way."""

    def __init__(self, gradient: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.same = cases.custom("Same", lambda x, w: (x.clone(), w), lambda g, w: (g, gradient(w)))

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x, self.weight)


@pytest.mark.parametrize("gradient", [lambda _: None, torch.zeros_like, lambda w: 0 * w])
def test_weights_that_do_not_count(gradient):
    assert not uses_jacobians(problem("idle", lambda: perceptron(Idle(gradient), nn.ReLU())))


def test_spectra_in_float32_are_those_by_ordinary_products():
    module, batches, loss_fn = problem("images", images)
    module.float()
    batches = [(x.float(), y) for x, y in batches]
    usual = layer_spectra(module, batches, loss_fn, strategy="graph", steps=8)
    found = layer_spectra(module, batches, loss_fn, steps=8)
    for name, spectrum in found.items():
        assert REASON in spectrum.strategy_reason
        slack = 100 * torch.finfo(torch.float32).eps * spectrum.lambda_max
        assert math.isclose(spectrum.lambda_max, usual[name].lambda_max, rel_tol=0, abs_tol=slack)
        assert math.isclose(spectrum.lambda_min, usual[name].lambda_min, rel_tol=0, abs_tol=slack)
    assert all(p.grad is None for p in module.parameters())
