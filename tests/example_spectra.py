"""A named population of spectra of dimension 500, with what makes the extremes of each hard or easy to find."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hesd import Spectrum
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra.criteria import rounding_threshold
from lightning_hesd.spectra.quadrature import stack_rules

N = 500
_rng = np.random.default_rng(0)
_bulk = np.linspace


def _semicircle() -> np.ndarray:
    matrix = _rng.normal(size=(N, N))
    values = np.linalg.eigvalsh(matrix + matrix.T)
    return values / values.max()


POPULATION: dict[str, np.ndarray] = {
    "semicircle": _semicircle(),
    "uniform": _bulk(-0.7, 1.0, N),
    "few outliers on a narrow bulk": np.concatenate([_bulk(-0.02, 0.05, N - 6), [-0.1, 0.3, 0.5, 1.0, 2.0, 4.0]]),
    "close top": np.concatenate([_bulk(-0.3, 0.5, N - 4), [0.97, 0.98, 0.99, 1.0]]),
    "close bottom": np.concatenate([[-0.5, -0.499, -0.498], _bulk(-0.2, 1.0, N - 3)]),
    "lone small negative": np.concatenate([[-0.01], _bulk(0.0, 1.0, N - 1) ** 2]),
    "lone top": np.concatenate([_bulk(-0.5, 0.5, N - 1), [0.6]]),
    "clusters": np.concatenate([np.full(100, -0.2), np.zeros(300), np.full(99, 0.5), [1.0]]),
    "geometric": np.concatenate([-np.geomspace(1e-6, 0.1, 100), np.geomspace(1e-6, 1.0, 400)]),
    "symmetric": np.concatenate([-np.geomspace(1e-3, 1.0, 250), np.geomspace(1e-3, 1.0, 250)]),
    "near ties": np.concatenate([[-0.3, -0.3 + 1e-7], _bulk(-0.1, 0.2, N - 5), [1.0 - 2e-6, 1.0 - 1e-6, 1.0]]),
    "rank deficient": np.concatenate([np.zeros(N - 50), _bulk(-0.1, 1.0, 50)]),
    "heavy tails": np.concatenate([-0.05 * _rng.pareto(1.5, 200), _rng.pareto(1.2, 300)]),
    "about the threshold": np.concatenate([_bulk(-0.6, 0.9, N - 1), [1.0]]),
    "positive": _bulk(0.0, 1.0, N) ** 3 + 1e-3,
}

SMALL = 150
_rank = np.arange(1.0, SMALL + 1)
_narrow = 0.02 * np.random.default_rng(0).standard_normal(SMALL)
SMALL_POPULATION: dict[str, np.ndarray] = {
    "uniform": _bulk(-0.5, 1.0, SMALL),
    "outliers": np.concatenate([np.geomspace(10, 1, 9), _narrow[9:]]),
    "power law": _rank**-1.5,
    "both signs": np.where(_rank % 2, 1.0, -0.9) / _rank,
    "null space": np.concatenate([np.geomspace(10, 0.01, 20), np.zeros(SMALL - 20)]),
    "negative": -np.geomspace(1e-4, 1.0, SMALL),
    "close": np.concatenate([5 * (1 + 1e-3 * np.arange(4)), 2 * (1 + 1e-5 * np.arange(3)), _narrow[7:]]),
}
"""Spectra of dimension 150 for what counts eigenvalues: with and without a bulk, a null space, and close ones."""


def c_t(spectrum: np.ndarray) -> float:
    """C_t of a spectrum with positive eigenvalues."""
    return min(float(spectrum.min()), 0.0) / float(spectrum.max())


class Quadratic(nn.Module):
    """Its loss has a diagonal Hessian with the given eigenvalues."""

    def __init__(self, spectrum: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.register_buffer("diagonal", torch.tensor(spectrum, dtype=dtype))
        self.w = nn.Parameter(torch.full((len(spectrum),), 0.1, dtype=dtype))


def quadratic_loss(module: Quadratic, _: Any) -> Tensor:
    """w·Dw/2 + 1, the same for every batch."""
    return (module.diagonal * module.w * module.w).sum() / 2 + 1


def analyze(
    eigenvalues: np.ndarray,
    seed: int = 0,
    steps: tuple[int, ...] = (40,),
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> Spectrum:
    """Return what Lanczos runs on a diagonal matrix find, one probe for each number of steps."""
    generator = torch.Generator().manual_seed(seed)
    runs = [run(eigenvalues, number, generator, dtype) for number in steps]
    return of_coefficients([(one.alphas, one.betas) for one in runs], len(eigenvalues), dtype, **fields)


def run(
    eigenvalues: np.ndarray,
    steps: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    basis: Literal["device", "none"] = "device",
) -> Lanczos:
    """Return a finished Lanczos run on a diagonal matrix."""
    diagonal = torch.tensor(eigenvalues, dtype=dtype)
    start = torch.randn(len(eigenvalues), generator=generator, dtype=torch.float64).to(dtype)
    found = Lanczos(lambda vector: diagonal * vector, start, steps, basis=basis)
    found.run()
    return found


def of_coefficients(
    probes: list[tuple[np.ndarray, np.ndarray]], dimension: int, dtype: torch.dtype = torch.float64, **fields: Any
) -> Spectrum:
    """Return the spectrum of Lanczos coefficients α and β, a pair of arrays for each probe."""
    nodes, weights, residuals = stack_rules([gauss_quadrature(*probe) for probe in probes])
    steps = tuple(len(alphas) for alphas, _ in probes)
    rounding = rounding_threshold(float(np.nanmax(np.abs(nodes))), torch.finfo(dtype).eps, dimension)
    given = {"dimension": dimension, "num_samples": 1, "loss": 1.0, "rounding": rounding, "seconds": 0.0, **fields}
    return Spectrum(nodes, weights, residuals, steps_per_probe=steps, matvecs=sum(steps), **given)
