"""The candidates from other packages, each called as its documentation shows.

Both packages are told that the network is deterministic, and the number of samples. Batches are equally large, so their
weights do not matter.

On networks with layer normalization, curvlinops' HVPs have a relative error of about 1e-3: it differentiates
`torch.func.jacrev` in forward mode, and torch 2.13 then computes a wrong tangent of the normalization's weight
gradient. (With `torch.func.grad` the tangent is right.)
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
from benchmarks.problems import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from benchmarks.candidates import Product
    from benchmarks.problems import Batch, Problem


@dataclass
class CountedPasses:
    """Batches that count the passes over them: one for every HVP.

    Attributes:
        batches: The batches.
        passes: Number of passes so far.
    """

    batches: list[Batch]
    passes: int = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches, and count the pass."""
        yield from self.batches
        self.passes += 1


def eigenthings_operator(problem: Problem, data: CountedPasses, method: str) -> Any:
    """Return the Hessian operator of hessian-eigenthings."""
    from hessian_eigenthings import HessianOperator, supervised_loss  # noqa: PLC0415 - may not be installed

    return HessianOperator(problem.module, data, supervised_loss(cross_entropy), method=method)


@contextlib.contextmanager
def eigenthings_product(problem: Problem, method: str) -> Iterator[Product]:
    """Give the HVP of hessian-eigenthings."""
    yield eigenthings_operator(problem, CountedPasses(problem.batches), method).matvec


def eigenthings_density(problem: Problem, nodes: int, seed: int, *, method: str) -> Run:
    """Run stochastic Lanczos quadrature, which reorthogonalizes and finds both extremes."""
    from hessian_eigenthings import spectral_density  # noqa: PLC0415

    data = CountedPasses(problem.batches)
    operator = eigenthings_operator(problem, data, method)
    result = spectral_density(operator, num_runs=1, lanczos_steps=nodes, seed=seed)
    values, weights = (part[0].double().cpu().numpy() for part in (result.raw_eigenvalues, result.raw_weights))
    return Run(data.passes, (float(values[0]), float(values[-1])), rule=(values, weights))


def curvlinops_operator(problem: Problem, data: CountedPasses) -> Any:
    """Return the Hessian operator of curvlinops, without its check for determinism."""
    from curvlinops import HessianLinearOperator  # noqa: PLC0415

    class CrossEntropy(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(outputs, labels)

    return HessianLinearOperator(
        problem.module,
        CrossEntropy(),
        problem.parameters,
        data,
        check_deterministic=False,
        num_data=problem.samples,
    )


@contextlib.contextmanager
def curvlinops_product(problem: Problem) -> Iterator[Product]:
    """Give the HVP of curvlinops."""
    operator = curvlinops_operator(problem, CountedPasses(problem.batches))
    yield lambda vector: operator @ vector


def curvlinops_density(problem: Problem, nodes: int, seed: int) -> Run:
    """Find the extremes with SciPy's ARPACK, then run Lanczos quadrature without reorthogonalization.

    `lanczos_approximate_spectrum` would call ARPACK in the same way; a separate call can be timed.
    """
    from curvlinops import lanczos_approximate_spectrum  # noqa: PLC0415
    from scipy.sparse.linalg import eigsh  # noqa: PLC0415

    started = time.perf_counter()
    data = CountedPasses(problem.batches)
    operator = curvlinops_operator(problem, data)
    start = torch.randn(problem.dimension, generator=torch.Generator().manual_seed(seed)).numpy()
    low, high = eigsh(operator.to_scipy(), k=2, which="BE", tol=TOLERANCE, v0=start, return_eigenvectors=False)
    ends = data.passes, time.perf_counter() - started
    torch.manual_seed(seed)  # the next call draws its start vector from the global generator
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
