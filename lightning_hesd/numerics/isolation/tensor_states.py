"""Tensors as they were: their memory, of whatever kind they are, and how to put it back without harm to graphs.

Memory is compared and written byte by byte, whatever the elements mean, and not through operations on the tensors,
which subclasses and unusual layouts may not have. A tensor that a graph has saved must keep the values it was saved
with: it is replaced by a copy, see `Memory.restore`.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL = 2**16
"""Bytes up to which memory is compared at every restoration; see `Memory.restore`."""

_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_SPARSE = {torch.sparse_coo, *_COMPRESSED}


class References(Protocol):
    """The places from which Python refers to tensors."""

    def can_replace(self, tensor: Tensor) -> bool:
        """Whether another tensor can be put in all of its places."""

    def replace(self, tensor: Tensor, other: Tensor) -> None:
        """Put another tensor in its places."""


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own: not one on the meta device, nor one that only wraps others."""
    if is_lazy(tensor) or not torch._C._has_storage(tensor):  # noqa: SLF001
        return False
    return tensor.data_ptr() != 0


def is_opaque(tensor: Tensor) -> bool:
    """Whether a tensor keeps its values elsewhere than in a storage: in sparse or oneDNN's own form."""
    return tensor.layout in _SPARSE or tensor.is_mkldnn


def size_in_memory(tensor: Tensor) -> int:
    """Return the bytes that a copy of a tensor takes, or that lie behind it if it is a view."""
    with torch._C.DisableTorchFunction():  # noqa: SLF001 - subclasses may do without
        if is_opaque(tensor):
            return sum(part.nbytes for part in _parts(tensor))
        return tensor.untyped_storage().nbytes() if has_memory(tensor) else 0


class _Member:
    """One of the tensors that lie in the same memory: what it is, apart from its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.alias = tensor.data  # in the same memory, which `tensor.data = ...` would leave
        self._version = _version(tensor)
        self._form = _form(tensor)

    def is_elsewhere(self) -> bool:
        """Whether the tensor has been given other memory, or another shape."""
        return _form(self.tensor) != self._form

    def is_touched(self) -> bool:
        """Whether autograd has noted a change in place."""
        return _version(self.tensor) != self._version

    def use_count(self) -> int:
        """Return how many hold the tensor: graphs, beside Python."""
        tensor: Any = self.tensor
        return tensor._use_count()  # type: ignore[no-any-return]  # noqa: SLF001

    def bring_back(self) -> None:
        if self.is_elsewhere():
            self.tensor.data = self.alias

    def note_change(self) -> None:
        """Count the restoration as a change in place: a graph that holds the tensor will refuse to go on."""
        if not self.tensor.is_inference():
            torch.autograd.graph.increment_version(self.tensor)
        self.note_version()

    def note_version(self) -> None:
        self._version = _version(self.tensor)

    def can_be_copied(self) -> bool:
        """Whether `copied_to` makes a tensor of the same kind."""
        tensor = self.tensor
        special = tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg()
        return type(tensor) in {Tensor, nn.Parameter} and tensor.is_leaf and not special

    def copied_to(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the same tensor in a copy of the storage."""
        tensor = self.tensor
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copy.set_(storage, self.alias.storage_offset(), self.alias.shape, self.alias.stride())
        copy = nn.Parameter(copy) if type(tensor) is nn.Parameter else copy
        vars(copy).update(vars(tensor))
        return copy.requires_grad_(tensor.requires_grad)


