"""Cost of the spectra of all layers, compared with the spectrum of the whole network at equal steps.

python -m benchmarks.layers            # about ten minutes on two quiet cores
python -m benchmarks.layers --quick --problems mlp --out /tmp/bench
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.problems import RECIPES, load, loss
from benchmarks.tables import tabulate
from lightning_hesd import hessian_spectrum, layer_spectra

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.problems import Problem, Size

EXPLANATION = """\
Seconds of `hessian_spectrum` and of `layer_spectra(layers="auto")` with {steps} steps each, one
batch, two CPU threads, medians of {rounds} alternating rounds. If each block cost as much as the whole network, the
ratio would be the number of blocks. A step of a block differentiates the gradient's graph from that block to the loss
and back, so late blocks are cheap, and an early block costs as much as all blocks above it.
"""
HEADER = ("problem", "parameters", "blocks", "whole, s", "all blocks, s", "ratio", "ratio per block")


def main() -> None:
    """Measure, and write the table."""
    tabulate("Layers", HEADER, measure, description=__doc__, explanation=EXPLANATION, rounds=3)


def measure(name: str, steps: int, rounds: int, size: Size) -> list[str]:
    """Return the row of a problem."""
    problem = load(name, size=size)
    wholes, blocks = [], []
    for _ in range(rounds):
        seconds, _ = timed(hessian_spectrum, problem, steps)
        wholes.append(seconds)
        seconds, spectra = timed(layer_spectra, problem, steps)
        blocks.append(seconds)
    whole, layers = statistics.median(wholes), statistics.median(blocks)
    ratio = layers / whole
    return [RECIPES[name].title, f"{problem.dimension:,}", str(len(spectra)), f"{whole:.2f}", f"{layers:.2f}",
            f"{ratio:.1f}", f"{ratio / len(spectra):.2f}"]  # fmt: skip


def timed(work: Callable[..., Any], problem: Problem, steps: int) -> tuple[float, Any]:
    """Return the seconds of an analysis, and its result."""
    started = time.perf_counter()
    result = work(problem.module, problem.batches, loss, steps=steps)
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
