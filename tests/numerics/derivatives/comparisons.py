"""Comparisons that the tests of derivatives share."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.derivatives.replacements import Replacements
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.operators.curvature import HessianMatrix
from lightning_hesd.numerics.operators.memory import MemoryMeter


def assert_equal_to_rounding(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare tensors of float64, each to 1e-12 of its largest number or of one."""
    for mine, theirs in zip(found, expected, strict=True):
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * scale)


def assert_error_of_pytorch(call: Callable[[], object]) -> None:
    """Check that a call raises the same error with the replacements as without them."""
    errors = (IndexError, RuntimeError, TypeError, ValueError)
    with pytest.raises(errors) as theirs:
        call()
    with Replacements(), pytest.raises(errors) as ours:
        call()
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


def jacobian(y: Tensor, x: Tensor, how: str) -> Tensor:
    """Return the Jacobian of y by x, along all directions at once or along one after the other."""
    units = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    if how == "batched":
        return torch.autograd.grad(y, x, units, create_graph=True, is_grads_batched=True)[0]

    def row(v: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, v, create_graph=True)[0]

    return torch.func.vmap(row)(units) if how == "vmap" else torch.stack([row(v) for v in units])


def assert_same_nodes(net: Any, x: Tensor, losses: Sequence[Callable[[Any, Tensor], Tensor]], steps: int) -> None:
    """Compare the spectra of two losses."""
    nodes = [hessian_spectrum(net, [x], loss, steps=steps).nodes for loss in losses]
    torch.testing.assert_close(*map(torch.tensor, nodes), rtol=1e-9, atol=1e-9)


def memory_of_a_product(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[MemoryMeter, MemoryMeter]:
    """Measure the memory that building the graph of a loss takes, and a product with its Hessian."""
    with MemoryMeter(torch.device("cpu")) as building:
        matrix = HessianMatrix(lambda _: loss(), parameters)
        _, product = matrix.make_matvec(WeightedBatch(None, 1.0, 0), retain=True)
    with MemoryMeter(torch.device("cpu")) as multiplying:
        product([torch.ones_like(p) for p in parameters])
    assert building.live is not None
    return building, multiplying
