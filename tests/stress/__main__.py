"""Run the matrix of faults, modules and trainers with the real Trainer, and print what came out.

    python -m tests.stress                               # everything but the soak, some minutes
    python -m tests.stress --only 'kill*' --kills 50
    python -m tests.stress --only soak --soak 1000
    python -m tests.stress --soak --out benchmarks/results/stress.md

Every case runs in a process and a folder of its own. The exit status is 1 if one is not as expected.
"""

import argparse
import sys
from pathlib import Path

from tests.stress.harness import Result, as_table, chosen, environment, run_all
from tests.stress.matrix import matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cases, with * and ?")
    parser.add_argument("--kills", type=int, default=20, help="runs killed, each way (default: %(default)s)")
    parser.add_argument("--soak", type=int, nargs="?", const=300, metavar="EPOCHS", help="soak as well (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()

    results: list[Result] = []
    for result in run_all(chosen(matrix(kills=args.kills, seed=args.seed, soak=args.soak), args.only)):
        results.append(result)
        print(f"{'ok ' if result.ok else 'BAD'} {result.name} ({result.seconds:.1f} s): {result.got}", flush=True)
    failed = sum(not result.ok for result in results)
    verdict = f"{len(results)} cases, {failed} not as expected."
    print(f"\n{as_table(results)}\n\n{verdict}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(document(results, verdict), encoding="utf-8")
    sys.exit(bool(failed or not results))


def document(results: list[Result], verdict: str) -> str:
    return (
        "# Stress\n\n"
        "What goes wrong, or is out of the ordinary, while a real Trainer runs with the callback (`make stress`). "
        "*Trained as without the callback* means: weights, buffers, optimizer states, logged metrics and random number "
        "generators are bit by bit those of the same run without it.\n\n"
        "All of it on a CPU: what a GPU does out of memory is simulated.\n\n"
        f"{environment()}\n\n{verdict}\n\n{as_table(results)}\n"
    )


if __name__ == "__main__":
    main()
