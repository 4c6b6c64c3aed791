"""Replaced operations give the values and derivatives that PyTorch's own give."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.derivatives.bilinear import Convolution
from lightning_hesd.numerics.derivatives.replacements import Replacements
from tests.numerics.derivatives.comparisons import assert_error_of_pytorch

CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": (2, (2, 2, 4, 4), (3, 2, 3, 3), {}),
    "strided": (2, (2, 2, 4, 4), (3, 2, 3, 3), {"stride": 2, "padding": 1}),
    "uneven": (2, (2, 2, 4, 5), (2, 2, 2, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (2, (1, 2, 6, 6), (3, 2, 3, 3), {"dilation": 2}),
    "grouped": (2, (2, 4, 3, 3), (4, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (2, (2, 3, 3, 3), (3, 1, 3, 3), {"groups": 3, "padding": (1,)}),
    "1d": (1, (2, 3, 5), (4, 3, 3), {"padding": 1}),
    "3d": (3, (1, 2, 3, 4, 3), (2, 2, 2, 2, 2), {}),
    "same": (2, (2, 3, 4, 4), (2, 3, 3, 3), {"padding": "same"}),
    "unbatched": (2, (3, 4, 4), (2, 3, 3, 3), {}),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, replaced: list[str]) -> None:
    dimensions, x_shape, w_shape, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    inputs = normal(*x_shape), normal(*w_shape), normal(w_shape[0])
    with Replacements():
        here = convolve(*inputs, **options)
        assert len(replaced) == (name not in {"same", "unbatched"})
        assert gradcheck(lambda *i: convolve(*i, **options), inputs, fast_mode=True)
        assert gradgradcheck(lambda *i: convolve(*i, **options), inputs, fast_mode=True)
    torch.testing.assert_close(here, convolve(*inputs, **options), rtol=1e-12, atol=1e-12)


STATISTICS = torch.tensor([0.5, -1.0, 2.0, 0.0]).double(), torch.tensor([1.0, 2.0, 0.5, 1.5]).double()

OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 2, 3, 3), (2, 2, 3, 3), (2,)]),
    "batch norm": (lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b), [(2, 4, 2, 2), (4,), (4,)]),
    "batch norm without bias": (lambda x, w: F.batch_norm(x, *STATISTICS, w), [(3, 4, 2), (4,)]),
    "batch norm without weight": (lambda x, b: F.batch_norm(x, *STATISTICS, None, b), [(3, 4, 2), (4,)]),
    "batch norm without parameters": (lambda x: F.batch_norm(x, *STATISTICS), [(3, 4, 2)]),
}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "convolution" not in name])
def test_values_and_derivatives(name: str, replaced: list[str]) -> None:
    operation, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [normal(*shape) for shape in shapes]
    with Replacements():
        here = operation(*inputs)
        assert len(replaced) == 1
        assert gradcheck(operation, inputs)
        assert gradgradcheck(operation, inputs)
    torch.testing.assert_close(here, operation(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", range(3))
@pytest.mark.parametrize("name", ["convolution", "batch norm"])
def test_derivatives_with_one_frozen_and_with_one_free(name: str, frozen: int, replaced: list[str]) -> None:
    operation, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    for free in ({0, 1, 2} - {frozen}, {frozen}):
        inputs = [normal(*shape) if i in free else normal(*shape).detach() for i, shape in enumerate(shapes)]
        with Replacements():
            assert gradgradcheck(lambda *x: operation(*x).pow(3), inputs, fast_mode=True)
        assert replaced


# PyTorch itself has no third derivative of a batch norm with a bias alone.
@pytest.mark.parametrize("name", ["convolution", "batch norm", "batch norm without parameters"])
def test_hessian_of_a_loss_that_holds_derivatives(name: str, replaced: list[str]) -> None:
    operation, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [normal(*shape) for shape in shapes]

    def penalty_hessian_product() -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(operation(*inputs).pow(3).sum(), inputs, create_graph=True)
        gradients = torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    with Replacements():
        here = penalty_hessian_product()
    assert replaced
    torch.testing.assert_close(here, penalty_hessian_product(), rtol=1e-10, atol=1e-10)


def arranged(shape: tuple[int, ...], how: str) -> Tensor:
    """Return numbers in a memory layout."""
    size = torch.Size(shape).numel()
    numbers = torch.linspace(-1, 1.2, 2 * size, dtype=torch.float64).sin().requires_grad_()
    if how == "channels last":
        return numbers[:size].view(shape).contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return numbers[:size].view(shape[::-1]).permute(*reversed(range(len(shape))))
    if how == "strided":
        return numbers[::2].view(shape)
    if how == "overlapping":
        return numbers.as_strided(shape, [1] * len(shape))
    if how == "expanded":
        return numbers[: size // shape[0]].view(1, *shape[1:]).expand(shape)
    return numbers[:0].view(0, *shape[1:])


@pytest.mark.parametrize("how", ["channels last", "transposed", "strided", "overlapping", "expanded", "empty"])
@pytest.mark.parametrize("name", ["convolution", "batch norm"])
@pytest.mark.usefixtures("replaced")
def test_inputs_may_have_any_memory_layout(name: str, how: str) -> None:
    operation, (shape, *others) = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [arranged(shape, how), *(normal(*other) for other in others)]
    found = []
    for context in (Replacements(), contextlib.nullcontext()):
        with context:
            result = operation(*inputs)
        gradients = torch.autograd.grad(result.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in gradients), inputs, materialize_grads=True)
        found.append([result, *gradients, *second])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert found[0][0].stride() == found[1][0].stride()


def test_batch_norm_in_training_is_left_alone(replaced: list[str]) -> None:
    x, layer = torch.randn(4, 4, requires_grad=True), nn.BatchNorm1d(4)
    with Replacements():
        layer(x)
    assert not replaced
    assert layer.num_batches_tracked == 1


WRONG: dict[str, Callable[[], object]] = {
    "channels": lambda: F.conv2d(normal(1, 2, 4, 4), normal(3, 3, 3, 3)),
    "stride": lambda: F.conv2d(normal(1, 3, 4, 4), normal(3, 3, 3, 3), stride=(1, 2, 3)),
    "statistics": lambda: F.batch_norm(normal(2, 3), torch.zeros(1).double(), torch.ones(1).double()),
    "types": lambda: F.conv2d(normal(1, 2, 3, 3), torch.randn(2, 2, 3, 3, requires_grad=True)),
    "weight": lambda: F.batch_norm(normal(2, 3), torch.zeros(3).double(), torch.ones(3).double(), normal(1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_meet_the_error_of_pytorch(name: str, replaced: list[str]) -> None:
    assert_error_of_pytorch(WRONG[name])
    assert not replaced


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, at the first dual tensor
@pytest.mark.parametrize("surroundings", ["no gradient", "autocast", "transform", "forward mode", "all frozen"])
def test_left_alone_where_autograd_is_off_or_transformed(surroundings: str, replaced: list[str]) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(2, 3, 5, 5), nn.Conv2d(3, 2, 3)
    with Replacements():
        if surroundings == "no gradient":
            with torch.no_grad():
                layer(x)
        elif surroundings == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
        elif surroundings == "transform":
            weights = dict(layer.named_parameters())
            torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).sum())(weights)
        elif surroundings == "forward mode":
            with forward_ad.dual_level():
                result = layer(forward_ad.make_dual(x, torch.ones_like(x)))
                assert forward_ad.unpack_dual(result).tangent is not None
        else:
            layer.requires_grad_(requires_grad=False)(x)
    assert not replaced


def test_the_analysis_uses_them(replaced: list[str]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(2, 1, 4, 4)
    hessian_spectrum(net, [x], lambda module, batch: module(batch).square().mean(), steps=2)
    assert set(replaced) == {"_convolution", "_batch_norm"}
    replaced.clear()
    net(x)
    assert not replaced


def test_a_product_with_one_block_takes_no_gradients_of_other_weights(replaced: list[str], monkeypatch) -> None:
    asked: list[list[bool]] = []
    gradients = Convolution.gradients

    def spy(self: Any, gradient: Tensor, x: Tensor, w: Tensor, wanted: Any) -> Any:
        asked.append(list(wanted))
        return gradients(self, gradient, x, w, wanted)

    torch.manual_seed(0)
    x, weights = normal(2, 2, 3, 3).detach(), [normal(2, 2, 3, 3) for _ in range(3)]
    with Replacements():
        hidden = x
        for w in weights:
            hidden = F.conv2d(hidden, w, padding=1).tanh()
        first, *_ = torch.autograd.grad(hidden.square().sum(), weights, create_graph=True)
        monkeypatch.setattr(Convolution, "gradients", spy)
        (product,) = torch.autograd.grad(first, weights[0], torch.ones_like(first))
    assert replaced.count("_convolution") == 3
    # The two layers above give gradients with respect to inputs; only the first layer gives one of its weight.
    assert [wanted for wanted in asked if wanted[1]] == [[False, True]]
    assert product.isfinite().all()
