"""Copies of the first batches of training: the analysis samples of loaders that cannot be read by position.

Each batch is copied just before `training_step` gets it, after all hooks of Lightning.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_hesd.numerics.isolation.attributes import attributes
from lightning_hesd.numerics.isolation.containers import PLAIN_TYPES, has_plain_items
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.isolation.tensor_states import is_opaque, size_in_memory
from lightning_hesd.numerics.operators.memory import SHARE_OF_FREE_MEMORY, default_budget
from lightning_hesd.training.compat import dataloading, messages
from lightning_hesd.training.samples.reading import measure_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.training.samples.reading import ReadBatch

MAX_COPIED_BYTES = 2**30
"""Maximal size of the copied batches of a rank."""

MAX_MEMORY_SHARE = 0.1
"""Maximal share of the free memory at the start of training for the copied batches; the first is always copied."""

MAX_DEVICE_BYTES = 2**26
"""Size up to which copied batches stay on an accelerator; further ones go to the CPU."""

_LEAVES = (*PLAIN_TYPES, type, nn.Module)


class NoBatchesError(RuntimeError):
    """Training has had no batches to analyze."""


@dataclass(frozen=True)
class _CopiedBatch:
    batch: ReadBatch
    position: int
    is_on_cpu: bool


class FirstBatches:
    """Copies of the first batches of training on this rank, from one epoch at most."""

    def __init__(self, trainer: pl.Trainer, num_samples: float, batch_weight: Weigh | None) -> None:
        """Copy the next batches of training, up to a number of samples on all ranks together."""
        free = default_budget(torch.device("cpu"), trainer.num_devices) / SHARE_OF_FREE_MEMORY
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._device = trainer.strategy.root_device
        self._share = num_samples / trainer.world_size
        self._batch_weight = batch_weight
        self._limit = min(MAX_COPIED_BYTES, int(MAX_MEMORY_SHARE * free))  # in bytes
        self._copied_batches: list[_CopiedBatch] = []
        self._bytes = 0
        self._pending: _CopiedBatch | None = None
        self._failure: Exception | None = None
        self._stop_watching: Callable[[], None] | None = dataloading.watch_batches(trainer, self._on_batch)

    @property
    def is_complete(self) -> bool:
        """Whether no more batches are copied."""
        return self._stop_watching is None

    def finish(self) -> None:
        """Copy no more batches."""
        self._pending = None
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None

    def _on_batch(self, batch: Any, position: int) -> None:
        """Copy a batch before `training_step` gets it."""
        self._pending = None
        try:
            with restore_state():  # user code may draw random numbers
                self._copy(batch, position)
        except Exception as error:  # noqa: BLE001 - training goes on; `batches` raises it
            self._failure = error
            self.finish()

    def _copy(self, batch: Any, position: int) -> None:
        size = sum(array.nbytes if isinstance(array, np.ndarray) else _bytes_of(array) for array in _arrays(batch))
        if self._copied_batches and self._bytes + size > self._limit:
            samples = sum(copied.batch.size for copied in self._copied_batches)
            messages.warn(
                f"{samples:.0f} samples per rank are analyzed instead of {self._share:.0f}, because copies of more "
                f"training batches would take more than {self._limit / 2**20:.0f} MiB. For more, pass the callback "
                "`dataloader=`, a DataLoader of a map-style dataset or a list of batches."
            )
            self.finish()
            return
        data = _copied(batch)
        moved = self._bytes + size > MAX_DEVICE_BYTES and self._device.type != "cpu"
        if moved:
            on_cpu = move_data_to_device(data, torch.device("cpu"))
            moved = all(isinstance(array, np.ndarray) or array.device.type == "cpu" for array in _arrays(on_cpu))
            data = on_cpu if moved else data
        try:
            read = measure_batch(data, None, self._batch_weight)
        except ValueError as error:  # which says what to do
            msg = f"the training batches cannot be analyzed: {error}"
            raise NoBatchesError(msg) from error
        if read.size > 0:
            self._bytes += size
            self._pending = _CopiedBatch(read, position, moved)

    def after_step(self) -> None:
        """Keep the copy of the last batch: training has not skipped it."""
        if self._pending is None:
            return
        if not self._copied_batches and self._pending.batch.size_warning is not None:
            messages.warn(self._pending.batch.size_warning)
        self._copied_batches.append(self._pending)
        self._pending = None
        if sum(copied.batch.size for copied in self._copied_batches) >= self._share:
            self.finish()

    def after_epoch(self) -> None:
        """Copy no more batches: those of the next epoch may have the same samples."""
        if self._copied_batches:
            self.finish()

    def batches(self, num_samples: float) -> list[WeightedBatch]:
        """Return the first copied batches, as `training_step` got them, on the device of training.

        Raises:
            NoBatchesError: If a batch could not be copied, or its size is not known.
        """
        if isinstance(self._failure, NoBatchesError):
            raise NoBatchesError(str(self._failure)) from self._failure
        if self._failure is not None:
            msg = (
                f"the training batches cannot be copied for the analysis ({type(self._failure).__name__}: "
                f"{self._failure}): pass the callback `dataloader=`, a loader or a list of batches."
            )
            raise NoBatchesError(msg) from self._failure
        found: list[WeightedBatch] = []
        missing = num_samples / self._world_size
        for number, copied in enumerate(self._copied_batches):
            if missing <= 0:
                break
            data, index = copied.batch.data, number * self._world_size + self._rank
            if copied.is_on_cpu:
                data = move_data_to_device(_copied(data), self._device)
            found.append(copied.batch.weighted(data, index, copied.position))
            missing -= copied.batch.size
        return found


def _copied(batch: Any) -> Any:
    """Return a deep copy of a batch; views are copied without the rest of their storage."""
    views = [array for array in _arrays(batch) if isinstance(array, Tensor) and _is_small_view(array)]
    return copy.deepcopy(batch, {id(view): view.clone() for view in views})


def _is_small_view(tensor: Tensor) -> bool:
    is_plain = type(tensor) is Tensor and not tensor.requires_grad and not is_opaque(tensor)
    return is_plain and not tensor.is_nested and size_in_memory(tensor) > tensor.nbytes


def _bytes_of(tensor: Tensor) -> int:
    return tensor.nbytes if _is_small_view(tensor) else size_in_memory(tensor)


def _arrays(batch: Any) -> list[Tensor | np.ndarray[Any, Any]]:
    """Return the tensors and arrays in a batch."""
    found: list[Any] = []
    pending, seen = [batch], dict[int, Any]()
    while pending:
        part = pending.pop()
        if isinstance(part, _LEAVES) or id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, Tensor | np.ndarray):
            found.append(part)
        elif isinstance(part, list | tuple | set | frozenset | deque | dict):
            if not has_plain_items(part):
                pending.extend(part.values() if isinstance(part, dict) else part)
        else:
            pending.extend(part.values() if isinstance(part, Mapping) else ())
            pending.extend(attributes(part).values())
    return found
