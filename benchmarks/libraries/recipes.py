"""Run the recipes of the page "Works with" in the environments of their libraries, and write their outputs below them.

A recipe is a code block with the registry's name of a library as its title, or a plain Python block that needs only
this package. Its printed lines replace the block titled "Output" that follows it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.libraries.environments import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAGE = ROOT / "docs" / "works-with.md"

RECIPE = re.compile(
    r'```(?:py title="(?P<library>[^"]+)"|python)\n(?P<code>.*?)```\n\n```text title="Output"\n(?P<output>.*?)```',
    re.DOTALL,
)

PROGRAM = """\
import json, sys, torch
torch.set_num_threads(1)
shown = []
code = compile(open(sys.argv[1], encoding="utf-8").read(), "recipe.py", "exec")
exec(code, {"__name__": "recipe", "print": lambda *values: shown.append(" ".join(map(str, values)))})
open(sys.argv[2], "w", encoding="utf-8").write(json.dumps(shown))
"""
"""A program that collects the lines that the recipe prints, without those of libraries."""


def invalidate(page: Path, pythons: Mapping[str | None, Callable[[], Path]]) -> None:
    """Run the recipes of a page, and write each output below its recipe as soon as it has run.

    Args:
        page: The page.
        pythons: For each library, and for None, a function that returns the interpreter; without one, the output stays
            as it is.

    Raises:
        RuntimeError: If recipes fail; the outputs of the others are still written.
    """
    failures = []
    for recipe in RECIPE.finditer(page.read_text(encoding="utf-8")):
        if recipe["library"] not in pythons:
            continue
        try:
            output = run(pythons[recipe["library"]](), recipe["code"])
        except RuntimeError as error:
            failures.append(str(error))
            continue
        before = recipe[0][: recipe.start("output") - recipe.start()]
        text = page.read_text(encoding="utf-8").replace(recipe[0], f"{before}{output}\n```")
        page.write_text(text, encoding="utf-8")
    if failures:
        raise RuntimeError("\n\n".join(failures))


def run(python: Path, code: str) -> str:
    """Run a recipe in a new folder, and return its printed lines, with paths relative to that folder.

    Args:
        python: The interpreter.
        code: The recipe.

    Raises:
        RuntimeError: If it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
        (folder / "recipe.py").write_text(code, encoding="utf-8")
        done = subprocess.run(  # noqa: S603 - the recipes of this repository
            [str(python), "program.py", "recipe.py", "shown.json"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            msg = f"expected the recipe to run, but it failed:\n{code}\n{done.stderr[-2000:]}"
            raise RuntimeError(msg)
        shown = json.loads((folder / "shown.json").read_text(encoding="utf-8"))
        return "\n".join(shown).replace(f"{folder}/", "")
