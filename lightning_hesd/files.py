"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `target` when all is written.

    Yields:
        A path in the same folder.
    """
    partial = target.with_name(f"{target.name}.partial")
    yield partial
    partial.replace(target)
