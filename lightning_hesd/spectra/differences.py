"""How well the difference of two spectra on the same samples is known.

Two states of the weights are analyzed on the same samples, so that the errors from the finite sample have much in
common, and their difference has less error than either. Each analysis has its extreme eigenvalues for the same
resampled groups of samples (a bootstrap, Efron 1979); the scatter of the differences, resample by resample, is the
standard error of the difference.
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

    Of spectra on different samples, which cannot be told by their numbers, the standard error is too small.

    Raises:
        ValueError: If a spectrum has no resampled extremes (`sampling_error=True` was not set) or no C_t, or the
            numbers of samples or the shares of their groups differ.
    """
    return _difference(first, second, "c_t", _resampled_c_t)


def lambda_max_difference(first: Spectrum, second: Spectrum) -> PairedDifference:
    """Return the difference of the largest eigenvalue; arguments and errors as for `c_t_difference`."""
    return _difference(first, second, "lambda_max", _resampled_lambda_max)


def are_comparable(first: Spectrum, second: Spectrum) -> bool:
    """Return whether two spectra have a C_t, and resampled extremes of the same groups of samples."""
    return _complaint(first, second) is None


def _complaint(first: Spectrum, second: Spectrum) -> str | None:
    """Return why two spectra cannot be compared, and what to do; None if they can."""
    pair = (first, second)
    if not all(spectrum.resampled_extremes.size for spectrum in pair):
        return "a spectrum has no resampled extremes, which the error of a difference needs: set `sampling_error=True`."
    for spectrum in pair:
        if spectrum.reason:
            return f"C_t of a spectrum is undefined: {spectrum.reason}."
    shares = [spectrum.group_curvatures[0] for spectrum in pair]
    if first.num_samples != second.num_samples or not np.array_equal(*shares):
        found = [f"{s.num_samples} in {s.group_curvatures.shape[1]} groups" for s in pair]
        return f"both spectra must be on the same samples, got {found[0]} and {found[1]}."
    return None


def _resampled_c_t(spectrum: Spectrum) -> Array:
    lowest, highest = spectrum.resampled_extremes
    values: Array = np.minimum(lowest, 0.0) / highest
    return values


def _resampled_lambda_max(spectrum: Spectrum) -> Array:
    values: Array = spectrum.resampled_extremes[1]
    return values


def _difference(
    first: Spectrum, second: Spectrum, name: str, resampled: Callable[[Spectrum], Array]
) -> PairedDifference:
    complaint = _complaint(first, second)
    if complaint is not None:
        raise ValueError(complaint)
    pair = (first, second)
    values = [resampled(spectrum) for spectrum in pair]
    return PairedDifference(
        value=getattr(first, name) - getattr(second, name),
        standard_error=float((values[0] - values[1]).std(ddof=1)),
        numerical_error=sum(getattr(spectrum, f"{name}_error") for spectrum in pair),
        unpaired_error=math.hypot(*(float(each.std(ddof=1)) for each in values)),
    )
