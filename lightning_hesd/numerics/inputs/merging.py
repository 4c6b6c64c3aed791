"""Merging of consecutive batches into larger ones, the inverse of cutting; an error says why batches cannot be merged.

Tensors with the samples along their first dimension are concatenated, in lists, tuples and dicts of any depth. All
other values must be equal in all batches. Whether the loss of a merged batch is the mean of theirs is another question.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

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
    flat = [tree_flatten(batch.data) for batch in batches]
    if any(structure != flat[0][1] for _, structure in flat):
        msg = "the batches have different structures"
        raise UnmergeableBatchesError(msg)
    sizes = [batch.length() for batch in batches]
    values = [_merged_values(list(parts), sizes) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    return replace(
        first,
        data=tree_unflatten(values, flat[0][1]),
        weight=math.fsum(batch.weight for batch in batches),
        size=None if first.size is None else math.fsum(batch.num_samples for batch in batches),
        merged_from=tuple(batches),
    )


def _merged_values(values: list[Any], sizes: Sequence[int]) -> Any:
    first = values[0]
    if all(type(value) is Tensor and value.layout is torch.strided for value in values):
        if all(value.ndim and len(value) == size for value, size in zip(values, sizes, strict=True)):
            kinds = {(value.shape[1:], value.dtype, value.device, value.requires_grad) for value in values}
            if len(kinds) > 1 or first.requires_grad:
                msg = "the tensors of the batches differ in shape, dtype or device, or have a graph"
                raise UnmergeableBatchesError(msg)
            return torch.cat(values)
        if all(value.shape == first.shape and torch.equal(value, first) for value in values[1:]):
            return first
    elif isinstance(first, int | float | str | bytes | type(None)) and all(value == first for value in values[1:]):
        return first
    msg = f"the batches hold values of type {type(first).__name__} that are neither of samples nor equal"
    raise UnmergeableBatchesError(msg)
