"""The candidates from other packages, each called as its documentation shows.

Both packages get what we know: that the network is deterministic, and how many samples there are. Neither needs
telling how to weigh the batches, which are equally large.

curvlinops' products are off by a thousandth or so on networks with layer normalization: it differentiates
`torch.func.jacrev` in forward mode, and torch 2.13 then gets the tangent of the normalization's weight gradient wrong
(with `torch.func.grad` in its place it does not).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.candidates import TOLERANCE, Candidate, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.candidates import Product
    from benchmarks.problems import Batch, Problem


@dataclass
class CountedPasses:
    """Batches that count how often somebody has gone through them: once for every product.

    Attributes:
        batches: The batches.
        passes: How often all of them have been read.
    """

    batches: list[Batch]
    passes: int = 0

    def __iter__(self) -> Iterator[Batch]:
        """Give all batches, and count it."""
        yield from self.batches
        self.passes += 1


def eigenthings_operator(problem: Problem, data: CountedPasses, method: str) -> Any:
    """Return the Hessian as hessian-eigenthings has it."""
    from hessian_eigenthings import HessianOperator, supervised_loss  # noqa: PLC0415 - may not be installed

    return HessianOperator(problem.module, data, supervised_loss(nn.functional.cross_entropy), method=method)


@contextlib.contextmanager
def eigenthings_product(problem: Problem, method: str) -> Iterator[Product]:
    """Give hessian-eigenthings' product."""
    yield eigenthings_operator(problem, CountedPasses(problem.batches), method).matvec


def eigenthings_density(problem: Problem, nodes: int, seed: int, *, method: str) -> Run:
    """Run stochastic Lanczos quadrature; it has all extremes, and reorthogonalises."""
    from hessian_eigenthings import spectral_density  # noqa: PLC0415

    data = CountedPasses(problem.batches)
    operator = eigenthings_operator(problem, data, method)
    result = spectral_density(operator, num_runs=1, lanczos_steps=nodes, seed=seed)
    values, weights = (part[0].double().numpy() for part in (result.raw_eigenvalues, result.raw_weights))
    return Run(data.passes, (float(values[0]), float(values[-1])), rule=(values, weights))


def curvlinops_operator(problem: Problem, data: CountedPasses) -> Any:
    """Return the Hessian as curvlinops has it, without the products that check whether it is deterministic."""
    from curvlinops import HessianLinearOperator  # noqa: PLC0415

    return HessianLinearOperator(
        problem.module,
        nn.CrossEntropyLoss(),
        problem.parameters,
        data,
        check_deterministic=False,
        num_data=problem.samples,
    )


@contextlib.contextmanager
def curvlinops_product(problem: Problem) -> Iterator[Product]:
    """Give curvlinops' product."""
    operator = curvlinops_operator(problem, CountedPasses(problem.batches))
    yield lambda vector: operator @ vector


def curvlinops_density(problem: Problem, nodes: int, seed: int) -> Run:
    """Find the ends of the spectrum with SciPy's ARPACK, then run Lanczos quadrature without reorthogonalisation.

    Left alone, `lanczos_approximate_spectrum` calls ARPACK in the same way; called before, it can be timed.
    """
    from curvlinops import lanczos_approximate_spectrum  # noqa: PLC0415
    from scipy.sparse.linalg import eigsh  # noqa: PLC0415

    started = time.perf_counter()
    data = CountedPasses(problem.batches)
    operator = curvlinops_operator(problem, data)
    start = torch.randn(problem.dimension, generator=torch.Generator().manual_seed(seed)).numpy()
    low, high = eigsh(operator.to_scipy(), k=2, which="BE", tol=TOLERANCE, v0=start, return_eigenvectors=False)
    ends = data.passes, time.perf_counter() - started
    torch.manual_seed(seed)  # what follows draws its start vector from the global generator
    lanczos_approximate_spectrum(operator, nodes, boundaries=(float(low), float(high)))
    return Run(data.passes, (float(low), float(high)), ends=ends)


PEERS = [
    Candidate(
        "hessian-eigenthings",
        partial(eigenthings_product, method="autograd"),
        partial(eigenthings_density, method="autograd"),
        package="hessian-eigenthings",
    ),
    Candidate(
        "hessian-eigenthings, differences",
        partial(eigenthings_product, method="finite_difference"),
        partial(eigenthings_density, method="finite_difference"),
        fused=True,
        package="hessian-eigenthings",
    ),
    Candidate(
        "curvlinops",
        curvlinops_product,
        curvlinops_density,
        package="curvlinops-for-pytorch",
    ),
]
