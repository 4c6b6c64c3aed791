"""The true C_t of a problem, and the number of steps after which a run has found it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.candidates import ratio
from benchmarks.problems import Problem, cached, load, loss
from lightning_hesd import hessian_spectrum
from lightning_hesd.spectra.quadrature import tridiagonal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.problems import Size

LENGTHS = {"full": (100, 200, 300), "quick": (30, 60)}
"""Numbers of steps, tried in turn until the Ritz residuals bound the error of C_t by `CERTAIN`."""

CERTAIN = 1e-3
SEED = 1000
"""Seed that no candidate uses, so that none is compared with its own start vector."""


def true_c_t(name: str, size: Size) -> dict[str, Any]:
    """Return C_t and a bound on its error, from a long run in float64; the result is cached."""
    path = cached(name, size, "truth.json")
    if not path.exists():
        path.write_text(json.dumps(_long_run(in_float64(load(name, size=size)), LENGTHS[size])), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def in_float64(problem: Problem) -> Problem:
    """Turn a problem into one in double precision."""
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in problem.batches]
    return Problem(problem.name, problem.module.double(), batches)


def _long_run(problem: Problem, lengths: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for steps in lengths:
        spectrum = hessian_spectrum(problem.module, problem.batches, loss, steps=steps, seed=SEED)
        low, high = spectrum.c_t_interval
        found = {
            "c_t": spectrum.c_t,
            "relative_bound": (high - low) / abs(spectrum.c_t),
            "lambda_min": spectrum.lambda_min,
            "lambda_max": spectrum.lambda_max,
            "loss": spectrum.loss,
            "steps": steps,
        }
        if found["relative_bound"] <= CERTAIN:
            break
    return found


def relative_error(c_t: float, truth: float) -> float:
    """Return the relative error of `c_t`."""
    return abs(c_t - truth) / abs(truth)


def steps_within(rule: tuple[NDArray[np.float64], NDArray[np.float64]], truth: float, tolerance: float) -> int | None:
    """Return the number of steps after which C_t of a run stays within `tolerance` of the true value; None: never."""
    matrix = tridiagonal(*rule)
    first = None
    for steps in range(1, len(matrix) + 1):
        values = np.linalg.eigvalsh(matrix[:steps, :steps])
        c_t = ratio(values[0], values[-1]) if values[-1] > 0 else -math.inf
        if relative_error(c_t, truth) > tolerance:
            first = None
        elif first is None:
            first = steps
    return first
