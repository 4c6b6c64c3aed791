"""The cross-entropy of labels has the derivatives that PyTorch's has, and one tensor of the logits' size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.numerics.derivatives import cross_entropy as module_under_test
from lightning_hesd.numerics.derivatives.replacements import Replacements
from tests.numerics.derivatives import comparisons
from tests.numerics.derivatives.comparisons import assert_equal_to_rounding

CLASSES = 4

SHAPES: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(5, CLASSES),
    "images": lambda: torch.randn(3, CLASSES, 2, 1),
    "sequences": lambda: torch.randn(2, 3, CLASSES).transpose(1, 2),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored": {"ignore_index": 2},
    "smoothed": {"label_smoothing": 0.3, "ignore_index": -100},
    "weighted": {"weight": torch.tensor([0.5, 2.0, 0.0, 3.0]).double()},
    "all": {"weight": torch.tensor([0.5, 0.0, 2.0, 3.0]).double(), "label_smoothing": 0.2, "ignore_index": 1},
}


@pytest.fixture(autouse=True)
def made(replaced: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replacements that were made, in chunks of two rows."""
    monkeypatch.setattr(module_under_test, "_CHUNK", 2 * CLASSES)
    return replaced


def drawn(shape: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = SHAPES[shape]().double()
    target = torch.randint(CLASSES, (*logits.shape[:1], *logits.shape[2:]))
    target.view(-1)[:3] = torch.tensor([1, 2, 3])
    return logits, target


def derivatives(function: Callable[..., Tensor], logits: Tensor, *, nonlinear: bool) -> list[Tensor]:
    """Return loss, gradient, Hessian, and the gradient and Hessian of the loss plus the gradient's squares."""
    z = logits.detach().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        terms = function(z)
        parts = terms * torch.linspace(0, 2, terms.numel()).double().view(terms.shape) if terms.ndim else terms
        return parts.sum().square() if nonlinear else parts.sum()

    def penalized(z: Tensor) -> Tensor:
        value = loss(z)
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        return value + slope.square().sum()

    results = []
    for scalar in (loss, penalized):
        value = scalar(z)
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        rows = [torch.autograd.grad(s, z, retain_graph=True)[0].flatten() for s in slope.flatten()]
        results += [value.detach(), slope.detach(), torch.stack(rows)]
    return results


@pytest.mark.parametrize(
    ("shape", "options", "reduction", "nonlinear"),
    [
        *(("rows", options, "mean", True) for options in OPTIONS),
        *(("rows", "all", reduction, False) for reduction in ("mean", "sum", "none")),
        *((shape, "all", reduction, True) for shape in ("images", "sequences") for reduction in ("mean", "none")),
    ],
)
def test_loss_and_derivatives(shape: str, options: str, reduction: str, nonlinear: bool, made: list[str]) -> None:
    logits, target = drawn(shape)
    given: dict[str, Any] = {**OPTIONS[options], "reduction": reduction}
    with Replacements():
        here = derivatives(lambda z: F.cross_entropy(z, target, **given), logits, nonlinear=nonlinear)
    assert made
    there = derivatives(lambda z: F.cross_entropy(z, target, **given), logits, nonlinear=nonlinear)
    assert_equal_to_rounding(here, there)


def test_products_agree_with_differences_of_the_loss() -> None:
    logits, target = drawn("rows")
    direction, step = torch.randn_like(logits), 1e-4

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target, label_smoothing=0.1, ignore_index=2)

    with Replacements():
        z = logits.requires_grad_()
        (slope,) = torch.autograd.grad(loss(z), z, create_graph=True)
        (product,) = torch.autograd.grad(slope, z, direction)
    ahead, at, behind = (loss(logits.detach() + s * direction) for s in (step, 0.0, -step))
    assert float((product * direction).sum()) == pytest.approx(float((ahead - 2 * at + behind) / step**2), rel=1e-6)


