"""Eigenvalues and quadrature rule of the tridiagonal matrix T of a Lanczos run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]


RECENT = 8
"""Number of matrices whose eigenvectors are kept: an analysis asks several questions about the same runs."""


def tridiagonal_eigh(alphas: ArrayLike, betas: ArrayLike) -> tuple[Array, Array]:
    """Return the Ritz values, ascending, shape (m,), and the eigenvectors of T as columns, shape (m, m).

    Args:
        alphas: Diagonal of T, shape (m,).
        betas: Off-diagonal of T and, last, the norm of the remainder vector, shape (m,).
    """
    diagonal = np.asarray(alphas, dtype=np.float64)
    off_diagonal = np.asarray(betas, dtype=np.float64)[:-1]
    nodes, vectors = _eigh(diagonal.tobytes(), off_diagonal.tobytes())
    return nodes.copy(), vectors.copy()  # callers may write to theirs


def extreme_ritz_values(alphas: ArrayLike, betas: ArrayLike) -> tuple[float, float]:
    """Return the smallest and the largest Ritz value, in a third of the time; arguments as for `tridiagonal_eigh`."""
    values = torch.linalg.eigvalsh(_lower_half(np.asarray(alphas), np.asarray(betas)[:-1]))
    return float(values[0]), float(values[-1])


def _lower_half(diagonal: Array, off_diagonal: Array) -> torch.Tensor:
    """Return T as far as eigenvalue solvers read it."""
    return torch.from_numpy(np.diag(diagonal) + np.diag(off_diagonal, -1))


@functools.lru_cache(RECENT)
def _eigh(diagonal: bytes, off_diagonal: bytes) -> tuple[Array, Array]:
    lower = _lower_half(np.frombuffer(diagonal), np.frombuffer(off_diagonal))
    # By PyTorch: NumPy's threads go on spinning for a while, and would share the cores with those of the next product.
    nodes, vectors = (found.numpy() for found in torch.linalg.eigh(lower))
    return nodes, vectors


def gauss_quadrature(alphas: ArrayLike, betas: ArrayLike) -> tuple[Array, Array, Array]:
    """Return the Gauss quadrature rule of a Lanczos run, and its Ritz residuals; arguments as for `tridiagonal_eigh`.

    Returns:
        nodes: Ritz values θ, ascending, shape (m,).
        weights: Squared first components of the eigenvectors of T, shape (m,), sum 1.
        residuals: Ritz residuals β_m·|last components|, shape (m,): an eigenvalue lies within the residual of each
            node.

    Examples:
        >>> nodes, weights, residuals = gauss_quadrature([0.0, 0.0], [1.0, 0.5])
        >>> nodes.tolist(), weights.round(3).tolist(), residuals.round(3).tolist()
        ([-1.0, 1.0], [0.5, 0.5], [0.354, 0.354])
    """
    nodes, vectors = tridiagonal_eigh(alphas, betas)
    weights = vectors[0] ** 2
    return nodes, weights / weights.sum(), float(np.asarray(betas)[-1]) * np.abs(vectors[-1])
