"""A terminal that keeps what it shows, and runs whose analyses report progress to it."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_hesd import HessianSpectrumCallback
from tests.training.modules import Classifier, callback, loader, make_trainer, plain_loss
from tests.training.scripted import make_spectrum

TOTAL = 8


class Terminal(io.StringIO):
    """Knows the control sequences that progress bars use; `frames` is what the screen showed after each output."""

    TOKENS = re.compile(r"\x1b\[(?P<count>[?\d;]*)(?P<command>[A-Za-z])|(?P<control>[\r\n])|(?P<text>[^\x1b\r\n]+)")

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]
        self.row = self.column = 0
        self.frames: list[list[str]] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for token in self.TOKENS.finditer(text):
            if token["text"]:
                self._put(token["text"])
            elif token["control"] == "\r":
                self.column = 0
            elif token["control"] == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif token["command"] == "A":
                self.row = max(0, self.row - int(token["count"] or 1))
            elif token["command"] == "K":
                self.lines[self.row] = ""
            else:
                assert token["command"] in "mhl", token  # colors, and whether there is a cursor
        frame = [line.rstrip() for line in self.lines]
        if not self.frames or frame != self.frames[-1]:
            self.frames.append(frame)
        return len(text)

    def _put(self, text: str) -> None:
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
        self.column += len(text)

    def showing(self, text: str) -> list[list[str]]:
        """Return the frames with this text in them."""
        return [frame for frame in self.frames if any(text in line for line in frame)]


def tqdm_bar(terminal: Terminal, **arguments: Any) -> TQDMProgressBar:
    return TQDMProgressBar(**arguments)  # which writes to the standard output of that time


def rich_bar(terminal: Terminal, **arguments: Any) -> RichProgressBar:
    console = {"file": terminal, "force_terminal": True, "width": 120, "color_system": None}
    return RichProgressBar(console_kwargs=console, **arguments)


BARS: dict[str, Callable[..., ProgressBar]] = {"tqdm": tqdm_bar, "rich": rich_bar}


class Validated(Classifier):
    """Has a validation bar, and logs nothing: a barebones Trainer does not allow it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return plain_loss(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


class Spy(pl.Callback):
    """Notes what each analysis gets to report to, and what the screen shows when it is over."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.reports: list[Any] = []
        self.afterwards: list[list[str]] = []

    def on_train_start(self, *_args: Any) -> None:
        if self.reports:
            self.afterwards.append(self.terminal.frames[-1] if self.terminal.frames else [])

    on_train_epoch_end = on_train_batch_end = on_train_start


def scripted(
    terminal: Terminal, *, steps: int = TOTAL, fails: bool = False, **arguments: Any
) -> tuple[HessianSpectrumCallback, Spy]:
    """Return a callback whose analyses report `steps` of `TOTAL` steps, then end or fail; and a spy."""
    observer, spy = callback(**arguments), Spy(terminal)

    def analyze(trainer: Any, pl_module: Any, report: Any, *, analysis: Any) -> Any:
        spy.reports.append(report)
        for step in range(1, steps + 1):
            if report is not None:
                report(step, TOTAL)
        if fails:
            msg = "no luck"
            raise OSError(msg)
        return make_spectrum(-0.1)

    observer._recorder._analyzers["training"].analyze = analyze  # type: ignore[method-assign]
    return observer, spy


def train(tmp_path: Path, terminal: Terminal, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """Train for two epochs of five batches each, with two batches of validation in each."""
    bars = {} if arguments.get("barebones") else {"enable_progress_bar": True, "limit_val_batches": 2}
    trainer = make_trainer(tmp_path, *callbacks, **{**bars, **arguments})
    with contextlib.redirect_stdout(terminal):
        trainer.fit(Validated(), loader(), loader())
    return trainer
