"""Measure how the loss settles with the sample size, by width and depth, as in section 5 of the paper.

    python -m examples.sample_study --quick      # about a minute
    python -m examples.sample_study              # 280 networks: 10 to 15 minutes on two cores

Finished runs are not repeated with the same settings, so an interrupted study continues. After changes of the code, use
another --out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from examples.sample_study import outcomes, report
from examples.sample_study.data import load
from examples.sample_study.measuring import run
from examples.sample_study.settings import FEATURES, QUICK, Study
from examples.shared import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="settings for about a minute")
    parser.add_argument("--out", type=Path, default=Path("runs/sample_study"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="number of seeds, at least 2")
    parser.add_argument("--epochs", type=int, help="epochs of every training")
    args = parser.parse_args()
    study = QUICK if args.quick else Study()
    setup = replace(study.setup, epochs=args.epochs or study.setup.epochs)
    study = replace(study, seeds=args.seeds or study.seeds, setup=setup)

    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more threads do not speed up small networks, and slow them down on shared cores
    load(FEATURES, study.setup, args.out)  # trains the extractor once, before the runs use it
    run_all(study.runs(), run, args.out, is_done=lambda s: (args.out / s.file).is_file(), jobs=args.jobs)
    print(f"Report: {report.write(outcomes.read(study, args.out), args.out)}")


if __name__ == "__main__":
    main()
