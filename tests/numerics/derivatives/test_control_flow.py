"""Higher-order operations have the derivatives of the loops and branches that they stand for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, while_loop
from torch._higher_order_ops import map as map_over
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.derivatives import control_flow
from lightning_hesd.numerics.derivatives.replacements import Replacements
from tests.numerics.derivatives.comparisons import assert_same_nodes

Function = Callable[[Any, Tensor], Tensor]

X = torch.linspace(-1, 1.5, 15, dtype=torch.float64).sin().view(5, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.scale, self.bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
        self.double()


def loop(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    carry, outputs = torch.zeros_like(x[0]), []
    for row in x:
        outputs.append((carry * net.scale).sin())
        carry = carry / 2 + net.layer(row).tanh()
    return carry, torch.stack(outputs)


def by_scan(net: Any, x: Tensor) -> Tensor:
    def step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return carry / 2 + net.layer(row).tanh(), (carry * net.scale).sin()

    return scan(step, torch.zeros_like(x[0]), x)[1]


def by_nested_scan(net: Any, x: Tensor) -> Tensor:
    def step(carry: dict[str, Tensor], row: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        return {"c": carry["c"] / 2 + net.layer(row).tanh()}, [(carry["c"] * net.scale).sin()]

    carry, [outputs] = scan(step, {"c": torch.zeros_like(x[0])}, x, reverse=True)
    return outputs.flip(0) + carry["c"]


def branches(net: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda x: net.norm(net.layer(x)).tanh(), lambda x: (net.layer(x) * net.scale).sin()


def attention(net: Any, x: Tensor, **mask: Any) -> Tensor:
    heads = x.expand(1, 2, 5, 3)
    return flex_attention(heads, heads, heads, score_mod=lambda s, _, h, *__: s * net.bias[h], **mask)


def plain_attention(net: Any, x: Tensor, *, causal: bool) -> Tensor:
    heads = x.expand(1, 2, 5, 3)
    return F.scaled_dot_product_attention(heads * net.bias[:, None, None], heads, heads, is_causal=causal)


def products(net: Any, x: Tensor) -> Tensor:
    rows = list(net.layer(x))
    for i in range(1, len(rows)):
        rows[i] = rows[i - 1] * rows[i] * net.scale[0]
    return torch.stack(rows)


CAUSAL = {"block_mask": create_block_mask(lambda _, __, i, j: i >= j, None, None, 5, 5, device="cpu")}

PAIRS: dict[str, tuple[Function, Function]] = {
    "scan": (by_scan, lambda net, x: loop(net, x)[1]),
    "scan of structures": (
        by_nested_scan,
        lambda net, x: torch.stack([*loop(net, x.flip(0))[1]]) + loop(net, x.flip(0))[0],
    ),
    "cond": (
        lambda net, x: torch.cond(x.sum() > 0, *branches(net), (x,)),
        lambda net, x: branches(net)[int(x.sum() <= 0)](x),
    ),
    "cond on weights": (
        lambda net, x: torch.cond(net.scale.sum() > 0, *branches(net), (x,)),
        lambda net, x: branches(net)[int(net.scale.sum() <= 0)](x),
    ),
    "while_loop": (
        lambda net, x: while_loop(lambda i, _: i < 2, lambda i, h: (i + 1, net.layer(h).tanh()), (torch.tensor(0), x))[
            1
        ],
        lambda net, x: net.layer(net.layer(x).tanh()).tanh(),
    ),
    "map": (
        lambda net, x: map_over(lambda row, scale: {"h": net.layer(row).tanh() * scale}, x, net.scale)["h"],
        lambda net, x: net.layer(x).tanh() * net.scale,
    ),
    "associative_scan": (
        lambda net, x: associative_scan(lambda a, b: a * b * net.scale[0], net.layer(x), 0, combine_mode="generic"),
        products,
    ),
    "flex_attention": (attention, lambda net, x: plain_attention(net, x, causal=False)),
    "flex_attention, masked": (
        lambda net, x: attention(net, x, **CAUSAL),
        lambda net, x: plain_attention(net, x, causal=True),
    ),
}


def squares(function: Function, net: nn.Module, x: Tensor) -> Tensor:
    return (function(net, x) - 1).square().mean()


def penalty(function: Function, net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(net, x).sin().sum(), x, create_graph=True)
    return slope.square().sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")  # compiled or not, it runs eagerly here
@pytest.mark.parametrize(
    ("name", "strategy"), [*((name, "graph") for name in PAIRS), ("cond", "recompute"), ("scan", "finite_difference")]
)
def test_spectrum_is_that_of_the_function_written_out(name: str, strategy: Any) -> None:
    found = [
        hessian_spectrum(Net(), [X], partial(squares, function), steps=6, strategy=strategy) for function in PAIRS[name]
    ]
    assert [spectrum.verified for spectrum in found] == ["yes", "yes"]
    assert found[1].lambda_max > 0.01
    np.testing.assert_allclose(*(spectrum.nodes for spectrum in found), rtol=1e-6, atol=1e-6)


def test_gradient_penalties() -> None:
    assert_same_nodes(Net(), X, [partial(penalty, function) for function in PAIRS["scan"]], steps=6)


def test_associative_scan_as_accelerators_are_given_it() -> None:
    def combine(a: Tensor, b: Tensor) -> list[Tensor]:
        return [a * b]

    for x in (X, X[:1]):
        (found,) = control_flow._EAGER["associative_scan"](combine, [x], ())
        torch.testing.assert_close(found, x.cumprod(0))


def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(control_flow._EAGER, "scan", lambda combine_fn, init: None)
    with Replacements(), torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="Write the loop"):
        by_scan(Net(), X)
