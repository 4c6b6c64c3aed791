"""Reproduce Gabdullin (2025, arXiv:2504.17618) on small networks and digits, and write a report.

    python -m examples.paper_hesd --quick                   # about ten minutes on two cores
    python -m examples.paper_hesd                           # ten seeds, more epochs and steps: over an hour
    python -m examples.paper_hesd --only 'vit-adamw-*'      # some experiments; the report shows those that are there
    python -m examples.paper_hesd --train-folder cinic10/train --gen-folder cifar10/test --accelerator gpu \\
        --train-size 90000 --resnet-width 16 --resnet-blocks 3 --vit-width 384 --vit-depth 12 --vit-heads 6 \\
        --vit-patch 4 --epochs 1000 --points 20             # the paper's sizes

Finished experiments are not repeated with the same settings, so an interrupted run continues. After changes of the
code, including learning rates, use another --out.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from examples.paper_hesd import report
from examples.paper_hesd.outcomes import is_done, read
from examples.paper_hesd.settings import Setup, experiments
from examples.paper_hesd.training import run
from examples.shared import run_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from examples.paper_hesd.settings import Experiment

QUICK_SEEDS, SEEDS = 3, 10
LONG = {"epochs": 160, "points": 8, "steps": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="settings for about ten minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/paper_hesd"), help="default: %(default)s")
    parser.add_argument("--only", help="names of experiments, comma-separated, * allowed")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help=f"default: {QUICK_SEEDS} with --quick, else {SEEDS}")
    for field in fields(Setup):
        kind = int if isinstance(field.default, int) else str
        default = f"{LONG[field.name]}, --quick: {field.default}" if field.name in LONG else field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, help=f"{field.metadata['help']} (default: {default})"
        )
    args = parser.parse_args()
    given = {field.name: value for field in fields(Setup) if (value := getattr(args, field.name)) is not None}
    setup = replace(Setup(), **({} if args.quick else LONG) | given)
    if setup.epochs % setup.points:
        parser.error(f"--epochs {setup.epochs} must be a multiple of --points {setup.points}.")
    if (setup.train_folder is None) != (setup.gen_folder is None):
        parser.error("--train-folder and --gen-folder need each other.")
    seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)

    every = experiments(setup, seeds)
    chosen = select(every, args.only)
    if not chosen:
        parser.error(f"--only {args.only} is none of {', '.join(experiment.name for experiment in every)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = {experiment.pretrained for experiment in chosen}
    first = [experiment for experiment in chosen if experiment in wanted]  # others start from their weights
    for group in (first, [experiment for experiment in chosen if experiment not in wanted]):
        run_all(group, run, args.out, is_done=lambda e: is_done(args.out / e.folder), jobs=args.jobs)
    outcomes = read(every, args.out)
    missing = [experiment.name for experiment in every if experiment.name not in outcomes]
    print(f"Report: {report.write(outcomes, setup, seeds, missing, args.out)}")


def select(every: Sequence[Experiment], only: str | None) -> list[Experiment]:
    """Return the experiments of these names, and those whose weights they start from."""
    patterns = (only or "*").split(",")
    chosen = [e for e in every if any(fnmatch(e.name, pattern) for pattern in patterns)]
    first = [e.pretrained for e in chosen if e.pretrained is not None and e.pretrained not in chosen]
    return [*dict.fromkeys(first), *chosen]


if __name__ == "__main__":
    main()
