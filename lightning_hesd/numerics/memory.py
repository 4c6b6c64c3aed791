"""How much memory an analysis may take, and how much one batch's graph does take."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hesd.numerics.dtensors import local_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning_hesd.numerics.lanczos import Storage

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
        processes: How many processes share the computer's memory; every accelerator has its own.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
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
        storage: Where the Krylov basis goes.
        fixed: Bytes that are needed in any case: a copy of the module's tensors, vectors, and the basis if it is on
            the device.
        graphs: Bytes that remain for graphs.
    """

    storage: Storage
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
    basis: Literal["auto"] | Storage,
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
    fixed = sum(local_part(t).untyped_storage().nbytes() for t in tensors) + (VECTORS + more_vectors) * vector_bytes
    limit = default_budget(device, processes) if budget is None else budget
    if budget is not None and fixed > budget:
        msg = f"`memory_budget` must be at least {fixed} bytes for the vectors of this module, got {budget}."
        raise ValueError(msg)
    needed = steps * vector_bytes
    storage: Storage
    if basis != "auto":
        storage = basis
    elif needed <= (limit - fixed) / 2:
        storage = "device"
    elif device.type != "cpu" and needed <= default_budget(torch.device("cpu"), processes):
        storage = "cpu"
    else:
        storage = "none"
    if storage == "device" or (storage == "cpu" and device.type == "cpu"):
        fixed += needed
    return MemoryPlan(storage, fixed, max(limit - fixed, 0))


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make inside it, on any device, views and inputs not.

    Attributes:
        live: Bytes that are there now.
        peak: The most there have been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._count(value, is_new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value, is_new=True)
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, tensor: Tensor, *, is_new: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - as an id: Python objects of one storage come and go
        if key in self._known:
            return
        size = storage.nbytes() if is_new else 0
        self.live += size
        self._known[key] = weakref.ref(storage, self._forgetting(key, size))

    def _forgetting(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        return forget
