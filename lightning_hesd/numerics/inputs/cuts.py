"""Cutting a batch of any structure into chunks of samples; an error says why a batch cannot be cut.

Tensors, arrays and packed sequences belong to the samples if their first dimension is that of the samples, lists if
they have one entry for each sample. Containers, dataclasses and objects with attributes are copied, and their values
cut. A batch is refused where it might be cut wrongly: if it holds whole numbers that may be positions of samples, or
an object of unknown kind with as many entries as there are samples.
"""

from __future__ import annotations

import copy
import types
from collections import UserDict, deque
from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lightning_hesd.numerics.isolation.attributes import attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_COMMON = (
    *(type(None), str, bytes, int, float, complex, np.generic, torch.Size, torch.dtype, torch.device),
    *(type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, nn.Module),
)
"""Types of values that are common to all samples."""

_POSITIONS = (torch.int32, torch.int64, np.dtype("int32"), np.dtype("int64"))
"""Dtypes of whole numbers that may be positions of samples."""


class UnsplittableBatchError(ValueError):
    """Samples cannot be divided into groups; the message says why."""


def cut(batch: Any, size: int, ranges: Sequence[slice]) -> list[Any]:
    """Return the chunks of a batch of `size` samples: those of each range, in the structure of the batch.

    Raises:
        UnsplittableBatchError: If no value belongs to the samples, or it is not clear which do.
    """
    return [_Cutter(batch, size, chosen).part() for chosen in ranges]


class _Cutter:
    """Cuts the samples of one range out of a batch."""

    def __init__(self, batch: Any, size: int, chosen: slice) -> None:
        self._batch = batch
        self._size = size
        self._chosen = chosen
        self._has_cut = False
        self._made: dict[int, Any] = {}  # objects may refer to each other

    def part(self) -> Any:
        try:
            part = self._part(self._batch)
        except UnsplittableBatchError:
            raise
        except Exception as error:
            msg = f"a batch of type {type(self._batch).__name__} cannot be cut ({type(error).__name__}: {error})"
            raise UnsplittableBatchError(msg) from error
        if not self._has_cut:
            msg = (
                f"nothing in a batch of type {type(self._batch).__name__} has the number of samples, {self._size}, as "
                "its first dimension"
            )
            raise UnsplittableBatchError(msg)
        return part

    def _part(self, value: Any) -> Any:
        if isinstance(value, _COMMON) or id(value) in self._made:
            return self._made.get(id(value), value)
        ways: list[tuple[Any, Callable[[Any], Any]]] = [
            (PackedSequence, self._packed),
            ((Tensor, np.ndarray), self._array),
            ((dict, UserDict), self._mapping),
            ((list, tuple, deque), self._sequence),
            (object, self._object),
        ]
        return next(part_of for kinds, part_of in ways if isinstance(value, kinds))(value)

    def _array(self, array: Any) -> Any:
        if self._is_of_samples(array):
            self._has_cut = True
            part = array[self._chosen]
            # Each evaluation copies its batch, and a copy of a view is one of all that the view is of.
            return part.clone() if isinstance(part, Tensor) else part.copy()
        if array.ndim and array.dtype in _POSITIONS:
            msg = (
                f"a batch of {self._size} samples holds whole numbers of shape {tuple(array.shape)}, which may be "
                "positions of samples in the batch"
            )
            raise UnsplittableBatchError(msg)
        return array

    def _packed(self, sequences: PackedSequence) -> PackedSequence:
        if int(sequences.batch_sizes[0]) != self._size:
            msg = f"a batch of {self._size} samples holds {int(sequences.batch_sizes[0])} packed sequences"
            raise UnsplittableBatchError(msg)
        self._has_cut = True
        # Without sorted indices they are sorted, and so is a part of them.
        return pack_sequence(unpack_sequence(sequences)[self._chosen], enforce_sorted=sequences.sorted_indices is None)

    def _mapping(self, mapping: Any) -> Any:
        part = self._made[id(mapping)] = copy.copy(mapping)
        for key, value in mapping.items():
            part[key] = self._part(value)
        self._cut_attributes(part, but=("data",) if isinstance(mapping, UserDict) else ())
        return part

    def _sequence(self, values: Any) -> Any:
        fields = hasattr(values, "_fields")  # of a named tuple
        if not fields and len(values) == self._size and not self._is_of_samples(values):
            self._has_cut = True
            return type(values)(list(values)[self._chosen])
        parts = [self._part(value) for value in values]
        return type(values)(*parts) if fields else type(values)(parts)

    def _is_of_samples(self, value: Any) -> bool:
        """Whether a value is an array with the samples along its first dimension, or a container of such arrays."""
        if isinstance(value, Tensor | np.ndarray):
            return value.ndim > 0 and len(value) == self._size
        if isinstance(value, list | tuple | Mapping):
            return any(map(self._is_of_samples, value.values() if isinstance(value, Mapping) else value))
        return False

    def _object(self, value: Any) -> Any:
        """Return a copy of an object with its attributes cut; an object without values of samples stays as it is.

        Raises:
            UnsplittableBatchError: If the object has as many entries as there are samples, or unknown ones.
        """
        part = copy.copy(value) if attributes(value) and not isinstance(value, Iterator) else value
        if part is not value:
            self._made[id(value)] = part
            before, self._has_cut = self._has_cut, False
            self._cut_attributes(part)
            if self._has_cut:
                return part
            self._made[id(value)], self._has_cut = value, before
        if isinstance(value, Iterator | Mapping) or (isinstance(value, Sized) and len(value) == self._size):
            msg = f"a batch holds an object of type {type(value).__name__}, and there is no rule for cutting it"
            raise UnsplittableBatchError(msg)
        return value

    def _cut_attributes(self, part: Any, but: Sequence[str] = ()) -> None:
        for name, value in attributes(part).items():
            if name not in but:
                object.__setattr__(part, name, self._part(value))
