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
from lightning_hesd.numerics.inputs.blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.problems import Problem, Size

TOLERANCE = 0.05
MOST_STEPS = 100
EXPLANATION = f"""\
CPU seconds of `hessian_spectrum` and of `layer_spectra(layers="auto")` with {{steps}} steps each, one batch, two
threads, medians of {{rounds}} alternating rounds; and the ratio, which would be the number of blocks if each cost as
much as the whole network. The last column is the ratio where C_t of the network and that of every block are known to
{TOLERANCE:.0%} (`tolerance={TOLERANCE}`, up to {MOST_STEPS} steps): each stops when it is.
"""
HEADER = (
    "problem",
    "parameters",
    "blocks",
    "whole, s",
    "all blocks, s",
    "ratio",
    "ratio per block",
    "at equal accuracy",
)


def main() -> None:
    """Measure, and write the table."""
    tabulate("Layers", HEADER, measure, description=__doc__, explanation=EXPLANATION, rounds=3)


def measure(name: str, steps: int, rounds: int, size: Size) -> list[str]:
    """Return the row of a problem."""
    problem = load(name, size=size)
    seconds: dict[str, list[float]] = {"whole": [], "blocks": [], "accurate whole": [], "accurate blocks": []}
    most_steps = max(steps, MOST_STEPS if size == "full" else 0)
    for _ in range(rounds):
        seconds["whole"].append(timed(hessian_spectrum, problem, steps=steps))
        seconds["blocks"].append(timed(layer_spectra, problem, steps=steps))
        accurate = {"steps": most_steps, "tolerance": TOLERANCE}
        seconds["accurate whole"].append(timed(hessian_spectrum, problem, **accurate))
        seconds["accurate blocks"].append(timed(layer_spectra, problem, **accurate))
    whole, layers, accurate_whole, accurate_layers = (statistics.median(values) for values in seconds.values())
    ratio, count = layers / whole, len(blocks(problem.module, "auto", dict(problem.module.named_parameters())))
    return [RECIPES[name].title, f"{problem.dimension:,}", str(count), f"{whole:.2f}", f"{layers:.2f}",
            f"{ratio:.1f}", f"{ratio / count:.2f}", f"{accurate_layers / accurate_whole:.1f}"]  # fmt: skip


def timed(work: Callable[..., Any], problem: Problem, **options: Any) -> float:
    """Return the CPU seconds of an analysis."""
    started = time.process_time()
    work(problem.module, problem.batches, loss, **options)
    return time.process_time() - started


if __name__ == "__main__":
    main()
