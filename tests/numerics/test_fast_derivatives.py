"""Replaced operations give the values and derivatives that PyTorch's own give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from lightning_hesd import fast_derivatives, hessian_spectrum
from lightning_hesd.fast_derivatives import FastDerivatives

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
    """Names of the replacements that were made."""
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


def test_batch_norm_in_training_is_left_alone(replaced: list[str]) -> None:
    layer = nn.BatchNorm1d(3)
    with FastDerivatives():
        layer(torch.randn(5, 3))
    assert not replaced
    assert layer.num_batches_tracked == 1


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
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(2, 1, 4, 4)
    hessian_spectrum(net, [x], lambda module, batch: module(batch).square().mean(), steps=2)
    assert set(replaced) == {"_convolution", "_batch_norm"}
    replaced.clear()
    net(x)
    assert not replaced
