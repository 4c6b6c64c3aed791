"""What the site needs beyond the pages in `docs`: pages from elsewhere, their links, and formulas as MathML.

Results, the changelog and the guide for contributors become pages of the site, and links to modules become links to the
reference. Formulas are in LaTeX between dollar signs, which GitHub shows, too; browsers show MathML without any script.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "benchmarks/results/*",
    "examples/*/results/*",
    "examples/lightning_cli/*",
    "examples/notebook/*",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
LINK = re.compile(r"\]\(((?!\w+:)[^)#\s]+)")
BAR = re.compile(r"(?<!\\left)(?<!\\right)\\([lr])[vV]ert")
SIDES = {"l": r"\left", "r": r"\right"}
"""What bars need before them: MathML would put spaces around them, as around operators."""
MATH = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the files outside `docs` that pages link to."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.suffix in {".ipynb", ".md", ".png", ".py", ".yaml"}:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links within the site."""
    here = posixpath.dirname(page.file.src_uri)
    folder = Path(page.file.abs_src_path).parent

    def inside(match: re.Match[str]) -> str:
        path = (folder / match[1]).resolve()
        if not path.is_file():
            return match[0]
        target = path.relative_to(ROOT).as_posix()
        if target.startswith("lightning_hesd/"):
            return f"][{target.removesuffix('.py').replace('/', '.')}"
        return f"]({posixpath.relpath(target.removeprefix('docs/'), here or '.')}"

    return re.sub(r"(\]\[[\w.]+)\)", r"\1]", LINK.sub(inside, markdown))


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turn formulas into MathML."""

    def typeset(match: re.Match[str]) -> str:
        formula = BAR.sub(lambda bar: SIDES[bar[1]] + bar[0], html.unescape(match[2]).strip())
        found: str = convert(formula, display="block" if match[1] == "div" else "inline")
        if "\\" in found:
            msg = f"{page.file.src_uri}: latex2mathml does not know a command in {formula!r}; use another one."
            raise PluginError(msg)
        return found

    return MATH.sub(typeset, content)
