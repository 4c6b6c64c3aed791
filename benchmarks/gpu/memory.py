"""Memory of the device: the most that was in use, and a cap; on other devices than GPUs tensors are counted."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import torch

from tests.meter import CountingMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu.finding import Setting


def free_cached(setting: Setting) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if setting.is_cuda:
        torch.cuda.empty_cache()


def peak_of(setting: Setting, work: Callable[[], Any], *, reserved: bool = False) -> tuple[Any, int]:
    """Return the result of some work, and the most bytes in use meanwhile beyond those before.

    With `reserved` those are counted that the allocator holds, unused ones too, from zero on: what a cap limits.
    """
    free_cached(setting)
    if not setting.is_cuda:
        with CountingMeter() as meter:
            result = work()
        return result, meter.peak
    setting.synchronize()
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = 0 if reserved else torch.cuda.memory_allocated(setting.device)
    result = work()
    setting.synchronize()
    most = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
    return result, most(setting.device) - before


class CappedMeter(CountingMeter):  # type: ignore[no-untyped-call]
    """Raises PyTorch's error for exhausted memory where the tensors made inside it take more bytes than the limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self._limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.live > self._limit:
            msg = f"out of memory: {self.live} bytes are in use, and {self._limit:.0f} are allowed"
            raise torch.OutOfMemoryError(msg)
        return result


@contextlib.contextmanager
def capped(setting: Setting, limit: float) -> Iterator[None]:
    """Let memory run out beyond a number of bytes."""
    free_cached(setting)
    if not setting.is_cuda:
        with CappedMeter(limit):
            yield
        return
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, setting.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
