"""Signals of the operating system during an analysis."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import traceback
from typing import TYPE_CHECKING, Any

from lightning_hesd.training.compat.strategies import collectives_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl


@contextlib.contextmanager
def sigterm_waits(trainer: pl.Trainer) -> Iterator[None]:
    """Defer SIGTERM until all ranks have left the block; then all stop training, whichever rank received it.

    Lightning's handler waits for the other ranks. Within an analysis they would wait for this rank: a deadlock.
    """
    if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    connector = signal_connector(trainer)
    arrived: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGTERM, lambda *arguments: arrived.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
    if collectives_of(trainer).any(bool(arrived)):
        connector.received_sigterm = True
    # Lightning calls its own handlers and those that were there before.
    for other in getattr(handler, "signal_handlers", ()) if arrived else ():
        if callable(other) and getattr(other, "__self__", None) is not connector:
            other(*arrived[0])


def signal_connector(trainer: pl.Trainer) -> Any:
    """Return the object whose flags are set by signal handlers and read by Lightning's loops."""
    return trainer._signal_connector  # noqa: SLF001


def handles_signal() -> bool:
    """Return whether a signal handler of Lightning calls this, such as the one that requeues a SLURM job."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(inspect.currentframe()))
    return any(module.endswith("connectors.signal_connector") for module in modules)
