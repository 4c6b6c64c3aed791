"""Run the notebook first_steps.ipynb, and write the page that shows its cells and their outputs.

The cells run in IPython, in this process, as in a notebook: what the last line of a cell is, the page shows as HTML, a
figure or text. `pip install ipython` first.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).parent
NOTEBOOK = HERE / "first_steps.ipynb"
EMBEDDED = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
SOURCE = "*This page is a [notebook](../first_steps.ipynb) with its outputs, made by `python -m examples.notebook`.*"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its figures to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    out = parser.parse_args(arguments).out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{NOTEBOOK.stem}*"):
        old.unlink()
    page = Page(out)
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        shell = new_shell()
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                page.add(source)
                continue
            page.add(f"```python\n{source}\n```")
            with capture_output() as shown:
                outcome = shell.run_cell(source, store_history=True)
            outcome.raise_error()
            page.add_text(shown.stdout)
            for output in shown.outputs:
                page.add_output(output.data)
    page.parts.insert(1, SOURCE)
    page.write()


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Work in a folder: runs write their logs there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def new_shell() -> Any:
    """Return a shell that shows figures as notebooks do, and lines of the callback as Lightning's log does."""
    import lightning.pytorch  # noqa: F401, PLC0415 - its log goes to the terminal from here on, not to a cell

    shell: Any = Shell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.enable_matplotlib("inline")
    logging.getLogger("lightning.pytorch").addHandler(CallbackLines())
    return shell


class ValueOfCell(DisplayHook):
    """Makes the value of a cell one of its outputs, unless it ends with a semicolon."""

    def write_output_prompt(self) -> None:
        """Write no prompt."""

    def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
        """Publish the representations of the value."""
        shell: Any = self.shell
        shell.display_pub.publish(format_dict, md_dict)


class Shell(InteractiveShell):
    """A shell without windows."""

    displayhook_class = ValueOfCell

    def enable_gui(self, gui: str | None = None) -> None:
        """Do nothing: figures are outputs."""


class CallbackLines(logging.Handler):
    """Prints what the callback says."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line, without Lightning's own ones about devices."""
        if record.getMessage().startswith("hesd: "):
            print(record.getMessage())


class Page:
    """A page in Markdown, and its figures.

    Attributes:
        parts: The paragraphs so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._figures = 0
        self.parts: list[str] = []

    def add(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(text)

    def add_text(self, text: str) -> None:
        """Add the text that a cell has printed."""
        if text.strip():
            self.add(f"```text\n{text.strip()}\n```")

    def add_output(self, data: Mapping[str, Any]) -> None:
        """Add an output of a cell: as a figure, as HTML, or else as text."""
        if "image/png" in data:
            self.add(f"![Output of the cell]({self._figure(data['image/png'])})")
        elif "text/html" in data:
            self.add(EMBEDDED.sub(lambda match: self._figure(match[1]), data["text/html"]))
        else:
            self.add_text(data["text/plain"])

    def _figure(self, encoded: str | bytes) -> str:
        """Write a PNG in base64 to a file of its own, and return its name."""
        self._figures += 1
        name = f"{NOTEBOOK.stem}-{self._figures}.png"
        (self._folder / name).write_bytes(base64.b64decode(encoded))
        return name

    def write(self) -> None:
        """Write the page."""
        text = "\n\n".join(part.strip("\n") for part in self.parts)
        (self._folder / f"{NOTEBOOK.stem}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
