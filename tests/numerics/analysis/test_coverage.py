"""How often the interval of C_t holds, over a population of spectra and start vectors: at least as often as it says."""

import functools
from typing import Literal

import numpy as np
import pytest
import torch

from lightning_hesd import Spectrum
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from tests import example_spectra as spectra

Basis = Literal["device", "none"]

CAP = 60
SEEDS = 6
# Each kind has start vectors of its own.
KINDS: list[tuple[torch.dtype, Basis, range]] = [
    (torch.float64, "device", range(SEEDS)),
    (torch.float32, "none", range(SEEDS, 2 * SEEDS)),
]
PAIRS = SEEDS * len(spectra.POPULATION)


@functools.cache
def coefficients(name: str, seed: int, dtype: torch.dtype, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Those of all steps, of which the coefficients of fewer steps are the beginning (see test_lanczos)."""
    run = spectra.run(spectra.POPULATION[name], CAP, torch.Generator().manual_seed(seed), dtype, basis)
    return run.alphas, run.betas


@functools.cache
def record(name: str, seed: int, dtype: torch.dtype, basis: Basis, confidence: float, steps: int) -> Spectrum:
    alphas, betas = coefficients(name, seed, dtype, basis)
    probes = [(alphas[:steps], betas[:steps])]
    return spectra.of_coefficients(probes, spectra.N, dtype, confidence=confidence, verified="yes")


def holds(name: str, dtype: torch.dtype, spectrum: Spectrum) -> bool:
    low, high = spectrum.c_t_interval
    return low <= spectra.c_t(torch.tensor(spectra.POPULATION[name], dtype=dtype).double().numpy()) <= high


@pytest.mark.parametrize(("steps", "confidence"), [(2, 0.7), (6, 0.95), (12, 0.7), (40, 0.95)])
@pytest.mark.parametrize(("dtype", "basis", "seeds"), KINDS)
def test_coverage_at_fixed_steps(dtype, basis, seeds, steps, confidence):
    hits = sum(
        holds(name, dtype, record(name, seed, dtype, basis, confidence, steps))
        for name in spectra.POPULATION
        for seed in seeds
    )
    assert hits >= confidence * PAIRS


def is_done(spectrum: Spectrum, rule: float | str) -> bool:
    if rule == "type":
        return spectrum.type_certain
    return spectrum.c_t_error <= float(rule) * max(abs(spectrum.c_t), 1e-3)


@pytest.mark.parametrize(
    ("kind", "rule", "confidence"),
    [(0, 0.05, 0.95), (0, 0.01, 0.7), (0, "type", 0.95), (0, "type", 0.7), (1, 0.05, 0.7)],
)
def test_coverage_at_the_step_chosen_by_the_interval_itself(kind, rule, confidence):
    dtype, basis, seeds = KINDS[kind]
    hits = stopped = 0
    for name in spectra.POPULATION:
        for seed in seeds:
            total = len(coefficients(name, seed, dtype, basis)[0])
            for steps in [*range(2, total, 2), total]:
                spectrum = record(name, seed, dtype, basis, confidence, steps)
                if is_done(spectrum, rule):
                    stopped += 1
                    break
            hits += holds(name, dtype, spectrum)
    assert hits >= confidence * PAIRS
    # Most of them did stop by themselves. (C_t of the spectrum about the threshold has no type to be found.)
    assert stopped >= 0.8 * PAIRS


def test_the_point_alone_would_not_be_covered():
    # What makes these tests mean something: in many of these cases the residuals of the nodes promise too much.
    short = 0
    for name, eigenvalues in spectra.POPULATION.items():
        for seed in range(SEEDS):
            nodes, _, residuals = gauss_quadrature(*(p[:6] for p in coefficients(name, seed, torch.float64, "device")))
            short += eigenvalues.min() < nodes[0] - residuals[0] or eigenvalues.max() > nodes[-1] + residuals[-1]
    assert short >= 0.2 * PAIRS
