"""A subspace that grows by residuals finds the largest eigenvalue, with a diagonal on the right-hand side too."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_hesd.numerics.krylov.rayleigh_ritz import MAX_BASIS, RitzSubspace

N = 60


def matrix(seed: int = 0) -> Tensor:
    """A symmetric matrix with an outlier, as Hessians have."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    values = torch.tensor([*torch.linspace(-1, 3, N - 1), 5.0], dtype=torch.float64)
    return q * values @ q.T


def vector(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace(h: Tensor, *starts: Tensor, scale: Tensor | None = None) -> RitzSubspace:
    found = RitzSubspace(lambda v: h @ v, scale)
    for start in starts:
        found.add(start)
    return found


@pytest.mark.parametrize("spread", [0.0, 3.0, 8.0])
def test_both_problems_converge_to_the_largest_eigenvalues(spread: float) -> None:
    """D spans up to eight orders of magnitude; the basis is replaced several times."""
    h = matrix()
    d = 10 ** (-spread * torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    ours = subspace(h, vector(1), scale=d.rsqrt())
    plain, preconditioned = ours.expand(400, 1e-8)
    assert MAX_BASIS < ours.products < 400
    dense = d.rsqrt()[:, None] * h * d.rsqrt()
    assert plain.value == pytest.approx(torch.linalg.eigvalsh(h)[-1].item(), rel=1e-10)
    assert preconditioned.value == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-10)
    torch.testing.assert_close(plain.product, h @ plain.vector)
    assert float(preconditioned.vector @ (d * preconditioned.vector)) == pytest.approx(1.0)


@pytest.mark.parametrize("products", [1, 2, 4, 9])
def test_values_are_lower_bounds_that_lie_near_an_eigenvalue(products: int) -> None:
    for seed in range(10):
        h = matrix(seed)
        d = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
        pairs = subspace(h, vector(seed), scale=d.rsqrt()).expand(products, 0.0)
        for pair, dense in zip(pairs, (h, d.rsqrt()[:, None] * h * d.rsqrt()), strict=True):
            eigenvalues = torch.linalg.eigvalsh(dense).numpy()
            assert pair.value <= eigenvalues[-1] + 1e-12
            assert np.abs(eigenvalues - pair.value).min() <= pair.error * abs(pair.value) + 1e-12


def test_vectors_in_the_subspace_and_known_products_cost_none() -> None:
    h, first, second = matrix(), vector(1), vector(2)
    ours = subspace(h, first, second)
    assert not ours.add(3 * first - 2 * second)
    assert not ours.add(torch.zeros(N, dtype=torch.float64))
    assert ours.products == 2
    known = subspace(h, first)
    known.add(second, h @ second)
    assert known.products == 1
    assert known.leading()[0].value == pytest.approx(ours.leading()[0].value, rel=1e-12)
