"""Attention in long contexts has the derivatives of its formula, and no matrix of all scores."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from lightning_hesd.numerics.derivatives import attention as module_under_test
from lightning_hesd.numerics.derivatives import fast_derivatives
from lightning_hesd.numerics.derivatives.replacements import Replacements
from tests.numerics.derivatives import comparisons
from tests.numerics.derivatives.comparisons import assert_equal_to_rounding

QUERIES, KEYS = 5, 6
SOME = torch.tensor([1, 0, 1, 1, 0, 1]).bool() | torch.eye(QUERIES, KEYS).bool()
NONE_FOR_ONE = SOME & (torch.arange(QUERIES) != 3).unsqueeze(1)
NUMBERS = torch.linspace(-1, 2, QUERIES * KEYS).view(QUERIES, KEYS).double()

THREE = ((2, 5, 2), (2, 6, 2), (2, 6, 3))
FOUR = ((2, 2, 5, 2), (2, 2, 6, 2), (2, 2, 6, 3))

CASES: dict[str, tuple[Any, ...]] = {
    "one head": ((5, 2), (6, 2), (6, 3), {"scale": 0.3}),
    "heads that broadcast": ((2, 1, 5, 2), (1, 3, 6, 2), (3, 6, 3), {}),
    "causal, more keys": (*THREE, {"is_causal": True}),
    "causal, more queries": ((2, 5, 2), (2, 3, 2), (2, 3, 3), {"is_causal": True}),
    "mask": (*FOUR, {"attn_mask": SOME}),
    "mask of samples": (*FOUR, {"attn_mask": SOME[:2, None, None]}),
    "mask of a whole row": (*THREE, {"attn_mask": NONE_FOR_ONE[None]}),
    "added mask": (*THREE, {"attn_mask": NUMBERS}),
    "added infinities": (*THREE, {"attn_mask": NUMBERS.masked_fill(~NONE_FOR_ONE, -torch.inf)}),
    "grouped": ((1, 4, 5, 2), (1, 2, 6, 2), (1, 2, 6, 3), {"enable_gqa": True}),
    "grouped, mask": (
        *((4, 5, 2), (2, 6, 2), (2, 6, 3)),
        {"enable_gqa": True, "attn_mask": SOME | (torch.arange(4) == 1)[:, None, None]},
    ),
}


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Long attention even where the context is short, in blocks of two rows."""
    monkeypatch.setattr(fast_derivatives, "_LONG", 0)
    monkeypatch.setattr(module_under_test, "_BLOCK", 1)
    monkeypatch.setattr(module_under_test, "_MIN_ROWS", 2)
    found: list[str] = []
    long_attention = module_under_test.long_attention

    def spy(*args: Any, **options: Any) -> Tensor:
        result = long_attention(*args, **options)
        found.append("made")
        return result

    monkeypatch.setattr(fast_derivatives, "long_attention", spy)
    return found


def written_out(q, k, v, attn_mask=None, *, is_causal=False, scale=None, enable_gqa=False):
    """Return softmax(scale · q kᵀ + mask) v, from exponentials; zeros where all is masked."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    exponentials = (torch.einsum("...id,...jd->...ij", q, k) * (scale or q.shape[-1] ** -0.5)).exp()
    if attn_mask is not None:
        exponentials = exponentials * (attn_mask if attn_mask.dtype == torch.bool else attn_mask.exp())
    if is_causal:
        exponentials = exponentials.tril()
    total = exponentials.sum(-1, keepdim=True)
    return torch.einsum("...ij,...jd->...id", exponentials / total.where(total > 0, 1), v)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return loss, gradient and a product with the Hessian, of a loss without and with a penalty on the gradient."""

    def loss() -> Tensor:
        return function(*inputs).sin().sum()

    def penalized() -> Tensor:
        slopes = torch.autograd.grad(loss(), inputs, create_graph=True)
        return torch.stack([(s.square() + s.sin()).sum() for s in slopes]).sum()

    results = []
    for scalar in (loss(), penalized()):
        slopes = torch.autograd.grad(scalar, inputs, create_graph=True)
        directions = [torch.linspace(-1, 1, s.numel(), dtype=torch.float64).cos().view(s.shape) for s in slopes]
        results += [scalar, *slopes, *torch.autograd.grad(slopes, inputs, directions)]
    return [result.detach() for result in results]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_derivatives(name: str, made: list[str]) -> None:
    *shapes, options = CASES[name]
    inputs = drawn(*shapes)
    with Replacements():
        here = derivatives(lambda *i: F.scaled_dot_product_attention(*i, **options), inputs)
    assert made
    there = derivatives(lambda *i: written_out(*i, **options), inputs)
    assert_equal_to_rounding(here, there)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(*inputs, **options)
    with Replacements():
        ours = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14, check_stride=True)


def test_a_frozen_input_and_one_that_depends_on_another() -> None:
    (x,) = drawn((2, 5, 2))
    fixed = x.detach().cos()
    found = []
    for function, context in ((F.scaled_dot_product_attention, Replacements()), (written_out, torch.enable_grad())):
        with context:
            found.append(derivatives(lambda x, f=function: f(x, x.sin(), x) + f(fixed, x, fixed), [x]))
    assert_equal_to_rounding(*found)


