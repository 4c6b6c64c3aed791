"""Copies of the first batches that training sees: the samples of loaders that are not to be taken apart.

Nothing is drawn for them. Each batch is copied when `training_step` is about to get it, after all hooks of Lightning.
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

from lightning_hesd.numerics.inputs.cuts import attributes
from lightning_hesd.numerics.isolation.containers import holds_atoms
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.isolation.tensor_states import is_opaque, size_in_memory
from lightning_hesd.numerics.operators.memory import SHARE_OF_FREE_MEMORY, default_budget
from lightning_hesd.training.compat import dataloading, messages
from lightning_hesd.training.samples.reading import measured

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.training.samples.reading import ReadBatch

MAX_KEPT_BYTES = 2**30
"""Bytes: kept batches take no more in a process, ..."""

SHARE_KEPT = 0.1
"""... and no larger share of the memory that is free when training starts; one batch is kept in any case."""

SMALL = 2**26
"""Bytes: up to this size kept batches stay on an accelerator, the others go to the CPU."""

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, nn.Module)


class NoBatchesError(RuntimeError):
    """Training has not seen the batches that are to be analysed."""


@dataclass(frozen=True)
class _Kept:
    batch: ReadBatch
    position: int
    is_moved: bool


class KeptBatches:
    """Copies of the first batches of training, of this process.

    They are those of one epoch at most: if it has fewer samples than wanted, they are all of it.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        wanted: float,
        batch_weight: Weigh | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        """Keep the batches to come.

        Args:
            trainer: The trainer.
            wanted: Number of samples, in all processes together.
            batch_weight: Weight of a batch; None: its number of samples.
            limit: Bytes that the batches may take; None: as `MAX_KEPT_BYTES` and `SHARE_KEPT` say.
        """
        if limit is None:
            free = default_budget(torch.device("cpu"), trainer.num_devices) / SHARE_OF_FREE_MEMORY
            limit = min(MAX_KEPT_BYTES, int(SHARE_KEPT * free))
        self._rank, self._processes = trainer.global_rank, trainer.world_size
        self._device = trainer.strategy.root_device
        self._share = wanted / trainer.world_size
        self._batch_weight = batch_weight
        self._limit = limit
        self._kept: list[_Kept] = []
        self._bytes = 0
        self._pending: _Kept | None = None
        self._failure: Exception | None = None
        self._unwatch: Callable[[], None] | None = dataloading.watch_batches(trainer, self._see)

    @property
    def is_complete(self) -> bool:
        """Whether no more batches are kept."""
        return self._unwatch is None

    def finish(self) -> None:
        """Keep no more batches."""
        self._pending = None
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def _see(self, batch: Any, position: int) -> None:
        """Copy a batch that `training_step` is about to get."""
        self._pending = None
        try:
            with restore_state():  # functions of the user's may draw random numbers
                self._copy(batch, position)
        except Exception as error:  # noqa: BLE001 - training goes on; `batches` raises it
            self._failure = error
            self.finish()

    def _copy(self, batch: Any, position: int) -> None:
        size = sum(array.nbytes if isinstance(array, np.ndarray) else _bytes_of(array) for array in _arrays(batch))
        if self._kept and self._bytes + size > self._limit:
            samples = sum(kept.batch.size for kept in self._kept)
            messages.warn(
                f"{samples:.0f} samples of each process are analysed instead of {self._share:.0f}: copies of more "
                f"training batches would take more than {self._limit / 2**20:.0f} MiB. Pass `dataloader=` to "
                "HessianSpectrumCallback, a DataLoader of a map-style dataset or a list of batches, for more."
            )
            self.finish()
            return
        data = _copied(batch)
        moved = self._bytes + size > SMALL and self._device.type != "cpu"
        if moved:
            on_cpu = move_data_to_device(data, torch.device("cpu"))
            moved = all(isinstance(array, np.ndarray) or array.device.type == "cpu" for array in _arrays(on_cpu))
            data = on_cpu if moved else data
        read = measured(data, None, self._batch_weight)
        if read.size > 0:
            self._bytes += size
            self._pending = _Kept(read, position, moved)

    def trained(self) -> None:
        """Keep the batch seen last: training has not skipped it."""
        if self._pending is None:
            return
        if not self._kept and self._pending.batch.doubt is not None:
            messages.warn(self._pending.batch.doubt)
        self._kept.append(self._pending)
        self._pending = None
        if sum(kept.batch.size for kept in self._kept) >= self._share:
            self.finish()

    def epoch_ended(self) -> None:
        """Keep no more than the batches of an epoch: those of the next one may hold the same samples."""
        if self._kept:
            self.finish()

    def batches(self, num_samples: float) -> list[WeightedBatch]:
        """Return the first batches kept, as `training_step` got them, on the device of training.

        Args:
            num_samples: So many samples are wanted, in all processes together.

        Raises:
            NoBatchesError: If a batch could not be copied.
        """
        if self._failure is not None:
            msg = (
                f"the training batches cannot be kept for the analysis ({type(self._failure).__name__}: "
                f"{self._failure}): pass `dataloader=` to HessianSpectrumCallback, a loader or a list of batches."
            )
            raise NoBatchesError(msg) from self._failure
        found: list[WeightedBatch] = []
        missing = num_samples / self._processes
        for number, kept in enumerate(self._kept):
            if missing <= 0:
                break
            data, index = kept.batch.data, number * self._processes + self._rank
            if kept.is_moved:
                data = move_data_to_device(_copied(data), self._device)
            found.append(kept.batch.weighted(data, index, kept.position))
            missing -= kept.batch.size
        return found


def _copied(batch: Any) -> Any:
    """Return a copy of a batch, that shares nothing with it, but without the memory around views."""
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
        if isinstance(part, _ATOMS) or id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, Tensor | np.ndarray):
            found.append(part)
        elif isinstance(part, list | tuple | set | frozenset | deque | dict):
            if not holds_atoms(part):
                pending.extend(part.values() if isinstance(part, dict) else part)
        else:
            pending.extend(part.values() if isinstance(part, Mapping) else ())
            pending.extend(attributes(part).values())
    return found
