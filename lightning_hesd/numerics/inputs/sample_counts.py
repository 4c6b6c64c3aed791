"""The number of samples of a batch: the length of its tensors, or what the batch itself states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_hesd.numerics.isolation.attributes import attributes

if TYPE_CHECKING:
    from collections.abc import Sequence

_REMEDY = "pass `batch_weight=`, a function of the batch that returns its weight."


def batch_size(batch: Any) -> float:
    """Return the number of samples of a batch: the length of its first tensor that is not a scalar.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    return count_samples(batch)[0]


def count_samples(batch: Any, made_from: int | None = None) -> tuple[float, str | None]:
    """Return the number of samples of a batch, and the reason why that is a guess; None if it is not.

    Args:
        batch: The batch.
        made_from: Number of samples of the dataset in the batch, if known; a collate function may have dropped or
            added some.

    Raises:
        ValueError: If the batch holds no tensor, and `made_from` is None.
    """
    lengths = lengths_of(batch)
    if made_from is None:
        return _count(batch, lengths)
    known = [length for length in lengths if length is not None]
    if not known or made_from in known or _has_entries(batch, made_from):
        return float(made_from), None
    shapes = [tensor.shape for tensor in tensors_of(batch) if tensor.ndim]
    along_second = all(len(shape) > 1 and shape[1] == made_from for shape in shapes)
    if len(set(known)) == 1 and not along_second and not _is_list_of_tensors(batch, made_from):
        return float(known[0]), None
    return float(made_from), (
        f"a batch of type {type(batch).__name__} is taken to hold the {made_from} samples that it was made from, but "
        f"its tensors have first dimensions {_listed(known)}, so that `collate_fn` may have changed their number: "
        f"{_REMEDY}"
    )


def _count(batch: Any, lengths: Sequence[int | None]) -> tuple[float, str | None]:
    if not lengths:
        msg = (
            f"cannot tell the number of samples of a batch of type {type(batch).__name__}, which holds no tensor: pass "
            "`batch_weight`, a function batch -> number of samples."
        )
        raise ValueError(msg)
    known = [length for length in lengths if length is not None] or [1]
    if (stated := _stated_size(batch, known)) is not None:
        return float(stated), None
    if len(set(known)) > 1:
        reason = f"its tensors have first dimensions {_listed(known)}"
    elif lengths[0] is None and len(lengths) > 1:
        reason = "its first tensor is a scalar"
    else:
        return float(known[0]), None
    return float(known[0]), (
        f"a batch of type {type(batch).__name__} is taken to hold {known[0]} samples, the first dimension of its first "
        f"tensor that has one, but {reason}: {_REMEDY}"
    )


def _stated_size(batch: Any, lengths: Sequence[int], depth: int = 3) -> int | None:
    """Return the attribute `batch_size` or `num_graphs` of a batch, or the one value of its parts; None without one.

    Batches of graphs do, whose tensors have as many rows as there are nodes and edges. It must be the length of a
    tensor, or one less than that of the offsets of graphs; otherwise the attribute has another meaning.
    """
    if isinstance(batch, list | tuple | dict):
        found = (
            {_stated_size(part, lengths, depth - 1) for part in _plain_parts(batch)} - {None} if depth > 1 else set()
        )
        return found.pop() if len(found) == 1 else None
    if isinstance(batch, Tensor | PackedSequence | nn.Module | type):
        return None
    for name in ("batch_size", "num_graphs"):
        with contextlib.suppress(Exception):  # of objects that cannot be read
            size = getattr(batch, name)
            if type(size) is int and size > 0 and not {size, size + 1}.isdisjoint(lengths):
                return size
    return None


def _listed(lengths: Sequence[int]) -> str:
    distinct = list(dict.fromkeys(lengths))
    return ", ".join(map(str, distinct[:4])) + (", ..." if len(distinct) > 4 else "")


def lengths_of(batch: Any) -> list[int | None]:
    """Return the first dimensions of the tensors of a batch, None for scalars."""
    return [_length(tensor) for tensor in tensors_of(batch)]


def _length(tensor: Any) -> int | None:
    if isinstance(tensor, PackedSequence):
        return int(tensor.batch_sizes[0])
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - tensors with units act as plain ones
        return int(tensor.size(0)) if tensor.ndim else None


def tensors_of(batch: Any, seen: frozenset[int] = frozenset()) -> Iterable[Any]:
    """Yield the tensors of a batch, packed sequences among them."""
    if isinstance(batch, Tensor | PackedSequence):
        yield batch
        return
    if isinstance(batch, np.ndarray | str | bytes | Iterator | nn.Module | type) or id(batch) in seen:
        return
    try:
        parts = _parts(batch)
    except Exception:  # noqa: BLE001 - objects that cannot be read by their own methods
        parts = _plain_parts(batch)
    for part in parts:
        yield from tensors_of(part, seen | {id(batch)})


def _parts(batch: Any) -> list[Any]:
    """Return the values of a container, the fields of a dataclass or the attributes of an object, by its methods."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if is_dataclass(batch):
        return [getattr(batch, f.name) for f in fields(batch)]
    if isinstance(batch, Iterable):
        parts = list(batch)
        # As the characters of a text are texts, an event of a batch of events may be a batch of events, without end.
        if isinstance(batch, list | tuple) or not any(type(part) is type(batch) for part in parts):
            return parts
    return [] if callable(batch) else list(attributes(batch).values())


def _plain_parts(batch: Any) -> list[Any]:
    """Return the values of a subclass of a built-in container, by the methods of that; an empty list for others."""
    kind = type(batch)
    if issubclass(kind, dict):
        return list(dict.values(batch))
    bases: Sequence[Any] = (list, tuple)
    return next((list(base.__iter__(batch)) for base in bases if issubclass(kind, base)), [])


def _has_entries(batch: Any, count: int, depth: int = 3) -> bool:
    """Whether a batch holds, at most `depth` levels down, a list of `count` entries that are not tensors."""
    if isinstance(batch, list | tuple) and len(batch) == count and not any(isinstance(p, Tensor) for p in batch):
        return True
    parts: Any = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return depth > 1 and any(_has_entries(part, count, depth - 1) for part in parts)


def _is_list_of_tensors(batch: Any, count: int) -> bool:
    """Whether a batch is, or begins with, a list of `count` tensors."""
    if not isinstance(batch, list | tuple) or not batch:
        return False
    return (len(batch) == count and isinstance(batch[0], Tensor)) or _is_list_of_tensors(batch[0], count)
