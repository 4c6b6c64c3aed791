"""Train models of other libraries without and with the callback, check the spectra, and write the table.

python -m benchmarks.libraries                  # all, and the recipes of docs/works-with.md: an hour, 1.5 GB for each
python -m benchmarks.libraries darts scvi       # these, and their recipes; other rows stay
python -m benchmarks.libraries --recipes        # the recipes only
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import benchmarks.libraries
from benchmarks.libraries.environments import ROOT, environment, version
from benchmarks.libraries.recipes import PAGE, invalidate
from benchmarks.libraries.report import Tried, document, from_plain, rows_of
from benchmarks.libraries.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.libraries.case import Library


def main() -> None:
    """Try libraries, and write the table of all libraries tried so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="modules of libraries; default: all")
    parser.add_argument("--recipes", action="store_true", help="run the recipes of the documentation only")
    parser.add_argument("--environments", type=Path, default=ROOT / "benchmarks" / ".cache" / "libraries")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    known = libraries()
    if unknown := set(args.names) - known.keys():
        parser.error(f"no such libraries: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = args.names or list(known)
    environments = args.environments.resolve()
    for name in [] if args.recipes else names:
        one = attempt(name, known[name], environments)
        print(*rows_of(one), sep="\n", flush=True)
        write(one, args.out)
    pythons: dict[str | None, Callable[[], Path]] = {
        known[name].name: partial(environment, known[name], environments) for name in names
    }
    pythons[None] = lambda: Path(sys.executable)
    invalidate(PAGE, pythons)


def write(tried: Tried, folder: Path) -> None:
    """Replace the results of a library, and write the table of all libraries."""
    kept = folder / "libraries.json"
    found = {one.name: one for one in map(from_plain, json.loads(kept.read_text("utf-8")))} if kept.exists() else {}
    found[tried.name] = tried
    every = sorted(found.values(), key=lambda one: one.name.lower())
    kept.write_text(json.dumps([asdict(one) for one in every], indent=1) + "\n", encoding="utf-8")
    (folder / "libraries.md").write_text(document(every), encoding="utf-8")


def libraries() -> dict[str, Library]:
    """Return the libraries, by the names of their modules."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.libraries.__path__))
    modules = {name: importlib.import_module(f"benchmarks.libraries.{name}") for name in names if name != "__main__"}
    return {name: module.LIBRARY for name, module in modules.items() if hasattr(module, "LIBRARY")}


def attempt(name: str, library: Library, environments: Path) -> Tried:
    """Try a library in its own environment and a new process."""
    python = environment(library, environments)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        subprocess.run(  # noqa: S603 - a module of this package
            [str(python), "-m", "benchmarks.libraries.run", name, "--out", str(out)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
            check=False,
            capture_output=True,
        )
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    packages = [library.name, *library.shown, "torch", "lightning"]
    return Tried(
        library.name,
        library.kind,
        str(dt.datetime.now(tz=dt.timezone.utc).date()),
        {"Python": platform.python_version(), **{package: version(python, package) for package in packages}},
        [Outcome(**outcome) for outcome in found],
    )


if __name__ == "__main__":
    main()
