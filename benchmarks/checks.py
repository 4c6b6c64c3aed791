"""Cost of verification: the symmetry in every step, and the comparison of the loss with its derivatives, once.

python -m benchmarks.checks            # about five minutes on two quiet cores
python -m benchmarks.checks --quick --problems mlp --out /tmp/bench
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.problems import RECIPES, load, loss
from benchmarks.tables import tabulate
from lightning_hesd.numerics.analysis import preparation
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.krylov import lanczos
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.problems import Problem, Size

EXPLANATION = """\
Analyses of {steps} steps, one batch, two CPU threads, medians of {rounds} rounds. *In every
analysis*: the share of time for the norms of asymmetric components and for listing the operations of the graphs. *In
the first*: the time to compare the loss with its derivatives in float64, once in a run, in seconds and as a multiple of
an analysis.
"""
HEADER = ("problem", "parameters", "analysis, s", "in every analysis", "in the first, s", "in the first, analyses")


class Stopwatch:
    """Adds up the time that functions take.

    Attributes:
        seconds: Sum so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Any) -> Any:
        """Return the function with its time added to `seconds`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def main() -> None:
    """Measure, and write the table."""
    tabulate("Checks", HEADER, measure, description=__doc__, explanation=EXPLANATION, rounds=5)


def measure(name: str, steps: int, rounds: int, size: Size) -> list[str]:
    """Return the row of a problem."""
    problem = load(name, size=size)
    firsts, laters, shares = [], [], []
    for _ in range(rounds):
        cache = AnalysisCache()
        with watched(preparation, "check_derivatives") as comparison:
            analysis(problem, steps, cache)
        firsts.append(comparison.seconds)
        with watched(GraphFacts, "add") as reading, watched(lanczos, "asymmetry") as norms:
            laters.append(analysis(problem, steps, cache))
        shares.append((reading.seconds + norms.seconds) / laters[-1])
    first, later, share = (statistics.median(values) for values in (firsts, laters, shares))
    return [RECIPES[name].title, f"{problem.dimension:,}", f"{later:.2f}", f"{100 * share:.2g}%", f"{first:.2f}",
            f"{first / later:.2f}"]  # fmt: skip


@contextlib.contextmanager
def watched(owner: Any, name: str) -> Iterator[Stopwatch]:
    """Time a function of a module or class within the context.

    Yields:
        The time it took.
    """
    stopwatch = Stopwatch()
    with mock.patch.object(owner, name, stopwatch.timed(getattr(owner, name))):
        yield stopwatch


def analysis(problem: Problem, steps: int, cache: AnalysisCache) -> float:
    """Return the seconds of an analysis, given the cache of earlier ones."""
    batches = [WeightedBatch(batch, float(len(batch[0])), index) for index, batch in enumerate(problem.batches)]
    started = time.perf_counter()
    analyze(problem.module, batches, loss, analysis_options(steps=steps), cache=cache)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
