"""How many products an analysis would have taken with another `tolerance`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra.quadrature import tridiagonal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_hesd.spectra.spectrum import Spectrum


def products_within(spectrum: Spectrum, tolerance: float) -> int | None:
    """Return the Lanczos steps of all probes after which the interval of C_t would have met a tolerance.

    The first steps of a run are those of a shorter run, so that this is known without another product. It is assumed
    that the interval shrinks from step to step, which it does almost always.

    Args:
        spectrum: A spectrum with fixed steps.
        tolerance: Relative accuracy of C_t, as the option of that name.

    Returns:
        The number of products; None if some probe would have taken all of its steps, or C_t is undefined.
    """
    if spectrum.reason is not None:
        return None
    total = 0
    for nodes, weights, steps in zip(spectrum.nodes, spectrum.weights, spectrum.steps_per_probe, strict=True):
        matrix = tridiagonal(nodes[:steps], weights[:steps])
        # Bisection: `low` steps are too few, `high` are enough or one more than there are.
        low, high = 0, len(matrix)
        while high - low > 1:
            middle = (low + high) // 2
            is_enough = _after(spectrum, matrix, middle, tolerance).converged
            low, high = (low, middle) if is_enough else (middle, high)
        if high == len(matrix):
            return None
        total += high
    return total


def _after(spectrum: Spectrum, matrix: NDArray[np.float64], steps: int, tolerance: float) -> Spectrum:
    """Return the spectrum that the first steps of a run give, fewer than all; `matrix` is the run's tridiagonal one."""
    nodes, vectors = np.linalg.eigh(matrix[:steps, :steps])
    residuals = matrix[steps, steps - 1] * np.abs(vectors[-1])
    return replace(
        spectrum,
        nodes=nodes[None],
        weights=vectors[:1] ** 2,
        residuals=residuals[None],
        steps_per_probe=(steps,),
        tolerance=tolerance,
        stop="c_t",
        by_layer={},
    )
