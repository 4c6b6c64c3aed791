"""Compare lightning_hesd with its peers, and write the report.

    python -m benchmarks                      # everything, about 50 minutes on two quiet cores
    python -m benchmarks --quick --problems mlp --out /tmp/bench
    python -m benchmarks --more --rounds 2    # adds two rounds of whole runs to existing results

Whole runs are repeated in rounds, at least once and as long as `--minutes` allow. A round runs all candidates in turn,
so that other load on the machine affects all of them. The report has the medians. Weights and true values are cached in
`benchmarks/.cache`; computing them once takes some more minutes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.figure import draw
from benchmarks.isolation import MeasurementError, in_fresh_process
from benchmarks.measure import CANDIDATES, products, whole
from benchmarks.problems import RECIPES, load
from benchmarks.profile import profile
from benchmarks.report import document, title
from benchmarks.truth import true_c_t

if TYPE_CHECKING:
    from benchmarks.problems import Size

PRODUCT_ROUNDS = {"full": 9, "quick": 2}
PACKAGES = ["hessian-eigenthings", "curvlinops-for-pytorch", "lightning-hesd"]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(RECIPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--pieces", default="1,8", help="numbers of batches (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="whole runs of each candidate, at most")
    parser.add_argument("--minutes", type=float, default=25.0, help="start no whole run that would end later")
    parser.add_argument("--more", action="store_true", help="add rounds to the results in --out; products stay")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    size: Size = "quick" if args.quick else "full"

    chosen = [(name, int(pieces)) for name in args.problems.split(",") for pieces in args.pieces.split(",")]
    started = time.perf_counter()
    results = earlier(args.out, size) if args.more else fresh(chosen, size, started)
    entries = [entry for entry in results["entries"] if (entry["problem"], entry["pieces"]) in chosen]
    for entry in entries:
        entry["profile"] = in_fresh_process(profile, entry["problem"], entry["pieces"], size)
    write(results, args.out)
    costs = [0.0] * len(entries)  # seconds that the last round of an entry took
    for number in range(args.rounds):
        for index, entry in enumerate(entries):
            begun = time.perf_counter()
            if number and begun - started + costs[index] > 60 * args.minutes:
                continue
            say(started, f"{title(entry)}: whole runs, round {number + 1}")
            play_round(entry, size)
            costs[index] = time.perf_counter() - begun
            write(results, args.out)
    say(started, f"done: {args.out / 'results.md'}")


def fresh(chosen: list[tuple[str, int]], size: Size, started: float) -> dict[str, Any]:
    """Measure the HVPs, and return new results."""
    entries = [prepared(name, pieces, size) for name, pieces in chosen]
    for entry in entries:
        say(started, f"{title(entry)}: products")
        entry["products"] = in_fresh_process(products, entry["problem"], entry["pieces"], size, PRODUCT_ROUNDS[size])
    return {"environment": environment(), "size": size, "entries": entries}


def earlier(out: Path, size: Size) -> dict[str, Any]:
    """Return the results in a folder, which must have been measured in this environment.

    Raises:
        SystemExit: If there are no results, or their environment was another one.
    """
    path = out / "results.json"
    if not path.is_file():
        sys.exit(f"--more: there is no {path}; run without --more first.")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = ({**e, "date": None} for e in (environment(), results["environment"]))
    if (ours, size) != (theirs, results["size"]):
        sys.exit(f"--more: {path} was measured with {theirs}, size {results['size']}; here are {ours}, size {size}.")
    return results


def prepared(name: str, pieces: int, size: Size) -> dict[str, Any]:
    """Return a new entry of the results, with the true C_t."""
    print(f"{name}: weights and truth", flush=True)
    truth = in_fresh_process(true_c_t, name, size)
    problem = load(name, pieces=pieces, size=size)
    description = {"problem": name, "pieces": pieces, "parameters": problem.dimension, "samples": problem.samples}
    return {**description, "truth": truth, "products": {}, "whole": {}}


def play_round(entry: dict[str, Any], size: Size) -> None:
    """Make one whole run of every candidate, and add the results to the entry."""
    for name, candidate in CANDIDATES.items():
        if candidate.density is None or entry["products"].get(name, {}).get("failure"):
            continue
        try:
            result = in_fresh_process(whole, entry["problem"], entry["pieces"], size, name, entry["truth"]["c_t"])
        except MeasurementError as error:
            result = {"failure": str(error)}
        entry["whole"].setdefault(name, []).append(result)
        line = result.get("failure") or "C_t {c_t:.5f}, {c_t_products} products, {c_t_seconds:.2f} s".format(**result)
        print(f"    {name}: {line}", flush=True)


def environment() -> dict[str, Any]:
    """Return versions, threads and date."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,  # includes the build, which the metadata may lack
        **versions,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}",
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(results: dict[str, Any], out: Path) -> None:
    """Write the raw numbers, the report and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (out / "results.md").write_text(document(results), encoding="utf-8")
    draw(results["entries"], out / "results.png")


def say(started: float, what: str) -> None:
    """Print progress."""
    print(f"[{(time.perf_counter() - started) / 60:5.1f} min] {what}", flush=True)


if __name__ == "__main__":
    main()
