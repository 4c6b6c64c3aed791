"""Reproduce Gabdullin (2025, arXiv:2504.17618) on small networks and digits, and write a report.

    python -m examples.paper_hesd --quick                   # about ten minutes on two cores
    python -m examples.paper_hesd                           # ten seeds, more epochs and steps: over an hour
    python -m examples.paper_hesd --only 'vit-adamw-*'      # some experiments; the report shows what there is
    python -m examples.paper_hesd --train-folder cinic10/train --gen-folder cifar10/test --accelerator gpu \\
        --train-size 90000 --resnet-width 16 --resnet-blocks 3 --vit-width 384 --vit-depth 12 --vit-heads 6 \\
        --vit-patch 4 --epochs 1000 --points 20             # the paper's sizes

Experiments that are finished are not run again with the same settings, so that an interrupted run goes on. Changes of
the code, learning rates among them, are not settings: take another --out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from examples.paper_hesd import report
from examples.paper_hesd.outcomes import is_done, read
from examples.paper_hesd.settings import Setup, experiments
from examples.paper_hesd.training import run

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
    run_all(chosen, args.out, args.jobs)
    outcomes = read(every, args.out)
    missing = [experiment.name for experiment in every if experiment.name not in outcomes]
    print(f"Report: {report.write(outcomes, setup, seeds, missing, args.out)}")


def select(every: Sequence[Experiment], only: str | None) -> list[Experiment]:
    """Return the experiments of these names, and what they begin with."""
    patterns = (only or "*").split(",")
    chosen = [e for e in every if any(fnmatch(e.name, pattern) for pattern in patterns)]
    first = [e.pretrained for e in chosen if e.pretrained is not None and e.pretrained not in chosen]
    return [*dict.fromkeys(first), *chosen]


def run_all(chosen: Sequence[Experiment], out: Path, jobs: int) -> None:
    """Run the experiments that are not finished, so many at a time."""
    todo = [experiment for experiment in chosen if not is_done(out / experiment.folder)]
    print(f"{len(todo)} experiments to run, {len(chosen) - len(todo)} finished earlier", flush=True)
    if not todo:
        return
    started = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[float], Experiment] = {}
        # What others begin with goes first, and is waited for before these are handed out.
        for ready in (False, True):
            for experiment in todo:
                if (experiment.pretrained is not None) == ready:
                    futures[pool.submit(run, experiment, out)] = experiment
            wanted = {experiment.pretrained for experiment in todo}
            for future, experiment in futures.items():
                if experiment in wanted and not ready:
                    future.result()
        for number, future in enumerate(as_completed(futures), start=1):
            seconds = future.result()
            minutes = (time.perf_counter() - started) / 60
            print(f"[{minutes:5.1f} min] {number}/{len(todo)} {futures[future].name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
