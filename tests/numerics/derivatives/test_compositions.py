"""Operations written out give PyTorch's values and gradients; their further derivatives are in `test_operations`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.numerics.derivatives import compositions

TABLE = {
    **compositions.WRONG_SECOND_DERIVATIVE,
    **compositions.WRONG_THIRD_DERIVATIVE,
    **compositions.WRONG_FORWARD_DERIVATIVE,
}


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def statistics() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double()


CALLS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "weight norm": (torch._weight_norm, lambda: (numbers(3, 4), numbers(3, 1)), {}),
    "prelu": (torch.prelu, lambda: (numbers(4, 3), numbers(1)), {}),
    "prelu by channel": (Tensor.prelu, lambda: (numbers(2, 3, 4), numbers(3)), {}),
    "weight norm of columns": (torch._weight_norm, lambda: (numbers(3, 4), numbers(1, 4), 1), {}),
    "weight norm in the middle": (torch._weight_norm, lambda: (numbers(2, 3, 4), numbers(1, 3, 1), 1), {}),
    "layer norm": (F.layer_norm, lambda: (numbers(2, 3, 4), (3, 4), numbers(3, 4), numbers(3, 4)), {"eps": 0.1}),
    "layer norm without parameters": (torch.layer_norm, lambda: (numbers(3, 4), [4]), {}),
    "batch norm": (F.batch_norm, lambda: (numbers(5, 3), *statistics(), numbers(3), numbers(3), True, 0.3), {}),
    "batch norm of images": (torch.batch_norm, lambda: (numbers(2, 3, 2, 2), *[None] * 4, True, 0.1, 0.2, True), {}),
    "instance norm": (F.instance_norm, lambda: (numbers(2, 3, 4), *statistics(), numbers(3)), {"momentum": 0.3}),
    "determinants": (torch.linalg.det, lambda: (numbers(2, 3, 3),), {}),
    "signed logarithms": (torch.linalg.slogdet, lambda: (numbers(2, 3, 3),), {}),
    "logarithm": (torch.logdet, lambda: (numbers(3, 3) @ numbers(3, 3).mT,), {}),
    "solutions": (torch.linalg.solve, lambda: (numbers(2, 3, 3), numbers(3, 2)), {}),
    "solutions of vectors": (torch.linalg.solve, lambda: (numbers(2, 3, 3), numbers(2, 3)), {}),
    "solutions from the right": (torch.linalg.solve, lambda: (numbers(3, 3), numbers(2, 3)), {"left": False}),
}


@pytest.mark.parametrize("name", CALLS)
def test_values_gradients_and_running_statistics(name: str) -> None:
    operation, arguments, options = CALLS[name]
    found = []
    for function in (TABLE[operation], operation):
        given = arguments()
        result = function(*given, **options)
        parts = [result] if isinstance(result, Tensor) else list(result)
        inputs = [a for a in given if isinstance(a, Tensor) and a.is_leaf and a.requires_grad]
        gradients = torch.autograd.grad(sum(p.sin().sum() for p in parts), inputs) if inputs else ()
        found.append([*parts, *gradients, *(a for a in given if isinstance(a, Tensor) and not a.requires_grad)])
        assert type(result) is type(operation(*arguments(), **options))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-11, atol=1e-11)


def test_values_of_hardsigmoid_and_of_logarithms_that_are_not_real() -> None:
    x = 4 * numbers(5, 5)  # the gradient of PyTorch has a sixth in float32 only
    torch.testing.assert_close(TABLE[F.hardsigmoid](x), F.hardsigmoid(x), rtol=1e-15, atol=1e-15)
    negative = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert TABLE[torch.logdet](negative).isnan()
    assert [value.item() for value in TABLE[torch.linalg.slogdet](negative)] == [-1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_accurate_in_low_precision(dtype: torch.dtype) -> None:
    x = (300 + torch.randn(4, 64)).to(dtype)
    for function in (F.layer_norm, TABLE[F.layer_norm]):
        result = function(x, (64,))
        assert result.dtype == dtype
        exact = F.layer_norm(x.double(), (64,))
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max())


def test_what_is_not_wrong_is_left_alone() -> None:
    x = numbers(2, 3, 4)
    mean, variance = statistics()
    assert TABLE[F.batch_norm](x, mean, variance) is None
    assert TABLE[F.instance_norm](x, mean, variance, use_input_stats=False) is None
    assert TABLE[F.layer_norm](x, (3,)) is None  # PyTorch refuses it
    assert TABLE[F.hardsigmoid](x, inplace=True) is None
    assert TABLE[torch.linalg.det](torch.eye(2, dtype=torch.complex128)) is None
    layer = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value"):
        TABLE[F.batch_norm](torch.ones(1, 3), layer.running_mean, layer.running_var, training=True)


def test_products_of_groups_in_float64_are_those_of_float32() -> None:
    rows, matrices, offsets = numbers(9, 8), numbers(3, 8, 16), torch.tensor([3, 3, 9], dtype=torch.int32)
    precise = compositions.WITHOUT_FLOAT64[torch._grouped_mm](rows, matrices, offs=offsets)
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise.float(), F.grouped_mm(rows.float(), matrices.float(), offs=offsets))
    assert compositions.WITHOUT_FLOAT64[torch._grouped_mm](rows.float(), matrices.float(), offs=offsets) is None
