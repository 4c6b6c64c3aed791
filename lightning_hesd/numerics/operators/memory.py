"""How much memory an analysis may take, and how much one batch's graph does take."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import Self

from lightning_hesd.numerics.dtensors import local_shard
from lightning_hesd.numerics.isolation.tensor_states import size_in_memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lightning_hesd.numerics.krylov.lanczos import Basis

SHARE_OF_FREE_MEMORY = 0.5
"""Of what is free when the analysis starts; the rest is for what training and others may still ask for."""

VECTORS = 10
"""Vectors of the length of all parameters that are there at the same time, beside the basis."""

UNKNOWN_FREE_MEMORY = 4 * 2**30
"""What is taken to be free where the system does not say."""


def default_budget(device: torch.device, processes: int = 1) -> int:
    """Return the bytes an analysis may take: half of what is free on the device.

    Args:
        device: Where the parameters are.
        processes: How many processes share the computer's memory; an accelerator that tells its memory has its own.
    """
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        free, _ = module.mem_get_info(device)
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return int(SHARE_OF_FREE_MEMORY * (free + cached))
    return int(SHARE_OF_FREE_MEMORY * free_system_memory() / processes)


def free_system_memory(root: Path = Path("/")) -> int:
    """Return the bytes of the computer's memory that are free, by the system's and the container's account.

    Args:
        root: Where /proc and /sys are.
    """
    free = [UNKNOWN_FREE_MEMORY]
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free = [1024 * int(available.split()[1])]
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        free.append(limit - used)
    except (OSError, StopIteration, ValueError):
        pass  # not Linux, or no limit ("max" is no number)
    return max(min(free), 0)


SIGNS_OF_EXHAUSTION = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""In what allocators and CUDA's libraries say, lower case; they share one exception with all other trouble."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory has run out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_EXHAUSTION)


@dataclass(frozen=True)
class MemoryPlan:
    """What an analysis spends its memory on.

    Attributes:
        basis: Where the Krylov basis is kept.
        fixed: Bytes that are needed in any case: a copy of the module's tensors, vectors, and the basis if it is on
            the device.
        graphs: Bytes that remain for graphs.
    """

    basis: Basis
    fixed: int
    graphs: int

    def predicted(self, graph_bytes: float | None) -> int | None:
        """Return the expected peak, given that of the graphs; None if that is unknown."""
        return None if graph_bytes is None else self.fixed + int(graph_bytes)


def plan_memory(
    tensors: Iterable[Tensor],
    vector_bytes: int,
    steps: int,
    *,
    basis: Literal["auto"] | Basis,
    device: torch.device,
    budget: int | None = None,
    processes: int = 1,
    more_vectors: int = 0,
) -> MemoryPlan:
    """Divide the budget: first the vectors, then the basis if it takes no more than half of the rest, then graphs.

    Args:
        tensors: Parameters and buffers of the module, which are copied.
        vector_bytes: Size of one vector.
        steps: Vectors in the basis.
        basis: Where it goes, or "auto": to the device, else to the computer's memory if that is another, else nowhere.
        device: Where the parameters are.
        budget: Bytes; default: `default_budget`.
        processes: How many processes share the computer's memory.
        more_vectors: Vectors needed beyond the usual ones.

    Raises:
        ValueError: If not even the vectors fit into the budget.
    """
    fixed = sum(size_in_memory(local_shard(t)) for t in tensors) + (VECTORS + more_vectors) * vector_bytes
    limit = default_budget(device, processes) if budget is None else budget
    if budget is not None and fixed > budget:
        msg = f"`memory_budget` must be at least {fixed} bytes for the vectors of this module, got {budget}."
        raise ValueError(msg)
    needed = steps * vector_bytes
    place: Basis
    if basis != "auto":
        place = basis
    elif needed <= (limit - fixed) / 2:
        place = "device"
    elif device.type != "cpu" and needed <= default_budget(torch.device("cpu"), processes):
        place = "cpu"
    else:
        place = "none"
    if place == "device" or (place == "cpu" and device.type == "cpu"):
        fixed += needed
    return MemoryPlan(place, fixed, max(limit - fixed, 0))


_autograd: Any = torch.autograd


class MemoryMeter:
    """Measures what tensors take while inside, by what PyTorch's allocators report to its profiler.

    Nothing looks at the operations themselves: a dispatch mode would, and it changes the course of those that make
    tensors without memory, which has crashed the process. What other threads free counts as if it were still there.

    Attributes:
        live: Bytes allocated inside and not freed; None if they could not be measured, as while another profiler runs.
        peak: The most there have been.
    """

    def __init__(self, device: torch.device) -> None:
        self.live: int | None = None
        self.peak = 0
        self._is_running = False
        self._device = device
        self._collects = False

    def __enter__(self) -> Self:
        if self._device.type not in {"cpu", "cuda"}:
            return self  # other allocators report nothing, or warn
        with contextlib.suppress(
            AttributeError, RuntimeError, TypeError
        ):  # another one is running, or this one is gone
            extra = torch._C._profiler._ExperimentalConfig()  # noqa: SLF001
            # Memory only: neither shapes, stacks, FLOPs nor modules.
            config = _autograd.ProfilerConfig(_autograd.ProfilerState.CPU, False, True, False, False, False, extra)
            _autograd._enable_profiler_legacy(config)  # noqa: SLF001 - the other one prints
            self._is_running = True
            # Events of operations take 16 KB each, those of memory little.
            _autograd._enable_record_function(False)  # noqa: SLF001
        # What garbage collection frees now was not allocated inside.
        self._collects = gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        if self._collects:
            gc.enable()
        if not self._is_running:
            return
        _autograd._enable_record_function(True)  # noqa: SLF001
        threads = _autograd._disable_profiler_legacy()  # noqa: SLF001
        events = [event for thread in threads for event in thread if event.kind() == "memory_alloc"]
        live = 0
        for event in sorted(events, key=lambda event: event.start_us()):
            live += event.cpu_memory_usage() + event.cuda_memory_usage()
            self.peak = max(self.peak, live)
        self.live = max(live, 0)
