"""How well the difference of two spectra on the same samples is known.

Two states of the weights are analyzed on the same samples, so that the errors from the finite sample have much in
common, and their difference has less error than either. To first order another sample changes an extreme eigenvalue λ
as it changes uᵀHu with the eigenvector u: the spread of uᵀH_g u over groups g of samples gives the standard error of λ,
and the spread of the difference of two such curvatures, group by group, that of the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lightning_hesd.spectra.spectrum import Spectrum

    Array = NDArray[np.float64]

STANDARD_ERRORS = 2.0
"""Differences of fewer standard errors are not told from zero."""


@dataclass(frozen=True)
class PairedDifference:
    """The difference of a quantity of two spectra on the same samples.

    Attributes:
        value: The quantity of the first minus that of the second.
        standard_error: Its standard error from the finite sample, with the groups of samples paired.
        numerical_error: What the error bounds of both Lanczos runs add.
        unpaired_error: The standard error if the two samples were different ones: √(s₁² + s₂²).
    """

    value: float
    standard_error: float
    numerical_error: float
    unpaired_error: float

    @property
    def is_evident(self) -> bool:
        """Whether it is larger than two standard errors and the numerical error together."""
        return abs(self.value) > STANDARD_ERRORS * self.standard_error + self.numerical_error


def c_t_difference(first: Spectrum, second: Spectrum) -> PairedDifference:
    """Return the difference of C_t of two spectra on the same samples, such as those of two epochs of a run.

    Raises:
        ValueError: If a spectrum has no groups of samples (`sampling_error=True` was not set) or no C_t, or the groups
            of both are not the same.
    """
    return _difference(first, second, "c_t", _c_t_influence)


def lambda_max_difference(first: Spectrum, second: Spectrum) -> PairedDifference:
    """Return the difference of the largest eigenvalue; arguments and errors as for `c_t_difference`."""
    return _difference(first, second, "lambda_max", _lambda_max_influence)


def are_comparable(first: Spectrum, second: Spectrum) -> bool:
    """Return whether two spectra have a C_t, and the curvatures of the same groups of samples."""
    shares, others = first.group_curvatures[0], second.group_curvatures[0]
    is_paired = shares.size > 0 and np.array_equal(shares, others) and first.num_samples == second.num_samples
    return is_paired and not (first.reason or second.reason)


def _c_t_influence(spectrum: Spectrum) -> Array:
    """Return by how much each group of samples moves C_t = λ_min/λ_max, shape (groups,), to first order."""
    _, lowest, highest = spectrum.group_curvatures
    influence: Array = (lowest - spectrum.c_t * highest) / spectrum.lambda_max
    return influence


def _lambda_max_influence(spectrum: Spectrum) -> Array:
    influence: Array = spectrum.group_curvatures[2]
    return influence


def _difference(
    first: Spectrum, second: Spectrum, name: str, influence: Callable[[Spectrum], Array]
) -> PairedDifference:
    pair = (first, second)
    for spectrum in pair:
        if not spectrum.group_curvatures.size:
            msg = (
                "a spectrum has no curvatures of groups of samples, which the error of a difference needs: analyze "
                "with `sampling_error=True`."
            )
            raise ValueError(msg)
        if math.isnan(getattr(spectrum, name)):
            msg = f"`{name}` of a spectrum is undefined: {spectrum.reason}."
            raise ValueError(msg)
    shares = first.group_curvatures[0]
    if not np.array_equal(shares, second.group_curvatures[0]) or first.num_samples != second.num_samples:
        msg = (
            f"both spectra must be on the same samples, got {first.num_samples} in {shares.size} groups and "
            f"{second.num_samples} in {second.group_curvatures.shape[1]} groups."
        )
        raise ValueError(msg)
    influences = [influence(spectrum) for spectrum in pair]
    separate = [_error_of_mean(one, shares) for one in influences]
    return PairedDifference(
        value=getattr(first, name) - getattr(second, name),
        standard_error=_error_of_mean(influences[0] - influences[1], shares),
        numerical_error=sum(getattr(spectrum, f"{name}_error") for spectrum in pair),
        unpaired_error=math.hypot(*separate),
    )


def _error_of_mean(values: Array, shares: Array) -> float:
    """Return the standard error of the mean of independent groups with these shares, sum 1."""
    groups = len(values)
    deviations = (values - shares @ values) * shares
    return math.sqrt(float(deviations @ deviations) * groups / (groups - 1))