def test_half_precision_is_computed_in_single_as_by_pytorch(made: list[str]) -> None:
    inputs = [i.detach().bfloat16().requires_grad_() for i in drawn(*THREE)]
    found = []
    for context in (Replacements(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            result = F.scaled_dot_product_attention(*inputs, attn_mask=NUMBERS.bfloat16())
            found.append([result, *torch.autograd.grad(result.float().square().sum(), inputs)])
    exact = written_out(*(i.double() for i in inputs), attn_mask=NUMBERS.bfloat16().double())
    torch.testing.assert_close(found[0][0].double(), exact, rtol=1.01 * 2**-8, atol=0)  # rounded once, at the end
    assert made
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-8)  # the last digit


def test_on_other_devices_nothing_is_read_back(made: list[str]) -> None:
    """PyTorch's device without data refuses whatever would wait for a result, or mix devices."""
    inputs = [torch.randn(shape, device="meta", requires_grad=True) for shape in THREE]
    with Replacements():
        result = F.scaled_dot_product_attention(*inputs, attn_mask=NONE_FOR_ONE.to("meta"))
        slopes = torch.autograd.grad(result.sum(), inputs, create_graph=True)
    products = torch.autograd.grad(slopes, inputs, slopes)
    assert made
    assert [p.shape for p in products] == [i.shape for i in inputs]


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "learned mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:1] @ x[:1].mT),
    "dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "no gradient": lambda x: F.scaled_dot_product_attention(x.detach(), x.detach(), x.detach()),
    "a kind of mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=causal_lower_right(5, 5)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_pytorch(name: str, made: list[str]) -> None:
    (x,) = drawn((2, 5, 5))
    torch.manual_seed(0)
    with Replacements():
        here = LEFT[name](x)
    torch.manual_seed(0)
    torch.testing.assert_close(here, LEFT[name](x), rtol=0, atol=1e-14)
    assert not made


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "width": lambda x: F.scaled_dot_product_attention(x, x[..., :1], x),
    "keys": lambda x: F.scaled_dot_product_attention(x, x, x[:, :1]),
    "mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3).bool()),
    "two masks": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5).bool(), is_causal=True),
    "groups": lambda x: F.scaled_dot_product_attention(x[:3], x[:2], x[:2], enable_gqa=True),
    "no groups": lambda x: F.scaled_dot_product_attention(x[:3], x[:2], x[:2]),
    "dimensions": lambda x: F.scaled_dot_product_attention(x[0, 0], x, x),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_meet_the_error_of_pytorch(name: str, made: list[str]) -> None:
    (x,) = drawn((4, 5, 2))
    with sdpa_kernel(SDPBackend.MATH):
        comparisons.assert_error_of_pytorch(lambda: WRONG[name](x))
    assert not made


@pytest.mark.parametrize("how", ["batched", "vmap"])
def test_a_loss_with_derivatives_along_many_directions_at_once(how: str, made: list[str]) -> None:
    def loss(net: nn.Module, x: Tensor, how: str) -> Tensor:
        h = net(x)
        y = F.scaled_dot_product_attention(h, h, h)
        return y.square().mean() + comparisons.jacobian(y, h, how).square().sum()

    torch.manual_seed(0)
    net, x = nn.Linear(2, 2).double(), torch.randn(1, 3, 2).double()
    comparisons.assert_same_nodes(net, x, [functools.partial(loss, how=way) for way in (how, "one by one")], steps=2)
    assert made


class Layer(nn.Module):
    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal, self.heads, self.mix = causal, nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mask = None if self.causal else torch.ones(1, x.shape[1]).bool()
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.mix(attended.transpose(1, 2).flatten(2)).square().mean()


@pytest.mark.parametrize(("causal", "penalty"), [(False, False), (True, True)], ids=["mask", "causal, penalty"])
def test_memory_is_linear_in_the_context(causal: bool, penalty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_BLOCK", 2**15)
    context = 1024
    net, x = Layer(causal=causal), torch.randn(1, context, 8)
    scores, tokens = 4 * context**2, 4 * context * 8  # bytes of a head's scores, and of all queries

    def loss() -> Tensor:
        with Replacements():
            value = net(x)
            if penalty:
                slopes = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
                value = value + torch.stack([s.square().sum() for s in slopes]).sum()
        return value

    building, multiplying = comparisons.memory_of_a_product(loss, list(net.parameters()))
    assert building.live < (90 if penalty else 40) * tokens
    assert max(building.peak - building.live, multiplying.peak) < 0.8 * scores


def test_a_layer_of_pytorch(made: list[str]) -> None:
    torch.manual_seed(0)
    x, padding = torch.randn(2, 5, 4).double(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu").double().eval()
    parameters, found = list(layer.parameters()), []
    for context in (Replacements(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            loss = layer(x, src_key_padding_mask=padding).pow(3).sum()
            slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        products = torch.autograd.grad(slopes, parameters, [p.cos() for p in parameters])
        found.append([t.detach() for t in (*slopes, *products)])
        assert made
    assert_equal_to_rounding(*found)