class Memory:
    """A stretch of a storage, with the tensors that lie in it."""

    kind = "the memory of a tensor"

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._start, self._stop = storage.nbytes(), 0
        self._members: list[_Member] = []
        self._originals: list[_Member] = []
        self._changes = False

    def add(self, tensor: Tensor) -> None:
        """Let a tensor of this storage take part, unless the memory is saved already."""
        if self._originals:
            return
        start = int(tensor.storage_offset()) * tensor.element_size()
        stop = self._storage.nbytes()
        if not tensor.is_nested:
            reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            stop = start + reach * tensor.element_size()
        self._start, self._stop = min(self._start, start), max(self._stop, stop)
        self._members.append(_Member(tensor))

    def save(self) -> None:
        """Copy what is in the memory, once."""
        if self._originals:
            return
        self._start -= self._start % 8
        self._stop = min(self._stop + -self._stop % 8, self._storage.nbytes())
        self._originals = self._members
        self._now = _integers(self._storage, self._start, self._stop)
        self._saved = self._now.clone()
        self._holders = self._count_holders()

    def restore(self, references: References | None, *, thorough: bool) -> bool:
        """Put values, shapes and places back, and return whether they were changed.

        Where a graph holds one of the tensors, writing to it would change the graph's derivatives: all of them are
        replaced by copies then, which have the values to restore. Where that is impossible, they are written to, and
        the graph will refuse to be differentiated.

        Args:
            references: Where copies can be put; None: the original tensors are restored, in any case.
            thorough: Whether to compare large memory, too, that has never been found changed and of which autograd has
                noted no change. (It notes no changes through `.data`, NumPy or some kernels.)
        """
        if references is None and self._members is not self._originals:
            self._members = self._originals
            self._now = _integers(self._storage, self._start, self._stop)
        if not any(member.is_elsewhere() for member in self._members) and not self._is_changed(thorough=thorough):
            return False
        self._changes = True
        if references is not None and self._is_held() and self._is_replaceable(references):
            self._replace(references)
            return True
        for member in self._members:
            member.bring_back()
        if self._is_freed():
            self._now.untyped_storage().resize_(self._stop)
        self._now.copy_(self._saved)
        for member in self._members:
            member.note_change()
        return True

    def _is_freed(self) -> bool:
        return self._now.untyped_storage().nbytes() < self._stop

    def _is_changed(self, *, thorough: bool) -> bool:
        if self._is_freed():
            return True
        is_cheap = self._saved.device.type == "cpu"  # to compare; the computer would wait for an accelerator
        if self._changes and not is_cheap and not self._is_held():
            return True
        touched = [member for member in self._members if member.is_touched()]
        if not (touched or thorough or self._changes or (is_cheap and self._saved.nbytes <= SMALL)):
            return False
        if not torch.equal(self._now, self._saved):
            return True
        for member in touched:
            member.note_version()
        return False

    def _count_holders(self) -> list[int]:
        """Return how many hold each tensor and the storage: graphs and views, beside Python and this object."""
        counts = [member.use_count() for member in self._members]
        storage: Any = self._members[0].alias.untyped_storage()
        return [*counts, torch._C._storage_Use_Count(storage._cdata)]  # noqa: SLF001

    def _is_held(self) -> bool:
        return any(now > before for now, before in zip(self._count_holders(), self._holders, strict=True))

    def _is_replaceable(self, references: References) -> bool:
        return all(member.can_be_copied() and references.can_replace(member.tensor) for member in self._members)

    def _replace(self, references: References) -> None:
        storage = self._storage.clone()  # type: ignore[no-untyped-call]
        self._now = _integers(storage, self._start, self._stop)
        self._now.copy_(self._saved)
        copies = [member.copied_to(storage) for member in self._members]
        for member, copy in zip(self._members, copies, strict=True):
            references.replace(member.tensor, copy)
        self._members = [_Member(copy) for copy in copies]
        self._holders = self._count_holders()


class OpaqueTensor:
    """A tensor in sparse or oneDNN's own form."""

    def __init__(self, tensor: Tensor) -> None:
        self.kind = f"a tensor of layout {tensor.layout}"
        self._tensor = tensor
        self._saved = tensor.detach().clone()
        self._parts = _parts(self._saved)

    def restore(self, references: References | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Put the values back."""
        now = _parts(self._tensor)
        if len(now) == len(self._parts) and all(map(torch.equal, now, self._parts)):
            return False
        if self._tensor.layout in _COMPRESSED and now[-1].shape != self._parts[-1].shape:
            self._tensor.resize_as_sparse_(self._saved)
        self._tensor.copy_(self._saved)  # assigning to `.data` has no effect on compressed ones
        return True


class Leaf:
    """Whether a leaf of graphs requires grad, its gradient, and the hooks on it."""

    kind = "the gradient of a tensor"

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._before = _gradient_state(tensor)

    def clear(self) -> None:
        """Remove gradient and hooks, until the next restoration."""
        self._set((self._tensor.requires_grad, None, None, None))

    def restore(self, references: References | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Put them back."""
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


class Array:
    """A NumPy array."""

    kind = "an array"

    def __init__(self, array: Any) -> None:
        self._array = array
        self._saved = array.copy()
        self._changes = array.nbytes <= SMALL

    def restore(self, references: References | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Put the elements back."""
        if not (self._changes or thorough) or not self._differs():
            return False
        self._changes = True
        np.copyto(self._array, self._saved)
        return True

    def _differs(self) -> bool:
        if self._array.dtype.hasobject:
            return not all(map(is_, self._array.flat, self._saved.flat))
        return self._array.tobytes() != self._saved.tobytes()  # type: ignore[no-any-return]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, () if tensor.is_nested else (tensor.shape, tensor.stride())


def _integers(storage: torch.UntypedStorage, start: int, stop: int) -> Tensor:
    """Return some bytes of a storage as a tensor of integers, as wide as they go."""
    width = next(w for w in (8, 4, 2, 1) if start % w == stop % w == 0)
    dtype = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, start // width, ((stop - start) // width,), (1,))


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return the values of an opaque tensor, and what says where they belong."""
    tensor = tensor.detach()
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]  # noqa: SLF001 - the public ones refuse those not coalesced
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
