"""Extreme eigenvalues of resampled groups, against those of the resampled matrices."""

import numpy as np
import pytest

from lightning_hesd.numerics.analysis.group_statistics import RESAMPLES, Extreme, resampled_extreme

GROUPS, ORDER = 12, 8


def resampled_shares(weights: np.ndarray) -> np.ndarray:
    """The shares of the groups in each resample, shape (resamples, groups)."""
    drawn = np.random.default_rng(0).multinomial(GROUPS, np.full(GROUPS, 1 / GROUPS), size=RESAMPLES) * weights
    shares: np.ndarray = drawn / drawn.sum(axis=1, keepdims=True)
    return shares


@pytest.mark.parametrize(("gap", "accuracy", "correlation"), [(1.0, 0.1, 0.95), (0.02, 0.3, 0.6)])
@pytest.mark.parametrize("position", [0, ORDER - 1])
def test_extremes_are_those_of_resampled_matrices(
    gap: float, accuracy: float, correlation: float, position: int
) -> None:
    """Of a close neighbor only the coupling is known, not its own change: their scatter is right to 30 % then."""
    generator = np.random.default_rng(3)
    weights = generator.dirichlet(np.full(GROUPS, 20.0))
    levels = np.array([-3.0 - gap, -3.0, -1.0, 0.0, 0.5, 1.0, 4.0, 4.0 + gap])
    noise = 0.2 * generator.standard_normal((GROUPS, ORDER, ORDER))
    noise += noise.transpose(0, 2, 1)
    groups = np.diag(levels) + noise - np.einsum("g,gij->ij", weights, noise)
    along = groups[:, position, :]  # the eigenvectors are the axes
    found = resampled_extreme(weights, Extreme(levels, position, along, (along**2).sum(axis=1)))
    true = np.linalg.eigvalsh(np.einsum("rg,gij->rij", resampled_shares(weights), groups))[:, position]
    assert found.std() == pytest.approx(true.std(), rel=accuracy)
    assert np.corrcoef(found, true)[0, 1] > correlation
