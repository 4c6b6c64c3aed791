"""Time of the parts of an analysis."""

from __future__ import annotations

import cProfile
import pstats
import time
from typing import TYPE_CHECKING, Any

from benchmarks.candidates import OURS, attention
from benchmarks.problems import load
from lightning_hesd.numerics.analysis.estimation import Estimation
from lightning_hesd.numerics.analysis.ritz_vectors import layers_of_runs
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.operators.risk_operator import RiskOperator
from lightning_hesd.numerics.operators.self_checks import check_derivatives

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.problems import Size

PARTS: dict[str, list[Callable[..., Any]]] = {
    "products": [RiskOperator.product],
    "Lanczos": [Lanczos.update],
    "interval": [Estimation._is_accurate],  # noqa: SLF001
    "graphs": [RiskOperator.__init__],
    "verification": [check_derivatives],
    "layers": [layers_of_runs],
}
"""Functions that do not call each other, by the name of the part."""


def profile(name: str, pieces: int, size: Size) -> dict[str, Any]:
    """Return the seconds that our estimate of C_t takes, and those of its parts."""
    problem = load(name, pieces=pieces, size=size)
    assert OURS.c_t is not None  # noqa: S101 - for the type checker
    profiler = cProfile.Profile()
    with attention(fused=OURS.fused):
        OURS.c_t(problem, 0)
        started = time.perf_counter()
        run = profiler.runcall(OURS.c_t, problem, 0)
        seconds = time.perf_counter() - started  # the profiler assigns some of the time to no function
    stats: Any = pstats.Stats(profiler)
    cumulative = {key: entry[3] for key, entry in stats.stats.items()}
    parts = {part: sum(cumulative.get(_key(f), 0.0) for f in functions) for part, functions in PARTS.items()}
    return {"seconds": seconds, "products": run.products, "parts": parts}


def _key(function: Callable[..., Any]) -> tuple[str, int, str]:
    code = function.__code__
    return code.co_filename, code.co_firstlineno, code.co_name
