"""Test whether spectra of layer-wise Hessians correlate with overfitting, under-parameterization and expressivity.

    python -m examples.layer_study --quick      # a minute or two: three data sets, few networks
    python -m examples.layer_study              # seven data sets, 378 networks: about 18 minutes on two cores

Finished runs are not repeated with the same settings, so an interrupted study continues. After changes of the code, use
another --out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from examples.layer_study import report
from examples.layer_study.data import NAMES
from examples.layer_study.outcomes import is_done, read
from examples.layer_study.settings import QUICK, Study
from examples.layer_study.training import run
from examples.layer_study.words import sample
from examples.shared import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="settings for a minute or two")
    parser.add_argument("--out", type=Path, default=Path("runs/layer_study"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--datasets", nargs="+", choices=NAMES, help="default: all, --quick: some")
    parser.add_argument("--widths", nargs="+", type=int, help="units of the hidden layers")
    parser.add_argument("--depths", nargs="+", type=int, help="numbers of hidden layers")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--epochs", type=int, help="an even number")
    args = parser.parse_args()
    study = QUICK if args.quick else Study()
    given = {name: tuple(value) for name in ("datasets", "widths", "depths") if (value := getattr(args, name))}
    study = replace(study, **given, seeds=args.seeds or study.seeds)  # type: ignore[arg-type]  # mypy sees one type
    if args.epochs:
        study = replace(study, setup=replace(study.setup, epochs=args.epochs))
    if study.setup.epochs % 2:
        parser.error(f"--epochs must be even, got {study.setup.epochs}.")

    args.out.mkdir(parents=True, exist_ok=True)
    run_all(study.runs(), run, args.out, is_done=lambda s: is_done(args.out / s.folder), jobs=args.jobs)
    data = sample(study, [read(settings, args.out) for settings in study.runs()])
    print(f"Report: {report.write(data, args.out)}")


if __name__ == "__main__":
    main()
