"""A virtual environment for each library, with its requirements and this package."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.libraries.case import Library

ROOT = Path(__file__).resolve().parents[2]

COMMON = ("torch==2.13.0", "lightning==2.6.6", "scipy")
"""Installed in every environment."""

KEPT_OUT = ("torchvision==0", "torchaudio==0")
"""Constraints that no version meets: builds of these that do not fit torch would break it.

Packages that require one of them belong in `Library.without_dependencies`.
"""


def environment(library: Library, folder: Path) -> Path:
    """Return the interpreter of a library's environment, and make the environment if it does not exist.

    Args:
        library: The library.
        folder: Folder of the environments.
    """
    home = folder / library.name
    python, made = home / "bin" / "python", home / "made.txt"
    wanted = "\n".join([*COMMON, *library.requirements, *library.without_dependencies, str(ROOT)])
    if made.exists() and made.read_text(encoding="utf-8") == wanted:
        return python
    venv.create(home, with_pip=True, clear=True)
    constraints = home / "constraints.txt"
    constraints.write_text("\n".join([*COMMON[:2], *KEPT_OUT]), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run(  # noqa: S603 - of names in this package
        [*pip, "--constraint", str(constraints), *COMMON, *library.requirements, "--editable", str(ROOT)],
        check=True,
    )
    if library.without_dependencies:
        subprocess.run([*pip, "--no-deps", *library.without_dependencies], check=True)  # noqa: S603
    made.write_text(wanted, encoding="utf-8")
    return python


def version(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    program = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True)  # noqa: S603
    return found.stdout.strip()


if sys.platform == "win32":
    msg = "the environments are laid out as on Linux and macOS: use one of them."
    raise RuntimeError(msg)
