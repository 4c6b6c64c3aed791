"""Histories whose picks are worth what a simulation says."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_hesd.spectra.record import SpectrumRecord
from tests.spectra.nodes import spectrum


def record(
    epoch: int, c_t: float = -0.1, lambda_max: float = 1.0, loss: float = 0.1, **metrics: float
) -> SpectrumRecord:
    """Return a record with the metrics given by name."""
    return SpectrumRecord(epoch, 10 * epoch + 10, spectrum(c_t * lambda_max, lambda_max, loss=loss), metrics=metrics)


def history(generator: np.random.Generator, epochs: int = 6, effect: float = 0.0) -> list[SpectrumRecord]:
    """Return a run in which the accuracy of an epoch is noise of size 1 %, plus `effect` where C_t is the highest.

    All epochs are candidates. The highest C_t is never at the last epoch, λ_max means nothing.
    """
    c_t: NDArray[np.float64] = -0.1 - 0.01 * generator.permutation(epochs - 1)
    accuracy = 0.9 + 0.01 * generator.standard_normal(epochs)
    accuracy[:-1] += effect * (c_t == c_t.max())
    sizes = 1 + generator.random(epochs)
    start = record(-1, loss=2.0)
    return [start] + [
        record(epoch, value, size, val_acc=score, val_loss=1 - score + 0.01 * generator.standard_normal())
        for epoch, (value, size, score) in enumerate(zip([*c_t, -0.5], sizes, accuracy, strict=True))
    ]


def assert_same(found: Any, expected: Any) -> None:
    """Check that judgments are the same, up to the seven digits of payloads."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        close = pytest.approx(expected, rel=1e-5, abs=1e-6) if isinstance(expected, float) else expected
        assert found == close
