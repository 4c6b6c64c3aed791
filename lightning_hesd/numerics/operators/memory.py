"""The memory budget of an analysis, its division, and a meter for the memory of graphs."""

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
"""Share of the free memory that an analysis may take; the rest is for training and other programs."""

VECTORS = 10
"""Number of vectors of length n that exist at the same time, beside the Krylov basis."""

COMPARISON_VECTORS = 4
"""Number of vectors in the finest precision that exist while a product is computed for the comparison of a loss with
its derivatives: copies of the parameters, their values before, the direction, and the product."""

DIFFERENCE_VECTORS = 8
"""The same while gradients are subtracted from each other, without a graph: two of them, the difference before, and
what the backward pass needs."""

COMPARED_SAMPLES = 4
"""Number of samples for which a loss is first compared with its derivatives."""

UNKNOWN_FREE_MEMORY = 4 * 2**30
"""Assumed free memory where the system does not report it, in bytes."""


def default_budget(device: torch.device, local_ranks: int = 1) -> int:
    """Return the bytes an analysis may take: half of what is free on the device of the parameters.

    `local_ranks` ranks share the computer's memory; accelerators that report memory have their own.
    """
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        reserved = module.memory_reserved(device)
        if hasattr(module, "get_per_process_memory_fraction"):  # torch >= 2.8; the process may have set a limit
            free = max(min(free, int(module.get_per_process_memory_fraction(device) * total) - reserved), 0)
        cached = reserved - module.memory_allocated(device)
        return int(SHARE_OF_FREE_MEMORY * (free + cached))
    return int(SHARE_OF_FREE_MEMORY * free_system_memory() / local_ranks)


def free_system_memory(root: Path = Path("/")) -> int:
    """Return the free bytes of the computer's memory, the smaller of the system's and the container's numbers."""
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
"""Parts of the messages of allocators and of CUDA's libraries, lower case; their errors are plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory has run out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_EXHAUSTION)


@dataclass(frozen=True)
class MemoryPlan:
    """Division of the memory of an analysis.

    Attributes:
        basis: Where the Krylov basis is kept.
        fixed: Bytes of a copy of the module's tensors, of vectors, and of the basis if it is on the device.
        graphs: Remaining bytes, for graphs.
        copies: Bytes of the copy of the module's tensors, which are part of `fixed`.
    """

    basis: Basis
    fixed: int
    graphs: int
    copies: int = 0

    def predicted(self, graph_bytes: float | None, comparison_bytes: float = 0.0) -> int | None:
        """Return the predicted peak in bytes; None if it is unknown.

        Args:
            graph_bytes: Bytes of the graphs and of a product; None: unknown.
            comparison_bytes: Bytes of the graphs and of the comparison of the loss with its derivatives, which comes
                before there are other vectors.
        """
        if graph_bytes is None:
            return None
        return max(self.fixed + int(graph_bytes), self.copies + int(comparison_bytes))


def plan_memory(
    tensors: Iterable[Tensor],
    vector_bytes: int,
    steps: int,
    *,
    basis: Literal["auto"] | Basis,
    device: torch.device,
    budget: int | None = None,
    local_ranks: int = 1,
    more_vectors: int = 0,
) -> MemoryPlan:
    """Divide the budget: first the vectors, then the basis if it takes no more than half of the rest, then graphs.

    Args:
        tensors: Parameters and buffers of the module, which are copied.
        vector_bytes: Size of one vector.
        steps: Vectors in the Krylov bases of all probes.
        basis: Place of the basis, or "auto": on the device if it fits, else in the computer's memory, else nowhere.
        device: Device of the parameters.
        budget: Bytes; default: `default_budget`.
        local_ranks: Number of ranks that share the computer's memory.
        more_vectors: Number of additional vectors.

    Raises:
        ValueError: If the vectors alone exceed the budget.
    """
    copies = sum(size_in_memory(local_shard(t)) for t in tensors)
    fixed = copies + (VECTORS + more_vectors) * vector_bytes
    limit = default_budget(device, local_ranks) if budget is None else budget
    if budget is not None and fixed > budget:
        msg = f"`memory_budget` must be at least {fixed} bytes for the vectors of this module, got {budget}."
        raise ValueError(msg)
    needed = steps * vector_bytes
    place: Basis
    if basis != "auto":
        place = basis
    elif needed <= (limit - fixed) / 2:
        place = "device"
    elif device.type != "cpu" and needed <= default_budget(torch.device("cpu"), local_ranks):
        place = "cpu"
    else:
        place = "none"
    if place == "device" or (place == "cpu" and device.type == "cpu"):
        fixed += needed
    return MemoryPlan(place, fixed, max(limit - fixed, 0), copies)


_autograd: Any = torch.autograd


class MemoryMeter:
    """A context that measures the memory of tensors by the reports of PyTorch's allocators to its profiler.

    A dispatch mode would count tensors operation by operation, but it changes the course of operations that make
    tensors without memory, which has crashed the process. Memory freed by other threads counts as allocated.

    Attributes:
        live: Bytes allocated inside and not freed; None if not measured, for example while another profiler runs.
        peak: Largest number of bytes in use.
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
        # Another profiler may be running, or this version of PyTorch lack this one.
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):
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
