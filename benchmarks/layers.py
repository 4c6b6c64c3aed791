"""What the spectra of all layers cost, beside one of the whole network at equal steps.

python -m benchmarks.layers            # about ten minutes on two quiet cores
python -m benchmarks.layers --quick --problems mlp --out /tmp/bench
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.problems import RECIPES, load, loss
from lightning_hesd import hessian_spectrum, layer_spectra

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.problems import Problem, Size

EXPLANATION = """\
Seconds of `hessian_spectrum` and of `layer_spectra(layers="auto")` with {steps} steps each, one batch, two CPU
threads, medians of {rounds} rounds in turn; and the ratio, which would be the number of blocks if each were analysed as
the whole network is. A step of a block differentiates the gradient's graph from that block to the loss and back, so
that late blocks are cheap and early ones cost what those above them do.
"""
HEADER = ("problem", "parameters", "blocks", "whole, s", "all blocks, s", "ratio", "ratio per block")


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(RECIPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see whether it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows: list[list[str]] = []
    for name in args.problems.split(","):
        rows.append(measure(name, args.steps, args.rounds, "quick" if args.quick else "full"))
        print(*rows[-1], sep=", ", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows))
    args.out.mkdir(parents=True, exist_ok=True)
    text = f"# Layers\n\n{EXPLANATION.format(steps=args.steps, rounds=args.rounds)}\n{table}\n"
    (args.out / "layers.md").write_text(text, encoding="utf-8")


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
    """Return the seconds that an analysis takes, and its result."""
    started = time.perf_counter()
    result = work(problem.module, problem.batches, loss, steps=steps)
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
