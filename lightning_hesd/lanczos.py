"""Lanczos tridiagonalisation of a symmetric matrix that is known by its products only.

Works on flat tensors; knows nothing of modules or losses. Lanczos (1950); complete reorthogonalisation by classical
Gram-Schmidt, done twice (Giraud, Langou & Rozložník 2005), keeps the basis orthogonal to machine precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_hesd.criteria import rounding_threshold

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

STEPS_BETWEEN_CHECKS = 8
"""On an accelerator the coefficients are read back only every so many steps: reading them waits for the device."""


class NonFiniteProductError(ArithmeticError):
    """A matrix-vector product came out NaN or infinite.

    Attributes:
        vector: A finite vector, shape (n,), whose product was not finite.
    """

    def __init__(self, vector: Tensor, step: int) -> None:
        super().__init__(f"the matrix-vector product of Lanczos step {step} is NaN or infinite")
        self.vector = vector


@dataclass(frozen=True)
class Tridiagonal:
    """Result of m Lanczos steps.

    Attributes:
        alphas: Diagonal, shape (m,), float64.
        betas: Off-diagonal and, last, the norm of the final residual vector, shape (m,), float64.
        matvecs: Products spent: m, or a few more on an accelerator.
        breakdown: Whether the Krylov space became invariant, so that the eigenvalues of T are eigenvalues of the
            matrix.
    """

    alphas: NDArray[np.float64]
    betas: NDArray[np.float64]
    matvecs: int
    breakdown: bool


def lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int, report: Callable[[], None] | None = None
) -> Tridiagonal:
    """Run Lanczos with a stored, fully reorthogonalised basis.

    Args:
        matvec: Product with a symmetric matrix, (n,) -> (n,).
        start: Start vector, shape (n,), finite and not zero.
        steps: Number of steps, at least 1; never more than n are taken.
        report: Called after every step.

    Returns:
        The tridiagonal matrix. It is shorter than `steps` if the Krylov space became invariant: β small relative to
        ‖T‖ and the dtype's epsilon.

    Raises:
        ValueError: If `steps` is less than 1, or `start` is zero or not finite.
        NonFiniteProductError: If a product is NaN or infinite.

    Example:
        >>> diagonal = torch.tensor([1.0, 2.0, 4.0])
        >>> result = lanczos(lambda v: diagonal * v, torch.ones(3), steps=10)
        >>> len(result.alphas), result.breakdown, round(float(result.alphas[0]), 4)
        (3, True, 2.3333)
    """
    if steps < 1:
        msg = f"`steps` must be at least 1, got {steps}."
        raise ValueError(msg)
    norm = float(torch.linalg.vector_norm(start))
    if not 0 < norm < float("inf"):
        msg = f"`start` must be finite and not zero, got a vector of norm {norm}."
        raise ValueError(msg)

    n = start.numel()
    steps = min(steps, n)
    limits = torch.finfo(start.dtype)
    interval = 1 if start.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    basis = torch.empty(steps, n, dtype=start.dtype, device=start.device)  # row j is the Lanczos vector v_j
    alphas, betas = torch.zeros(2, steps, dtype=start.dtype, device=start.device)
    torch.div(start, norm, out=basis[0])

    for step in range(steps):
        known = basis[: step + 1]
        residual = matvec(known[step])
        # Both passes remove everything the basis spans, hence also α·v_j + β·v_{j-1} of the three-term recurrence;
        # the two coefficients along v_j add up to α.
        for _ in range(2):
            coefficients = known @ residual
            residual = torch.addmv(residual, known.T, coefficients, alpha=-1)
            alphas[step] += coefficients[step]
        betas[step] = torch.linalg.vector_norm(residual)
        if report is not None:
            report()

        if (step + 1) % interval == 0 or step + 1 == steps:
            diagonal, off_diagonal = (c[: step + 1].double().cpu().numpy() for c in (alphas, betas))
            finite = np.isfinite(diagonal) & np.isfinite(off_diagonal)
            if not finite.all():
                culprit = int(np.argmin(finite))
                raise NonFiniteProductError(basis[culprit].clone(), culprit + 1)
            end = _breakdown(diagonal, off_diagonal, rounding_threshold(1.0, limits.eps, n))
            if end is not None:
                return Tridiagonal(diagonal[:end], off_diagonal[:end], matvecs=step + 1, breakdown=True)
        if step + 1 < steps:
            torch.div(residual, betas[step].clamp_min(limits.tiny), out=basis[step + 1])

    return Tridiagonal(diagonal, off_diagonal, matvecs=steps, breakdown=False)


def _breakdown(alphas: NDArray[np.float64], betas: NDArray[np.float64], tolerance: float) -> int | None:
    """Return the first number of steps after which the residual is rounding relative to ‖T‖, or None."""
    previous = np.concatenate([[0.0], betas[:-1]])
    norms = np.maximum.accumulate(np.abs(alphas) + previous)  # ‖T‖ from the inside, so that β itself does not count
    ended = np.flatnonzero(betas <= tolerance * norms)
    return int(ended[0]) + 1 if len(ended) else None
