"""Counts the lines of Python that run: a measure of work that does not depend on the speed or load of the machine."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class LineCount:
    """The number of lines that have run."""

    def __init__(self) -> None:
        self.lines = 0

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        """Count a line, and trace the function of the frame."""
        self.lines += event == "line"
        return self.trace


@contextlib.contextmanager
def counted_lines() -> Iterator[LineCount]:
    """Count the lines of Python that run inside, in functions that are called there, in this thread."""
    count, before = LineCount(), sys.gettrace()
    sys.settrace(count.trace)
    try:
        yield count
    finally:
        sys.settrace(before)