@pytest.mark.parametrize("weight", [None, torch.arange(1.0, 5.0).double()], ids=["", "weighted"])
def test_losses_with_no_weight_keep_their_derivatives(weight: Tensor | None) -> None:
    """A factor on a row's loss that is zero, and learned: what depends on the row's probabilities remains."""
    logits, target = drawn("rows")

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        z, factors = logits.clone().requires_grad_(), torch.zeros(5).double().requires_grad_()
        slopes = torch.autograd.grad((function(z) * factors).sum(), (z, factors), create_graph=True)
        return list(torch.autograd.grad(sum(s.sin().sum() + s.sum() for s in slopes), (z, factors)))

    def losses(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target, weight, reduction="none")

    with Replacements():
        here = second(losses)
    assert_equal_to_rounding(here, second(losses))


def test_masked_classes_and_rows_that_are_all_ignored() -> None:
    logits, target = drawn("rows")
    logits[:, 3] = -torch.inf
    target[:] = torch.tensor([0, 1, 2, -100, -100])
    found = []
    for context in (Replacements(), torch.enable_grad()):
        with context:
            z = logits.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(z, target, reduction="sum"), z, create_graph=True)
            found.append([slope, *torch.autograd.grad(slope.pow(3).sum(), z)])
            assert F.cross_entropy(z, torch.full_like(target, -100)).isnan()
    assert all(mine.isfinite().all() for mine in found[0])
    assert_equal_to_rounding(*found)


def test_on_other_devices_nothing_is_read_back(made: list[str]) -> None:
    """PyTorch's device without data refuses whatever would wait for a result, or mix devices."""
    logits = torch.randn(5, CLASSES, device="meta", requires_grad=True)
    target, weight = torch.zeros(5, dtype=torch.long, device="meta"), torch.ones(CLASSES, device="meta")
    with Replacements():
        loss = F.cross_entropy(logits, target, weight, label_smoothing=0.1)
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    (product,) = torch.autograd.grad(slope, logits, slope)
    assert made
    assert product.shape == logits.shape


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "probabilities": lambda z: F.cross_entropy(z, z.detach().softmax(1)),
    "no batch": lambda z: F.cross_entropy(z[0], torch.tensor(1)),
    "old reduction": lambda z: F.cross_entropy(z, torch.tensor([1, 2]), reduce=True, size_average=True),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_left_to_pytorch(name: str, made: list[str]) -> None:
    z = torch.randn(2, CLASSES, requires_grad=True)
    with Replacements():
        here = OTHERS[name](z)
    assert torch.equal(here, OTHERS[name](z))
    assert not made


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "class": lambda z: F.cross_entropy(z, torch.tensor([1, CLASSES])),
    "smoothing": lambda z: F.cross_entropy(z, torch.tensor([1, 2]), label_smoothing=1.5),
    "weights": lambda z: F.cross_entropy(z, torch.tensor([1, 2]), torch.ones(3)),
    "reduction": lambda z: F.cross_entropy(z, torch.tensor([1, 2]), reduction="some"),
    "learned weights": lambda z: F.cross_entropy(z, torch.tensor([1, 2]), torch.ones(4).requires_grad_()),
    "labels": lambda z: F.cross_entropy(z, torch.tensor([1, 2, 3])),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_meet_the_error_of_pytorch(name: str, made: list[str]) -> None:
    z = torch.randn(2, CLASSES, requires_grad=True)
    comparisons.assert_error_of_pytorch(lambda: WRONG[name](z))
    assert not made


@pytest.mark.parametrize("sequences", [False, True])
def test_memory_of_a_product(sequences: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_CHUNK", 2**16)
    vocabulary, context = 20_000, 256
    layers = nn.Embedding(vocabulary, 4), nn.Linear(4, vocabulary, bias=False)
    net, ids = nn.Sequential(*layers), torch.randint(vocabulary, (1, context))
    logits = 4 * context * vocabulary

    def loss() -> Tensor:
        with Replacements():
            return F.cross_entropy(net(ids).mT, ids) if sequences else F.cross_entropy(net(ids).flatten(0, 1), ids[0])

    building, multiplying = comparisons.memory_of_a_product(loss, list(net.parameters()))
    assert building.live < 1.1 * logits  # the gradient on the logits
    assert building.peak < 2.3 * logits
    assert multiplying.peak < 2.3 * logits  # the derivatives of the logits and of their gradient
