"""How often the interval of C_t holds, over a population of spectra and start vectors: at least as often as it says."""

import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch

from lightning_hesd import Spectrum
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra.criteria import rounding_threshold
from lightning_hesd.spectra.quadrature import stack_rules
from tests import example_spectra as spectra

Basis = Literal["device", "cpu", "none"]

CAP = 60
FEWEST_PAIRS = 120
# Every kind has start vectors of its own.
KINDS: list[tuple[torch.dtype, Basis, range]] = [
    (torch.float64, "device", range(8)),
    (torch.float64, "none", range(8, 16)),
    (torch.float32, "device", range(16, 24)),
    (torch.float32, "none", range(24, 32)),
]


def diagonal(name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(spectra.POPULATION[name], dtype=dtype)


@functools.cache
def run(name: str, seed: int, dtype: torch.dtype, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of all steps: those of fewer steps are their beginning (see test_lanczos)."""
    values = diagonal(name, dtype)
    start = torch.randn(spectra.N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    lanczos = Lanczos(lambda vector: values * vector, start, CAP, basis=basis)
    lanczos.run()
    return lanczos.alphas, lanczos.betas


@functools.cache
def record(
    name: str, seed: int, dtype: torch.dtype, basis: Basis, confidence: float, steps: int
) -> tuple[float, float, float]:
    """C_t and its interval after some steps."""
    alphas, betas = (part[:steps] for part in run(name, seed, dtype, basis))
    nodes, weights, residuals = stack_rules([gauss_quadrature(alphas, betas)])
    spectrum = Spectrum(
        nodes,
        weights,
        residuals,
        steps_per_probe=(len(alphas),),
        dimension=spectra.N,
        num_samples=1,
        loss=1.0,
        rounding=rounding_threshold(float(np.abs(nodes).max()), torch.finfo(dtype).eps, spectra.N),
        matvecs=steps,
        seconds=0.0,
        confidence=confidence,
    )
    return spectrum.c_t, *spectrum.c_t_interval


def is_done(c_t: float, low: float, high: float, rule: float | str) -> bool:
    if rule == "type":
        return low > -0.6 or high <= -0.6
    return max(c_t - low, high - c_t) <= float(rule) * max(abs(c_t), 1e-3)


def intervals(
    dtype: torch.dtype, basis: Basis, seeds: range, rule: float | str, confidence: float
) -> Iterator[tuple[str, float, float, bool]]:
    """Yield name, ends and whether the rule was met, for every spectrum and seed."""
    for name in spectra.POPULATION:
        for seed in seeds:
            total = len(run(name, seed, dtype, basis)[0])
            counts = [min(rule, total)] if isinstance(rule, int) else [*range(2, total, 2), total]
            for steps in counts:
                c_t, low, high = record(name, seed, dtype, basis, confidence, steps)
                done = not isinstance(rule, int) and is_done(c_t, low, high, rule)
                if done:
                    break
            yield name, low, high, done


def count_hits(dtype: torch.dtype, found: list[tuple[str, float, float, bool]]) -> int:
    true = {name: spectra.c_t(diagonal(name, dtype).double().numpy()) for name in spectra.POPULATION}
    return sum(low <= true[name] <= high for name, low, high, _ in found)


@pytest.mark.parametrize("confidence", [0.95, 0.7])
@pytest.mark.parametrize("steps", [2, 6, 12, 40])
@pytest.mark.parametrize(("dtype", "basis", "seeds"), KINDS)
def test_coverage_at_fixed_steps(dtype, basis, seeds, steps, confidence):
    found = list(intervals(dtype, basis, seeds, steps, confidence))
    assert len(found) >= FEWEST_PAIRS
    assert count_hits(dtype, found) >= confidence * len(found)


@pytest.mark.parametrize(
    ("dtype", "basis", "seeds", "rule", "confidence"),
    [
        *[(*KINDS[0], rule, confidence) for rule in (0.05, 0.01, "type") for confidence in (0.95, 0.7)],
        (*KINDS[3], 0.05, 0.7),  # the other rules and kinds look at much the same coefficients
    ],
)
def test_coverage_at_the_step_chosen_by_the_interval_itself(dtype, basis, seeds, rule, confidence):
    found = list(intervals(dtype, basis, seeds, rule, confidence))
    assert len(found) >= FEWEST_PAIRS
    assert count_hits(dtype, found) >= confidence * len(found)
    # Most of them did stop by themselves. (C_t of the spectrum about the threshold has no type to be found.)
    assert sum(done for *_, done in found) >= 0.8 * len(found)


def test_the_point_alone_would_not_be_covered():
    # What makes these tests mean something: in many of these cases the residuals of the nodes promise too much.
    short = 0
    for name in spectra.POPULATION:
        for seed in range(8):
            nodes, _, residuals = gauss_quadrature(*(part[:6] for part in run(name, seed, torch.float64, "device")))
            true = spectra.POPULATION[name].min(), spectra.POPULATION[name].max()
            short += true[0] < nodes[0] - residuals[0] or true[1] > nodes[-1] + residuals[-1]
    assert short >= 0.2 * 8 * len(spectra.POPULATION)
