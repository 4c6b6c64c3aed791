"""Candidates of the benchmark, and those that need no other package.

A candidate computes Hessian-vector products and may also estimate the spectral density and C_t.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problems import cross_entropy, loss
from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.analysis.preparation import opened_operators
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import AnalysisOptions
from lightning_hesd.numerics.operators.diagonal_block import choose_difference_step
from lightning_hesd.numerics.operators.strategies import Strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.problems import Batch, Problem

Product = Callable[[Tensor], Tensor]
"""A function from a flat vector to a flat vector, both of shape (n,)."""

TOLERANCE = 0.01
"""Relative accuracy of C_t, for every candidate with such an option."""

CAP = 200
"""Maximum number of HVPs that ours may spend on C_t."""


@dataclass(frozen=True)
class Run:
    """One estimate of a spectrum, or of its extremes.

    Attributes:
        products: Hessian-vector products spent.
        extremes: Smallest and largest eigenvalue.
        rule: Nodes and weights of the quadrature, if the candidate returns them.
        ends: HVPs and seconds until the extremes were found, if that was before the end.
        note: Remark of the candidate on its method.
    """

    products: int
    extremes: tuple[float, float]
    rule: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    ends: tuple[int, float] | None = None
    note: str = ""

    @property
    def c_t(self) -> float:
        """Smallest negative eigenvalue over largest positive one."""
        return ratio(*self.extremes)


@dataclass(frozen=True)
class Candidate:
    """A way to compute HVPs and spectra of a problem.

    Attributes:
        name: Name in the report.
        product: Context manager that gives the HVP.
        density: `density(problem, nodes, seed)` estimates the density from one probe.
        c_t: `c_t(problem, seed)` estimates C_t to `TOLERANCE` from one probe; None: only as part of the density.
        fused: Whether it works with fused attention kernels, which have no second derivative on the CPU.
        package: Its package, if that is not this one or torch.
        pieces: Numbers of batches to run it with.
    """

    name: str
    product: Callable[[Problem], AbstractContextManager[Product]]
    density: Callable[[Problem, int, int], Run] | None = None
    c_t: Callable[[Problem, int], Run] | None = None
    fused: bool = False
    package: str | None = None
    pieces: tuple[int, ...] = (1, 8)


def ratio(smallest: float, largest: float) -> float:
    """Return C_t of extreme eigenvalues; the largest must be positive."""
    return min(smallest, 0.0) / largest


def attention(*, fused: bool) -> AbstractContextManager[None]:
    """Allow all attention kernels, or only the one that is twice differentiable."""
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    allowed: AbstractContextManager[None] = sdpa_kernel(every if fused else [SDPBackend.MATH])
    return allowed


def split(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """View a flat vector in the shapes of the parameters."""
    parts = torch.split(vector, [p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def flatten(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors as one flat vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def gradient(problem: Problem) -> Tensor:
    """Return the gradient of the mean loss, as training computes it, with fused attention."""
    parameters = problem.parameters
    with attention(fused=True):
        parts = [flatten(torch.autograd.grad(loss(problem.module, batch), parameters)) for batch in problem.batches]
    return torch.stack(parts).mean(0)


@contextlib.contextmanager
def our_product(problem: Problem, strategy: Strategy | Literal["auto"]) -> Iterator[Product]:
    """Give the operator beneath `hessian_spectrum`, in the state that it computes in."""
    options = AnalysisOptions(strategy=strategy)
    batches = weighted_batches(problem.batches)
    with opened_operators(problem.module, batches, loss, options, [problem.parameters]) as ([operator], _):
        choose_difference_step([operator])
        yield operator.matvec


def our_spectrum(problem: Problem, steps: int, seed: int, tolerance: float | None = None) -> Run:
    """Call `hessian_spectrum` as the README does."""
    spectrum = hessian_spectrum(problem.module, problem.batches, loss, steps=steps, seed=seed, tolerance=tolerance)
    return Run(
        spectrum.matvecs,
        (spectrum.lambda_min, spectrum.lambda_max),
        rule=(spectrum.nodes[0], spectrum.weights[0]),
        note=f"{spectrum.strategy} ({spectrum.strategy_reason})",
    )


@contextlib.contextmanager
def loop_product(problem: Problem) -> Iterator[Product]:
    """Differentiate retained graphs of the gradients, without further work."""
    parameters = problem.parameters
    gradients = [
        torch.autograd.grad(loss(problem.module, batch), parameters, create_graph=True) for batch in problem.batches
    ]

    def product(vector: Tensor) -> Tensor:
        directions = split(vector, parameters)
        parts = [flatten(torch.autograd.grad(g, parameters, directions, retain_graph=True)) for g in gradients]
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)

    yield product


def loop_density(problem: Problem, nodes: int, seed: int) -> Run:
    """Run Lanczos as in PyHessian: random signs, and vectors in a Python list that are projected out one by one."""
    signs = torch.randint(0, 2, (problem.dimension,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
    vector = signs.to(problem.device)
    basis = [vector / vector.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    with loop_product(problem) as product:
        for _ in range(nodes):
            residual = product(basis[-1])
            if betas:
                residual -= betas[-1] * basis[-2]
            alphas.append(float(residual @ basis[-1]))
            residual -= alphas[-1] * basis[-1]
            for known in basis:
                residual -= (residual @ known) * known
            betas.append(float(residual.norm()))
            basis.append(residual / betas[-1])
    off_diagonal = np.diag(betas[:-1], 1)
    values, vectors = np.linalg.eigh(np.diag(alphas) + off_diagonal + off_diagonal.T)
    return Run(nodes, (float(values[0]), float(values[-1])), rule=(values, vectors[0] ** 2))


@contextlib.contextmanager
def linearized_product(problem: Problem) -> Iterator[Product]:
    """Trace the derivative of the gradient once, with `torch.func.linearize`."""
    parameters = problem.parameters
    names = [name for name, _ in problem.module.named_parameters()]

    def linearize(batch: Batch) -> Callable[..., tuple[Tensor, ...]]:
        def batch_loss(*values: Tensor) -> Tensor:
            wrapped = dict(zip(names, values, strict=True))
            outputs = torch.func.functional_call(problem.module, wrapped, (batch[0],))
            return cross_entropy(outputs, batch[1])

        gradient_of = torch.func.grad(batch_loss, argnums=tuple(range(len(names))))
        derivative: Callable[..., tuple[Tensor, ...]]
        _, derivative = torch.func.linearize(gradient_of, *(p.detach() for p in parameters))
        return derivative

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how torch traces
        derivatives = [linearize(batch) for batch in problem.batches]

    def product(vector: Tensor) -> Tensor:
        directions = split(vector, parameters)
        return torch.stack([flatten(derivative(*directions)) for derivative in derivatives]).mean(0)

    yield product


OURS = Candidate(
    "lightning_hesd",
    partial(our_product, strategy="auto"),
    our_spectrum,
    lambda problem, seed: our_spectrum(problem, CAP, seed, TOLERANCE),
)
PYHESSIAN = Candidate("PyHessian's loop", loop_product, loop_density)
OTHERS = [
    *(Candidate(f"lightning_hesd, {name}", partial(our_product, strategy=name)) for name in get_args(Strategy)),
    PYHESSIAN,
    Candidate("torch.func.linearize", linearized_product, pieces=(1,)),  # with eight, eight traces take a minute
]
