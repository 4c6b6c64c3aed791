"""Make links of pages to files outside `docs` work on the site, too.

Results become pages of the site, and links to modules become links to the reference.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/results", "examples/*/results", "examples/lightning_cli", "examples/notebook")
LINK = re.compile(r"\]\(((?:\.\./)+[^)#]+)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the files outside `docs` that pages link to."""
    for pattern in OUTSIDE:
        for path in sorted(p for folder in ROOT.glob(pattern) for p in folder.iterdir()):
            if path.suffix in {".ipynb", ".md", ".png", ".py", ".yaml"}:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that leave the folder into links within the site."""
    here = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[1]))
        if target.startswith("docs/"):
            return match[0]
        if target.startswith("lightning_hesd/"):
            return f"][{target.removesuffix('.py').replace('/', '.')}"
        return f"]({posixpath.relpath(target, here or '.')}"

    return re.sub(r"(\]\[[\w.]+)\)", r"\1]", LINK.sub(inside, markdown))
