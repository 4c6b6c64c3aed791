"""Run a part of the tests in clean environments: interpreters, and the oldest and newest versions that are supported.

    python -m tests.packaging.check_matrix                  # every interpreter that is there: many minutes
    python -m tests.packaging.check_matrix --pythons 3.11
    python -m tests.packaging.check_matrix --torch torch==2.13.0+cpu  # this build or none

Prints a table. "oldest" and "newest" are as in `check_wheel`.
"""

import argparse
import datetime as dt
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.packaging.check_wheel import HELD, ROOT, oldest, pinned_torch, run

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TESTS = [
    *("test_accuracy", "checkpoints/test_checkpoint", "test_generalization", "test_history", "test_layers"),
    *("test_progress", "test_loggers", "test_resume", "test_schedule", "checkpoints/test_selection"),
    "isolation/test_training_untouched",
]
"""In tests/training: what touches Lightning, TorchMetrics, TensorBoard and NumPy most."""

OLD_RICH = "rich<14.1"
"""With later ones the Rich bar of Lightning 2.4 cannot be shown, whatever the callbacks."""

TOOLS = ("hypothesis", "pandas", "pytest", "pytest-timeout", "pytest-xdist", "rich", "scikit-learn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS))
    parser.add_argument("--environments", nargs="+", choices=["newest", "oldest"], default=["newest", "oldest"])
    parser.add_argument("--torch", default=pinned_torch(), help="the requirement; default: as in constraints.txt")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    lines = ["| Python | environment | tests | " + " | ".join(HELD) + " | torch |", "| --- " * (len(HELD) + 4) + "|"]
    for version in args.pythons:
        for environment in args.environments:
            found, outcome = tried(version, environment, args.torch)
            cells = [version, environment, outcome, *(found.get(name, "") for name in (*HELD, "torch"))]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    if args.out is not None:
        args.out.write_text(page(lines), encoding="utf-8")


def page(lines: list[str]) -> str:
    """Return the page with the table."""
    tests = ", ".join(f"`{name}`" for name in TESTS)
    head = f"""\
# Versions it was tried with

Made by `make matrix` on {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}: clean environments with the oldest
and the newest versions that could be installed, and in each these files of `tests/training`:
{tests}. Types are checked for the oldest Python in any case.
"""
    return "\n".join([head, *lines, ""])


def tried(version: str, environment: str, torch: str) -> tuple[dict[str, str], str]:
    """Return the versions installed, and how the tests ended, in words."""
    interpreter = find_python(version)
    if interpreter is None:
        return {}, "no interpreter"
    with tempfile.TemporaryDirectory() as name:
        python = Path(name) / "bin" / "python"
        pins = [*oldest(), OLD_RICH] if environment == "oldest" else []
        run(interpreter, "-m", "venv", name)
        problem = f"no {torch} for it"
        try:
            run(python, "-m", "pip", "install", "--quiet", torch)
            problem = "cannot be installed"
            run(python, "-m", "pip", "install", "--quiet", f"{ROOT}[cli]", *TOOLS, torch, *pins)
        except subprocess.CalledProcessError:
            return {}, problem
        # Other versions warn of other things. With "default" some would be shown once only, and missed later.
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "always", "--no-header"]
        files = [ROOT / "tests" / "training" / f"{test}.py" for test in TESTS]
        done = subprocess.run(
            [str(part) for part in (*command, *files)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
        summary = re.sub(r" in .*|=|, \d+ warnings?", "", done.stdout.strip().splitlines()[-1]).strip()
        return installed(python), summary


def find_python(version: str) -> str | None:
    """Return an interpreter of this version; shims of pyenv are there for versions that are not."""
    versions = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, versions)):
        works = [candidate, "-c", "import venv"]
        if candidate and subprocess.run(works, capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def installed(python: Path) -> dict[str, str]:
    """Return the versions of what the table shows."""
    code = "import importlib.metadata as m, sys; print(*(m.version(name) for name in sys.argv[1:]))"
    names = (*HELD, "torch")
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


if __name__ == "__main__":
    main()
