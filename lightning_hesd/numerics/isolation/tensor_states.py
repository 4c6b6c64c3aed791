"""The state of tensors and arrays beside the memory of dense tensors: sparse values, gradients, NumPy arrays."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_hesd.numerics.isolation.tensor_memory import SMALL, has_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_SPARSE = {torch.sparse_coo, *_COMPRESSED}


def is_opaque(tensor: Tensor) -> bool:
    """Whether a tensor has no storage of elements: sparse ones, and those in the form of oneDNN."""
    return tensor.layout in _SPARSE or tensor.is_mkldnn


def size_in_memory(tensor: Tensor) -> int:
    """Return the bytes that a copy of a tensor takes; for a view, those of the whole storage."""
    with torch._C.DisableTorchFunction():  # noqa: SLF001 - subclasses may not have the attributes
        if is_opaque(tensor):
            return sum(values.nbytes for values in _values(tensor))
        return tensor.untyped_storage().nbytes() if has_memory(tensor) else 0


class OpaqueTensorState:
    """A sparse tensor, or one in the form of oneDNN."""

    def __init__(self, tensor: Tensor) -> None:
        self.description = f"a tensor of layout {tensor.layout}"
        self._tensor = tensor
        self._saved = tensor.detach().clone()
        self._values = _values(self._saved)

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Restore the values, and return whether they had changed."""
        now = _values(self._tensor)
        if len(now) == len(self._values) and all(map(torch.equal, now, self._values)):
            return False
        if self._tensor.layout in _COMPRESSED and now[-1].shape != self._values[-1].shape:
            self._tensor.resize_as_sparse_(self._saved)
        self._tensor.copy_(self._saved)  # assigning to `.data` has no effect on compressed ones
        return True


class LeafState:
    """Whether a leaf of graphs requires grad, its gradient, and the hooks on it."""

    description = "the gradient of a tensor"

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._before = _gradient_state(tensor)

    def clear(self) -> None:
        """Remove gradient and hooks, until the next restoration."""
        self._set((self._tensor.requires_grad, None, None, None))

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Restore the state, and return whether it had changed."""
        return self._set(self._before)

    def _set(self, wanted: tuple[Any, ...]) -> bool:
        tensor: Any = self._tensor
        now = _gradient_state(tensor)
        if now[0] is not wanted[0]:
            tensor.requires_grad_(wanted[0])
        if all(map(is_, now, wanted)):
            return False
        tensor.grad, tensor._backward_hooks, tensor._post_accumulate_grad_hooks = wanted[1:]  # noqa: SLF001
        return True


def _gradient_state(tensor: Any) -> tuple[Any, ...]:
    return tensor.requires_grad, tensor.grad, tensor._backward_hooks, tensor._post_accumulate_grad_hooks  # noqa: SLF001


class ArrayState:
    """The elements of a NumPy array."""

    description = "an array"

    def __init__(self, array: Any) -> None:
        self._array = array
        self._saved = array.copy()
        self._is_always_compared = array.nbytes <= SMALL

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Restore the elements, and return whether they had changed."""
        if not (self._is_always_compared or thorough) or not self._differs():
            return False
        self._is_always_compared = True
        np.copyto(self._array, self._saved)
        return True

    def _differs(self) -> bool:
        if self._array.dtype.hasobject:
            return not all(map(is_, self._array.flat, self._saved.flat))
        return self._array.tobytes() != self._saved.tobytes()  # type: ignore[no-any-return]


def _values(tensor: Tensor) -> Sequence[Tensor]:
    """Return the indices and values of a sparse tensor; a dense copy of one in the form of oneDNN."""
    tensor = tensor.detach()
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]  # noqa: SLF001 - the public ones refuse uncoalesced tensors
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
