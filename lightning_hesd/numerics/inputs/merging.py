"""Merging of consecutive batches into larger ones, the inverse of cutting; an error says why batches cannot be merged.

Tensors with the samples along their first dimension, or several rows for each, are concatenated, in lists, tuples,
dicts and dataclasses of any depth. All other values must be equal in all batches. `analysis/batch_size.py` tests
whether the loss of a merged batch is the mean of theirs.
"""

from __future__ import annotations

import copy
import math
from collections import UserDict
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.numerics.inputs.batches import WeightedBatch


class UnmergeableBatchesError(ValueError):
    """Batches cannot be merged into one; the message says why."""


def in_groups(batches: Sequence[WeightedBatch], max_samples: float) -> list[list[WeightedBatch]]:
    """Divide batches into the fewest groups of about equally many samples, in their order.

    A group holds at most `max_samples`, or little more, or a single batch.
    """
    sizes = [batch.num_samples for batch in batches]
    count = max(math.ceil(math.fsum(sizes) / max_samples), 1)
    share = math.fsum(sizes) / count
    groups: list[list[WeightedBatch]] = [[] for _ in range(count)]
    before = 0.0
    for batch, size in zip(batches, sizes, strict=True):
        middle = before + size / 2
        groups[min(int(middle / share), count - 1)].append(batch)
        before += size
    return [group for group in groups if group]


def merged(batches: Sequence[WeightedBatch]) -> WeightedBatch:
    """Return one batch with the samples and the weight of several.

    Raises:
        UnmergeableBatchesError: If the batches have another structure, or values that are neither of samples nor equal.
    """
    first, *others = batches
    if not others:
        return first
    sizes = [batch.length() for batch in batches]
    return replace(
        first,
        data=_merged([batch.data for batch in batches], sizes),
        weight=math.fsum(batch.weight for batch in batches),
        size=None if first.size is None else math.fsum(batch.num_samples for batch in batches),
        merged_from=tuple(batches),
    )


def _merged(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Return one value for those of several batches with these numbers of samples.

    Raises:
        UnmergeableBatchesError: If there is no such value.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        msg = f"the batches hold a {type(first).__name__} and other types in the same place"
        raise UnmergeableBatchesError(msg)
    if isinstance(first, Tensor):
        return _merged_tensors(values, sizes)
    if isinstance(first, dict | UserDict | list | tuple) or is_dataclass(first):
        return _merged_container(values, sizes)
    if isinstance(first, int | float | str | bytes | type(None)) and all(value == first for value in values):
        return first
    msg = f"the batches hold values of type {type(first).__name__} that are neither of samples nor equal"
    raise UnmergeableBatchesError(msg)


def _merged_tensors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    first = tensors[0]
    if type(first) is not Tensor or any(tensor.layout != torch.strided or tensor.requires_grad for tensor in tensors):
        msg = "the batches hold tensors of a special kind, or with a graph"
        raise UnmergeableBatchesError(msg)
    rows = {len(tensor) / size if tensor.ndim else 0.0 for tensor, size in zip(tensors, sizes, strict=True)}
    if len(rows) == 1 and (count := rows.pop()) >= 1 and count.is_integer():  # so many rows per sample
        if len({(tensor.shape[1:], tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            msg = "the samples of the batches differ in shape, dtype or device"
            raise UnmergeableBatchesError(msg)
        return torch.cat(list(tensors))
    if any(tensor.shape != first.shape or not torch.equal(tensor, first) for tensor in tensors):
        msg = "the batches hold tensors that are neither of samples nor equal"
        raise UnmergeableBatchesError(msg)
    return first


def _merged_container(containers: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = containers[0]
    if isinstance(first, list | tuple):
        if len({len(container) for container in containers}) > 1:
            msg = "the batches hold lists of unequal lengths"
            raise UnmergeableBatchesError(msg)
        parts = [_merged(values, sizes) for values in zip(*containers, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    whole = copy.copy(first)
    if is_dataclass(first):
        for field in fields(first):
            part = _merged([getattr(container, field.name) for container in containers], sizes)
            object.__setattr__(whole, field.name, part)
        return whole
    if any(container.keys() != first.keys() for container in containers):
        msg = "the batches have unequal keys"
        raise UnmergeableBatchesError(msg)
    for key in first:
        whole[key] = _merged([container[key] for container in containers], sizes)
    return whole
