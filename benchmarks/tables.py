"""The shared command line of benchmarks that write one row of a table for each problem."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.problems import RECIPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.problems import Size

    Measure = Callable[[str, int, int, Size], list[str]]


def tabulate(
    title: str, header: Sequence[str], measure: Measure, *, description: str | None, explanation: str, rounds: int
) -> None:
    """Measure the problems that the arguments name, and write the table.

    Args:
        title: Heading of the page, and in lower case the name of its file.
        header: Names of the columns.
        measure: Returns the row of a problem, given its name, the steps, the rounds and the size.
        description: Text of `--help`.
        explanation: Meaning of the columns, with `{steps}` and `{rounds}` for these numbers.
        rounds: Default number of repetitions.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(RECIPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows: list[list[str]] = []
    for name in args.problems.split(","):
        rows.append(measure(name, args.steps, args.rounds, "quick" if args.quick else "full"))
        print(*rows[-1], sep=", ", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    args.out.mkdir(parents=True, exist_ok=True)
    text = f"# {title}\n\n{explanation.format(steps=args.steps, rounds=args.rounds)}\n{table}\n"
    (args.out / f"{title.lower()}.md").write_text(text, encoding="utf-8")
