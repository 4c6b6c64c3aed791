"""Quantiles against SciPy's, which the package itself does without."""

from __future__ import annotations

import pytest
from scipy import stats

from lightning_hesd.spectra.intervals import student_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 49, 99])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_quantile(confidence: float, degrees: int) -> None:
    assert student_quantile(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-4)
