"""New processes for measurements, and their memory.

Every whole run has its own process, so candidates do not affect each other's memory. The processes are forked from a
server that has imported all modules and computed nothing, so they start at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext

MODULES = ["benchmarks.measure", "curvlinops", "hessian_eigenthings", "scipy.sparse.linalg"]


class MeasurementError(RuntimeError):
    """A measurement failed in its process."""


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
    """Return `work(*args)`, computed in a new process.

    Raises:
        MeasurementError: If it fails, or its process is killed.
    """
    context = _server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, work, args))
    process.start()
    sender.close()
    try:
        failure, result = receiver.recv()
    except EOFError:
        process.join()
        msg = f"its process ended with exit code {process.exitcode} (-9: killed, perhaps out of memory)"
        raise MeasurementError(msg) from None
    process.join()
    if failure is not None:
        raise MeasurementError(failure)
    return result


def _answer(sender: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((None, work(*args)))
    except Exception as error:  # noqa: BLE001 - the report has the failure
        sender.send((describe(error), None))


def describe(error: BaseException) -> str:
    """Return the error in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)  # skips modules that are not installed
    return context


class PeakMemory:
    """Growth of this process's memory since construction; Linux only."""

    def __init__(self) -> None:
        self._held: int | None = None
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            self._held = _status("VmRSS")
            self.restart()

    def restart(self) -> None:
        """Forget the peak so far; growth still counts from construction."""
        if self._held is not None:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def growth(self) -> int | None:
        """Return the growth up to the peak, in bytes; None if it is unknown."""
        return None if self._held is None else max(0, _status("VmHWM") - self._held)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
