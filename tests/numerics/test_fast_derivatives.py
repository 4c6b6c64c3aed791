"""Replaced operations give the values and derivatives that PyTorch's own give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics import fast_derivatives
from lightning_hesd.numerics.fast_derivatives import FastDerivatives

CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": (2, (2, 3, 5, 5), (4, 3, 3, 3), {}),
    "strided": (2, (2, 3, 6, 6), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "uneven": (2, (2, 3, 6, 5), (2, 3, 2, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (2, (2, 2, 7, 7), (3, 2, 3, 3), {"dilation": 2}),
    "grouped": (2, (2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (2, (2, 3, 4, 4), (3, 1, 3, 3), {"groups": 3, "padding": (1,)}),
    "1d": (1, (2, 3, 7), (4, 3, 3), {"padding": 1}),
    "3d": (3, (1, 2, 3, 4, 3), (2, 2, 2, 2, 2), {}),
    "same": (2, (2, 3, 4, 4), (2, 3, 3, 3), {"padding": "same"}),
    "unbatched": (2, (3, 4, 4), (2, 3, 3, 3), {}),
}


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the replacements that were made, of tensors however small."""
    monkeypatch.setattr(fast_derivatives, "_LARGE", 0)
    made: list[str] = []
    for function, replacement in fast_derivatives._REPLACEMENTS.items():

        def spy(*args: Any, replacement: Callable[..., Any] = replacement, **kwargs: Any) -> Any:
            result = replacement(*args, **kwargs)
            if result is not None:
                made.append(replacement.__name__)
            return result

        monkeypatch.setitem(fast_derivatives._REPLACEMENTS, function, spy)
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, bias: bool, replaced: list[str]) -> None:
    dimensions, x_shape, w_shape, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    x, w, b = normal(*x_shape), normal(*w_shape), normal(w_shape[0]) if bias else None
    with FastDerivatives():
        here = convolve(x, w, b, **options)
        assert len(replaced) == (name not in {"same", "unbatched"})
        inputs = (x, w) if b is None else (x, w, b)
        assert gradcheck(lambda *i: convolve(*i, **options), inputs)
        assert gradgradcheck(lambda *i: convolve(*i, **options), inputs)
    torch.testing.assert_close(here, convolve(x, w, b, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_convolution_with_a_frozen_part(frozen: str, replaced: list[str]) -> None:
    torch.manual_seed(0)
    x, w = normal(2, 3, 4, 4), normal(2, 3, 3, 3)
    free, fixed = (w, x.detach()) if frozen == "input" else (x, w.detach())

    def convolve(part: Tensor) -> Tensor:  # squared, so that there is curvature
        return (F.conv2d(fixed, part) if frozen == "input" else F.conv2d(part, fixed)).square()

    with FastDerivatives():
        assert gradcheck(convolve, (free,))
        assert gradgradcheck(convolve, (free,))
    assert set(replaced) == {"_convolution"}


@pytest.mark.parametrize("parts", ["weight and bias", "weight", "bias", ""])
def test_batch_norm_in_evaluation(parts: str, replaced: list[str]) -> None:
    torch.manual_seed(0)
    x, mean, variance = normal(3, 4, 2), torch.randn(4).double(), 0.5 + torch.rand(4).double()
    learned = [normal(4) for name in ("weight", "bias") if name in parts]

    def apply(x: Tensor, *given: Tensor) -> Tensor:
        keys = [name for name in ("weight", "bias") if name in parts]
        return F.batch_norm(x, mean, variance, **dict(zip(keys, given, strict=True)))

    with FastDerivatives():
        here = apply(x, *learned)
        assert replaced == ["_batch_norm"]
        assert gradgradcheck(apply, (x, *learned))
    torch.testing.assert_close(here, apply(x, *learned), rtol=1e-12, atol=1e-12)


OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 2, 3, 3), (2, 2, 3, 3), (2,)]),
    "batch norm": (
        lambda x, w, b: F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), w, b),
        [(2, 3, 2), (3,), (3,)],
    ),
    "linear": (F.linear, [(4, 3), (2, 3), (2,)]),
    "linear without bias": (F.linear, [(4, 3), (2, 3)]),
    "linear of sequences": (F.linear, [(2, 3, 3), (2, 3), (2,)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "layer norm without bias": (lambda x, w: F.layer_norm(x, (4,), w), [(3, 4), (4,)]),
    "layer norm without parameters": (lambda x: torch.layer_norm(x, (4,)), [(3, 4)]),
    "layer norm of images": (lambda x, w, b: F.layer_norm(x, (2, 3), w, b), [(3, 2, 3), (2, 3), (2, 3)]),
    "relu": (F.relu, [(3, 4)]),
    "relu method": (lambda x: x.relu(), [(3, 4)]),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 2), (2, 4, 2), (2, 4, 3)]),
    "attention with heads": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), [(2, 2, 3, 2)] * 3),
    "causal attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 3, 2)] * 3),
    "gelu": (F.gelu, [(3, 4)]),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [(3, 4)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_derivatives(name: str, replaced: list[str]) -> None:
    operation, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [normal(*shape) for shape in shapes]
    with FastDerivatives():
        here = operation(*inputs)
        assert len(replaced) == 1
        assert gradcheck(operation, inputs)
        assert gradgradcheck(operation, inputs)
    torch.testing.assert_close(here, operation(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "frozen"), [(name, i) for name, (_, shapes) in OPERATIONS.items() for i in range(len(shapes))]
)
def test_derivatives_with_one_frozen_and_with_one_free(name: str, frozen: int, replaced: list[str]) -> None:
    operation, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    for free in ({*range(len(shapes))} - {frozen}, {frozen}):
        inputs = [normal(*shape) if i in free else normal(*shape).detach() for i, shape in enumerate(shapes)]
        if free:
            with FastDerivatives():
                assert gradgradcheck(lambda *x: operation(*x).pow(3), inputs)
            assert replaced


@pytest.mark.parametrize("name", OPERATIONS)
def test_hessian_of_a_loss_that_holds_derivatives(name: str, replaced: list[str]) -> None:
    operation, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [normal(*shape) for shape in shapes]

    def penalty_hessian_product() -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(operation(*inputs).pow(3).sum(), inputs, create_graph=True)
        gradients = torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    with FastDerivatives():
        here = penalty_hessian_product()
    assert replaced
    with sdpa_kernel(SDPBackend.MATH):
        there = penalty_hessian_product()
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_batch_norm_in_training_is_left_alone(replaced: list[str]) -> None:
    layer = nn.BatchNorm1d(3)
    with FastDerivatives():
        layer(torch.randn(5, 3))
    assert not replaced
    assert layer.num_batches_tracked == 1


def test_small_tensors_and_changes_in_place_are_left_alone(
    replaced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with FastDerivatives():
        F.relu(x * 1, inplace=True)
        monkeypatch.setattr(fast_derivatives, "_LARGE", 17)
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.ReLU())(x)
    assert not replaced


def test_wrong_shapes_meet_the_error_of_pytorch(replaced: list[str]) -> None:
    with FastDerivatives(), pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(torch.randn(2, 6, requires_grad=True), (4,))
    assert not replaced


@pytest.mark.parametrize("surroundings", ["no gradient", "autocast", "transform"])
def test_left_alone_where_derivatives_are_others_business(surroundings: str, replaced: list[str]) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(2, 3, 5, 5), nn.Conv2d(3, 2, 3)
    with FastDerivatives():
        if surroundings == "no gradient":
            with torch.no_grad():
                layer(x)
        elif surroundings == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
        else:
            weights = dict(layer.named_parameters())
            torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).sum())(weights)
    assert not replaced


def test_the_analysis_uses_them(replaced: list[str]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(2, 1, 4, 4)
    hessian_spectrum(net, [x], lambda module, batch: module(batch).square().mean(), steps=2)
    assert set(replaced) == {"_convolution", "_batch_norm", "_relu", "_linear"}
    replaced.clear()
    net(x)
    assert not replaced
