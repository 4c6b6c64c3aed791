"""Statistics of groups of samples, with Hessians H_g: errors, biases and resamples of extreme eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 100
"""A standard error from so many resamples is itself good to 7 %."""

MAX_NEIGHBORS = 64
"""Number of Ritz values next to an extreme one that take part in its changes."""


@dataclass(frozen=True)
class Extreme:
    """An extreme eigenvalue λ with eigenvector u, and how groups of samples change it.

    Attributes:
        nodes: Ritz values of the Lanczos run, ascending, shape (steps,).
        position: That of λ, the first or the last.
        along: yᵀH_g u for each group and each Ritz vector y, shape (groups, steps).
        squares: ‖H_g u‖², shape (groups,).
    """

    nodes: Array
    position: int
    along: Array
    squares: Array


def samples_needed(num_samples: float, allowed: float, error: float, bias: float = 0.0) -> float:
    """Return at how many samples an error that falls with their root, and a bias that falls with them, are allowed.

    Solves error·√(N/k) + |bias|·N/k = allowed for k.

    Args:
        num_samples: N, at which error and bias are known.
        allowed: Their sum at the number of samples sought.
        error: Error at N.
        bias: Bias at N.

    Examples:
        >>> round(samples_needed(100, allowed=0.1, error=0.2))
        400
    """
    if not allowed > 0:
        return math.inf
    root = math.sqrt(error**2 + 4 * abs(bias) * allowed)
    return num_samples * ((error + root) / (2 * allowed)) ** 2


def covariance_of_mean(values: Array, weights: Array) -> Array:
    """Return the covariance of the weighted mean of independent rows, shape (columns, columns)."""
    deviations = (values - weights @ values) * weights[:, None]
    groups = len(weights)
    covariance: Array = deviations.T @ deviations * (groups / (groups - 1))
    return covariance


def resampled_extreme(weights: Array, extreme: Extreme) -> Array:
    """Return an extreme eigenvalue for resampled groups, shape (RESAMPLES,): a bootstrap (Efron 1979).

    Of the change of the matrix the components yᵀΔHu along Ritz vectors y are known. They change one row and column of
    the diagonal matrix of Ritz values. So where another eigenvalue is close, that one becomes the extreme, which bounds
    the change: first-order errors would be too large. As that one does not change itself here, the scatter may be too
    small, by up to about 25 % for two eigenvalues that are nearly equal.

    Args:
        weights: Share of each group in the mean, shape (groups,), sum 1.
        extreme: The eigenvalue.
    """
    nodes, position = extreme.nodes, extreme.position
    groups = len(weights)
    drawn = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES) * weights
    others = np.argsort(np.abs(nodes - nodes[position]), kind="stable")
    near = np.array([position, *others[others != position]])[:MAX_NEIGHBORS]
    changes = (drawn / drawn.sum(axis=1, keepdims=True) - weights) @ extreme.along[:, near]
    matrices = np.repeat(np.diag(nodes[near])[None], RESAMPLES, axis=0)
    matrices[:, 0, :] += changes
    matrices[:, 1:, 0] += changes[:, 1:]
    extremes: Array = np.linalg.eigvalsh(matrices)[:, 0 if position == 0 else -1]
    return extremes


def outward_bias(weights: Array, extreme: Extreme, mean_eigenvalue: float) -> float:
    """Return the outward bias of the eigenvalue at one end, at least 0.

    Second-order perturbation theory: Σ_k s_k²/gap_k with s_k² the sampling variance of y_kᵀHu, here with the shift
    itself in the denominator (Brillouin & Wigner), x = Σ_k s_k²/(gap_k + x), which stays finite for close eigenvalues.
    The complement of the Krylov space counts as one more eigenvalue at the mean of the spectrum, `mean_eigenvalue`.
    """
    groups, nodes = len(weights), extreme.nodes
    variances = np.diag(covariance_of_mean(extreme.along, weights)).copy()
    variances[extreme.position] = 0.0
    rest = np.maximum(extreme.squares - (extreme.along**2).sum(axis=1), 0.0)
    variances = np.append(variances, float(weights**2 @ rest) * groups / (groups - 1))
    gaps = np.abs(np.append(nodes, mean_eigenvalue) - nodes[extreme.position])
    low, high = 0.0, math.sqrt(float(variances.sum()))  # x² ≤ Σ s_k², with equality where all gaps are zero
    for _ in range(60):
        x = (low + high) / 2
        if x == 0:
            break
        low, high = (x, high) if float((variances / (gaps + x)).sum()) > x else (low, x)
    return high
