"""Cases, each run in a process of its own, and the table of what came out."""

import contextlib
import datetime as dt
import fnmatch
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

SECONDS = 120.0
"""After so long a case counts as hanging, unless it says otherwise."""

FORK = multiprocessing.get_context("fork")
"""Cases have lambdas, which cannot be sent to another process, and everything is imported already."""

PACKAGES = ("torch", "lightning", "lightning-hesd")


class Case(Protocol):
    """A situation, and what should come of it; `seconds` is how long it may take."""

    name: str
    expected: str
    seconds: float

    def run(self, folder: Path) -> str:
        """Do it in an empty folder, and return what came of it; what is not as expected fails an assertion."""


@dataclass(frozen=True)
class Program:
    """A case that no declaration covers: a function that does it all, and returns what is expected."""

    name: str
    expected: str
    work: Callable[[Path], str]
    seconds: float = SECONDS
    measures: bool = False  # it returns measurements, which it has judged itself

    def run(self, folder: Path) -> str:
        got = self.work(folder)
        assert self.measures or got == self.expected, got
        return got


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    name: str
    expected: str
    got: str
    ok: bool
    seconds: float


def run_all(cases: Iterable[Case]) -> Iterator[Result]:
    """Run the cases one after the other."""
    for case in cases:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="stress-", ignore_cleanup_errors=True) as folder:
            ok, got = in_own_process(case.run, Path(folder), seconds=case.seconds)
        yield Result(case.name, case.expected, got, ok, time.perf_counter() - started)


def chosen(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """Return the cases whose names match one of the patterns; all if there are none."""
    return [case for case in cases if not patterns or any(fnmatch.fnmatch(case.name, p) for p in patterns)]


def in_own_process(work: Callable[[Path], str], folder: Path, *, seconds: float) -> tuple[bool, str]:
    """Return whether `work(folder)` succeeded in a process of its own, and what it says; none of its children stays."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_answer, args=(sender, work, folder))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return False, f"hangs: no answer after {seconds:g} s"
        ok, text = receiver.recv()
    except EOFError:
        process.join()
        return False, f"its process died with exit code {process.exitcode}"
    else:
        return ok, text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own, see `_answer`
        process.join()


def _answer(sender: Connection, work: Callable[[Path], str], folder: Path) -> None:
    os.setsid()
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    try:
        sender.send((True, work(folder)))
    except BaseException as error:  # noqa: BLE001 - also what would end the process: the table says so
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or "no message"
        sender.send((False, f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore all warnings: what failed is told otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_table(results: Sequence[Result]) -> str:
    """Return the results as a table in Markdown."""
    rows = [(r.name, r.expected, r.got, "yes" if r.ok else "**no**", f"{r.seconds:.1f}") for r in results]
    lines = [("case", "expected", "got", "ok", "s"), ("---", "---", "---", "---", "---:"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def environment() -> str:
    """Return date, interpreter and versions in a line."""
    found = [f"{package} {torch.__version__ if package == 'torch' else version(package)}" for package in PACKAGES]
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    return ", ".join([date, f"Python {platform.python_version()}", *found, f"{sys.platform} {platform.machine()}"])


def one_line(text: Any) -> str:
    """Return a text in one line, shortened."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= 160 else f"{flat[:157]}..."
