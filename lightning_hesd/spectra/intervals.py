"""Quantiles for confidence intervals, without SciPy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def student_quantile(confidence: float, degrees: int) -> float:
    """Return t such that |T| <= t with this probability, for Student's T with so many degrees of freedom.

    With T = √degrees · tan φ the density of φ is proportional to cos φ to the power degrees - 1.

    Args:
        confidence: Probability, between 0 and 1.
        degrees: Degrees of freedom, at least 1.

    Examples:
        >>> round(student_quantile(0.95, 4), 3)
        2.776
    """
    angles: NDArray[np.float64] = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence * mass[-1], mass, angles)))


def chi_square_quantile(probability: float, degrees: int) -> float:
    """Return x such that X <= x with this probability, for X of the chi-squared distribution.

    Args:
        probability: Between 0 and 1.
        degrees: Degrees of freedom, at least 1.

    Examples:
        >>> round(chi_square_quantile(0.95, 15), 2)
        25.0
    """
    # √X, whose density is finite everywhere, lies about √degrees with a standard deviation below 1.
    roots: NDArray[np.float64] = np.linspace(0.0, math.sqrt(degrees) + 10, 20_001)
    with np.errstate(divide="ignore"):
        logarithm = (degrees - 1) * np.log(roots) - roots**2 / 2 if degrees > 1 else -(roots**2) / 2
    density = np.exp(logarithm - logarithm.max())
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.interp(probability * mass[-1], mass, roots)) ** 2
