"""Build the distributions, and use the wheel in a clean environment, outside of the repository.

    python -m tests.packaging.check_wheel                               # with the packages of this environment
    python -m tests.packaging.check_wheel --environments newest oldest  # with packages installed for it: minutes

"oldest" takes the lowest versions that pyproject.toml allows of what does not depend on torch's version. torch itself
is that of constraints.txt.
"""

import argparse
import os
import re
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELD = ("lightning", "torchmetrics", "tensorboard", "numpy")
USE = Path(__file__).with_name("use.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", choices=["this", "newest", "oldest"], default=["this"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
        files = sorted((folder / "dist").iterdir())
        run(sys.executable, "-m", "twine", "check", "--strict", *files)
        (wheel,) = (path for path in files if path.suffix == ".whl")
        for environment in args.environments:
            use(wheel, environment, folder / environment)
            print(f"{environment}: {wheel.name} works")


def use(wheel: Path, environment: str, folder: Path) -> None:
    """Install the wheel in a new environment, and use it from there."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if environment == "this":
        # Its packages are seen, its editable installation is not: .pth files count in a site folder only.
        (site_folder,) = folder.glob("lib/*/site-packages")
        (site_folder / "packages.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    else:
        pins = oldest() if environment == "oldest" else []
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cli]", pinned_torch(), *pins)
    run(python, USE, folder / "bin" / "lightning-hesd", cwd=folder)


def pinned_torch() -> str:
    """Return torch as constraints.txt has it."""
    return next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def oldest() -> list[str]:
    """Return the lowest versions that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {name: re.search(rf'"{name}>=([\d.]+)"', text) for name in HELD}
    return [f"{name}=={match[1]}.*" for name, match in found.items() if match]


def run(*command: object, cwd: Path | None = None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    main()
