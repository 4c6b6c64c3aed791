"""The memory of dense tensors: saved, compared and restored without harm to autograd graphs.

Memory is compared and written as bytes, and not through operations on tensors, which subclasses and unusual layouts may
not have. A tensor that a graph has saved must keep the values it was saved with: it is replaced by a copy, see
`TensorMemory.restore`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

SMALL = 2**16
"""Bytes up to which memory is compared at every restoration, see `TensorMemory.restore`."""


class Replacer(Protocol):
    """Replaces tensors in all objects that refer to them."""

    def can_replace(self, tensor: Tensor) -> bool:
        """Whether all objects that refer to a tensor can refer to another."""

    def replace(self, tensor: Tensor, other: Tensor) -> None:
        """Make all objects that refer to a tensor refer to another."""


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own: not on the meta device, and not as a wrapper of other tensors."""
    if is_lazy(tensor) or not torch._C._has_storage(tensor):  # noqa: SLF001
        return False
    return tensor.data_ptr() != 0


class _Alias:
    """One of the tensors that share a memory, apart from the values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.data = tensor.data  # stays in this memory if `tensor.data` is assigned
        self._version = _version(tensor)
        self._form = _form(tensor)

    def has_moved(self) -> bool:
        """Whether the tensor has been given other memory, or another shape."""
        return _form(self.tensor) != self._form

    def was_written(self) -> bool:
        """Whether autograd has counted a change in place."""
        return _version(self.tensor) != self._version

    def use_count(self) -> int:
        """Return the number of references to the tensor: those of graphs, and Python's."""
        tensor: Any = self.tensor
        return tensor._use_count()  # type: ignore[no-any-return]  # noqa: SLF001

    def restore_form(self) -> None:
        if self.has_moved():
            self.tensor.data = self.data

    def count_change(self) -> None:
        """Count the restoration as a change in place, so that graphs that hold the tensor raise in their backward."""
        if not self.tensor.is_inference():
            torch.autograd.graph.increment_version(self.tensor)
        self.save_version()

    def save_version(self) -> None:
        self._version = _version(self.tensor)

    def can_be_copied(self) -> bool:
        """Whether `copy_to` makes a tensor of the same kind."""
        tensor = self.tensor
        special = tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg()
        return type(tensor) in {Tensor, nn.Parameter} and tensor.is_leaf and not special

    def copy_to(self, storage: torch.UntypedStorage) -> Tensor:
        """Return a tensor like this one in a copy of the storage."""
        tensor = self.tensor
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copy.set_(storage, self.data.storage_offset(), self.data.shape, self.data.stride())
        copy = nn.Parameter(copy) if type(tensor) is nn.Parameter else copy
        vars(copy).update(vars(tensor))
        return copy.requires_grad_(tensor.requires_grad)


class TensorMemory:
    """A range of bytes of a storage, with the tensors that share it."""

    description = "the memory of a tensor"

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._start, self._stop = storage.nbytes(), 0
        self._aliases: list[_Alias] = []
        self._originals: list[_Alias] = []
        self._has_changed = False

    def add(self, tensor: Tensor) -> None:
        """Extend the range by a tensor of this storage, unless the memory is saved already."""
        if self._originals:
            return
        start = int(tensor.storage_offset()) * tensor.element_size()
        stop = self._storage.nbytes()
        if not tensor.is_nested:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            stop = start + extent * tensor.element_size()
        self._start, self._stop = min(self._start, start), max(self._stop, stop)
        self._aliases.append(_Alias(tensor))

    def save(self) -> None:
        """Copy the bytes, once."""
        if self._originals:
            return
        self._start -= self._start % 8
        self._stop = min(self._stop + -self._stop % 8, self._storage.nbytes())
        self._originals = self._aliases
        self._now = _as_integers(self._storage, self._start, self._stop)
        self._saved = self._now.clone()
        self._use_counts = self._count_uses()

    def restore(self, replacer: Replacer | None, *, thorough: bool) -> bool:
        """Restore values, shapes and addresses, and return whether they had changed.

        Where a graph holds one of the tensors, writing to it would change the graph's derivatives: all of the tensors
        are replaced by copies with the saved values. Where that is impossible, they are written to, and the backward
        of the graph will raise.

        Args:
            replacer: Puts copies in the place of tensors; None: the original tensors are restored, in any case.
            thorough: Whether to compare large memory without known changes, too. (Autograd counts no changes through
                `.data`, NumPy or some kernels.)
        """
        if replacer is None and self._aliases is not self._originals:
            self._aliases = self._originals
            self._now = _as_integers(self._storage, self._start, self._stop)
        if not any(alias.has_moved() for alias in self._aliases) and not self._is_changed(thorough=thorough):
            return False
        self._has_changed = True
        if replacer is not None and self._is_held_by_graphs() and self._can_be_replaced(replacer):
            self._replace(replacer)
            return True
        for alias in self._aliases:
            alias.restore_form()
        if self._is_freed():
            self._now.untyped_storage().resize_(self._stop)
        self._now.copy_(self._saved)
        for alias in self._aliases:
            alias.count_change()
        return True

    def _is_freed(self) -> bool:
        return self._now.untyped_storage().nbytes() < self._stop

    def _is_changed(self, *, thorough: bool) -> bool:
        if self._is_freed():
            return True
        is_cheap = self._saved.device.type == "cpu"  # to compare; an accelerator would have to be waited for
        if self._has_changed and not is_cheap and not self._is_held_by_graphs():
            return True
        written = [alias for alias in self._aliases if alias.was_written()]
        if not (written or thorough or self._has_changed or (is_cheap and self._saved.nbytes <= SMALL)):
            return False
        if not torch.equal(self._now, self._saved):
            return True
        for alias in written:
            alias.save_version()
        return False

    def _count_uses(self) -> list[int]:
        """Return the numbers of references to each tensor and to the storage: of graphs and views, and Python's."""
        counts = [alias.use_count() for alias in self._aliases]
        storage: Any = self._aliases[0].data.untyped_storage()
        return [*counts, torch._C._storage_Use_Count(storage._cdata)]  # noqa: SLF001

    def _is_held_by_graphs(self) -> bool:
        return any(now > before for now, before in zip(self._count_uses(), self._use_counts, strict=True))

    def _can_be_replaced(self, replacer: Replacer) -> bool:
        return all(alias.can_be_copied() and replacer.can_replace(alias.tensor) for alias in self._aliases)

    def _replace(self, replacer: Replacer) -> None:
        storage = self._storage.clone()  # type: ignore[no-untyped-call]
        self._now = _as_integers(storage, self._start, self._stop)
        self._now.copy_(self._saved)
        copies = [alias.copy_to(storage) for alias in self._aliases]
        for alias, copy in zip(self._aliases, copies, strict=True):
            replacer.replace(alias.tensor, copy)
        self._aliases = [_Alias(copy) for copy in copies]
        self._use_counts = self._count_uses()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, () if tensor.is_nested else (tensor.shape, tensor.stride())


def _as_integers(storage: torch.UntypedStorage, start: int, stop: int) -> Tensor:
    """Return a range of bytes of a storage as a tensor of the widest integers that fit."""
    width = next(w for w in (8, 4, 2, 1) if start % w == stop % w == 0)
    dtype = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, start // width, ((stop - start) // width,), (1,))
