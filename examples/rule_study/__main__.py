"""Which checkpoint rule would have picked the best weights: many trainings on digits, judged at the end.

    python -m examples.rule_study --seeds 2 --epochs 12     # some minutes
    python -m examples.rule_study                           # 30 seeds: an hour or two on two cores

Every training is analyzed twelve times, and each rule picks one of these states afterwards. Finished trainings are not
repeated with the same settings, so that an interrupted run continues, also elsewhere: `--results` holds their picks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.rule_study import report
from examples.rule_study.picks import collect
from examples.rule_study.training import NETWORKS, POINTS, SCHEDULES, Training, run
from examples.shared import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rule_study"), help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="folder of the report (default: results, in --out)")
    parser.add_argument("--seeds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=36, help=f"a multiple of {POINTS} (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (default: %(default)s)")
    args = parser.parse_args()
    if args.epochs % POINTS:
        parser.error(f"--epochs {args.epochs} must be a multiple of {POINTS}.")
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.results or args.out / "results"
    trainings = [
        Training(network, schedule, seed, args.epochs)
        for seed in range(args.seeds)
        for network in NETWORKS
        for schedule in SCHEDULES
    ]
    if not args.report:
        done = {run for _, run in collect(trainings, list(report.METRICS), args.out, results / "picks.csv")}
        run_all(trainings, run, args.out, is_done=lambda training: training.name in done, jobs=args.jobs)
    print(f"Report: {report.write(trainings, args.out, results)}")


if __name__ == "__main__":
    main()
