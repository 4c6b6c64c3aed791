"""Batches of the analysis: their weight in the mean loss, and how to cut them into smaller ones."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class WeightedBatch:
    """One batch of the analysis.

    Attributes:
        data: The batch as the loss function takes it.
        weight: Its weight in the mean loss: its number of samples.
        index: Its position among the batches of all processes; it seeds whatever is random in the forward pass.
        is_spare: Whether it only lets a process take part that has no batch of its own, and counts for nothing.
    """

    data: Any
    weight: float
    index: int
    is_spare: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the weight.

        Raises:
            ValueError: If it is not positive and finite.
        """
        if not 0 < self.weight < math.inf:
            msg = f"`batch_weight` must be positive and finite, got {self.weight} for batch {self.index}."
            raise ValueError(msg)

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"batch {self.index}"

    def copy(self) -> WeightedBatch:
        """Return a copy for code that may change its batch in place, which every evaluation must find unchanged."""
        try:
            data = copy.deepcopy(self.data)
        except Exception:  # noqa: BLE001 - what cannot be copied is passed on as it is
            data = self.data
        return WeightedBatch(data, self.weight, self.index)

    def split(self, parts: int) -> list[WeightedBatch]:
        """Cut the batch into `parts` batches of nearly equal size, or fewer if it has fewer samples.

        Every tensor and array whose first dimension is that of the first tensor is cut; everything else is taken to
        be common to all samples. The weight is shared out by size.
        """
        size = int(batch_size(self.data))
        cuts = np.linspace(0, size, min(parts, size) + 1).round().astype(int).tolist()
        return [
            WeightedBatch(_part(self.data, size, slice(start, end)), self.weight * (end - start) / size, self.index)
            for start, end in itertools.pairwise(cuts)
        ]


def batch_size(batch: Any) -> float:
    """Return the number of samples of a batch as Lightning infers it: the length of its first tensor.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    for tensor in _tensors(batch):
        return float(tensor.shape[0]) if tensor.ndim else 1.0
    msg = f"cannot tell the number of samples of a batch of type {type(batch).__name__}: pass `batch_weight`."
    raise ValueError(msg)


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, np.ndarray):
        return
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from _tensors([getattr(batch, f.name) for f in fields(batch)])
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        for part in batch:
            yield from _tensors(part)


def _part(batch: Any, size: int, chosen: slice) -> Any:
    """Return the chosen samples of a batch, in the structure it has."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch[chosen] if batch.ndim and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        parts: Any = copy.copy(batch)
        for key, value in batch.items():
            parts[key] = _part(value, size, chosen)
        return parts
    if is_dataclass(batch) and not isinstance(batch, type):
        parts = copy.copy(batch)
        for f in fields(batch):
            object.__setattr__(parts, f.name, _part(getattr(batch, f.name), size, chosen))
        return parts
    if isinstance(batch, list):
        return [_part(value, size, chosen) for value in batch]
    if isinstance(batch, tuple):
        values = [_part(value, size, chosen) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    return batch
