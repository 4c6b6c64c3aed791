"""How many products another tolerance would have taken, beside runs that were stopped by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_hesd import hessian_spectrum
from lightning_hesd.spectra.shorter_run import products_within
from lightning_hesd.spectra.spectrum import Spectrum
from tests.example_spectra import Quadratic, quadratic_loss


def spectrum(tolerance: float | None, *, probes: int = 1, steps: int = 60) -> Spectrum:
    """Analyze a quadratic loss with outliers on a bulk, half of it negative."""
    rng = np.random.default_rng(0)
    curvature = np.concatenate([np.geomspace(10, 1, 12), 0.2 * rng.standard_normal(188)])
    options = {"steps": steps, "tolerance": tolerance, "probes": probes}
    return hessian_spectrum(Quadratic(curvature), [torch.ones(1, 1)], quadratic_loss, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.02])
def test_it_is_where_a_run_with_the_tolerance_stops(tolerance: float, probes: int) -> None:
    """Such a run asks at every second step, and forecasts when to ask again."""
    found = products_within(spectrum(None, probes=probes), tolerance)
    taken = sum(spectrum(tolerance, probes=probes).steps_per_probe)
    assert found is not None
    assert found <= taken <= 1.5 * found + 2 * probes


def test_nothing_stops_at_a_tolerance_that_was_not_met_or_at_an_undefined_c_t() -> None:
    assert products_within(spectrum(None, steps=5), 0.02) is None
    assert products_within(replace(spectrum(None), reason="flat"), 0.3) is None
