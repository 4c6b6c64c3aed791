"""Batches of the analysis: their weight in the mean loss, and their position in the epoch."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError, attributes, cut

if TYPE_CHECKING:
    from collections.abc import Sequence

Weigh = Literal["tokens"] | Callable[[Any], float]
"""How a batch is weighed, other than by its number of samples."""

_REMEDY = "pass `batch_weight=`, a function of the batch that returns its weight."


class SkippedBatchError(Exception):
    """The loss function has no loss for this batch, as a `training_step` that returns None: the batch is left out."""


@dataclass(frozen=True)
class WeightedBatch:
    """One batch of the analysis.

    Attributes:
        data: The batch as the loss function takes it.
        weight: Its weight in the mean loss: its number of samples, unless the user counts otherwise.
        index: Its position among the batches of all processes; it seeds whatever is random in the forward pass.
        is_padding: Whether it only lets a process take part that has no batch of its own, and counts for nothing.
        position: Its position in an epoch of training, the `batch_idx` of a training step; None: its index.
        size: Its number of samples; None: its weight.
        weigh: The weight of a batch, or of a part of one, as a function of its data; None: its number of samples.
    """

    data: Any
    weight: float
    index: int
    is_padding: bool = field(default=False, kw_only=True)
    position: int | None = field(default=None, kw_only=True)
    size: float | None = field(default=None, kw_only=True)
    weigh: Callable[[Any], float] | None = field(default=None, kw_only=True)

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

    @property
    def num_samples(self) -> float:
        """Its number of samples, as far as known."""
        return self.weight if self.size is None else self.size

    def copy(self) -> WeightedBatch:
        """Return a copy for code that may change its batch in place, which every evaluation must find unchanged."""
        others = {"position": self.position, "size": self.size, "weigh": self.weigh}
        return WeightedBatch(copied(self.data), self.weight, self.index, **others)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Let `position_in_epoch` tell the position of this batch meanwhile."""
        token = _position.set(self.index if self.position is None else self.position)
        try:
            yield
        finally:
            _position.reset(token)

    def split(self, parts: int) -> list[WeightedBatch]:
        """Cut the batch into `parts` batches of nearly equal size, or fewer if it has fewer samples.

        What belongs to the samples is cut (see `cuts`); everything else is taken to be common to all of them. Parts
        weigh what `weigh` says if that adds up to the weight of the batch, and those that weigh nothing are left out;
        otherwise the weight is shared out by size.

        Raises:
            UnsplittableBatchError: If it cannot be told what belongs to the samples, or nothing does.
        """
        size = self.length()
        ends = np.linspace(0, size, min(parts, size) + 1).round().astype(int).tolist()
        return self.cut_at(ends[1:-1]) if len(ends) > 2 else [self]

    def cut_at(self, positions: Sequence[int]) -> list[WeightedBatch]:
        """Cut the batch before the samples at these positions, as `split` does."""
        size = self.length()
        ranges = [slice(start, end) for start, end in itertools.pairwise([0, *positions, size])]
        sizes = [chosen.stop - chosen.start for chosen in ranges]
        data = cut(self.data, size, ranges)
        weights = [] if self.weigh is None else [float(self.weigh(part)) for part in data]
        if not weights or min(weights) < 0 or not math.isclose(math.fsum(weights), self.weight, rel_tol=1e-6):
            weights = [self.weight * n / size for n in sizes]
        per_sample = self.num_samples / size
        return [
            replace(self, data=part, weight=weight, size=None if self.size is None else n * per_sample)
            for part, weight, n in zip(data, weights, sizes, strict=True)
            if weight > 0
        ]

    def length(self) -> int:
        """Return the length of the dimension to cut: the number of samples, if there is a tensor of that length.

        Raises:
            UnsplittableBatchError: If the samples are along another dimension than the first.
        """
        size = self.num_samples
        if size in _lengths(self.data):
            return int(size)
        if any(isinstance(t, Tensor) and t.ndim > 1 and t.size(1) == size for t in _tensors(self.data)):
            msg = f"the {size:.0f} samples of a batch are along the second dimension of its tensors"
            raise UnsplittableBatchError(msg)
        return int(batch_size(self.data))


_position: ContextVar[int] = ContextVar("position", default=0)


def position_in_epoch() -> int:
    """Return the position in the epoch of the batch that is being evaluated; 0 outside of an evaluation."""
    return _position.get()


def copied(data: Any) -> Any:
    """Return a copy of a batch, or the batch itself if it cannot be copied."""
    try:
        return copy.deepcopy(data)
    except Exception:  # noqa: BLE001 - batches of any kind are analysed
        return data


def batch_size(batch: Any) -> float:
    """Return the number of samples of a batch: the length of its first tensor that is not a scalar.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    return count_samples(batch)[0]


def weighted_batches(batches: Iterable[Any], weigh: Weigh | None = None) -> list[WeightedBatch]:
    """Return batches with their weights, by default their numbers of samples; warn once if one of these is a guess.

    Raises:
        ValueError: If a batch holds no tensor, or a weight is not positive.
    """
    found: list[WeightedBatch] = []
    doubts: list[str] = []
    for index, batch in enumerate(batches):
        size, weight, doubt = measured(batch, weigh)
        if doubt is not None:
            doubts.append(doubt)
        found.append(WeightedBatch(batch, weight, index, size=size))
    if doubts:
        warnings.warn(f"lightning_hesd: {doubts[0]}", RuntimeWarning, stacklevel=3)
    return found


def measured(batch: Any, weigh: Weigh | None, made_from: int | None = None) -> tuple[float, float, str | None]:
    """Return the number of samples of a batch, its weight, and why that is a guess; None if it is none.

    Args:
        batch: The batch.
        weigh: How it is weighed; by its tokens, which takes the loss, it is later (see `tokens`).
        made_from: As for `count_samples`.

    Raises:
        ValueError: If the batch holds no tensor, and its weight is its number of samples.
    """
    if weigh is None:
        size, doubt = count_samples(batch, made_from)
        return size, size, doubt
    try:
        size, _ = count_samples(batch, made_from)
    except ValueError:
        if not callable(weigh):
            raise
        weight = weigh(batch)
        return weight, weight, None
    return size, weigh(batch) if callable(weigh) else size, None


def count_samples(batch: Any, made_from: int | None = None) -> tuple[float, str | None]:
    """Return the number of samples of a batch, and why that is a guess; None if it is none.

    Args:
        batch: The batch.
        made_from: Number of positions of the dataset that it was made from, if known; a collate function may have
            left some out, or added others.

    Raises:
        ValueError: If the batch holds no tensor, and it is not known what it was made from.
    """
    lengths = _lengths(batch)
    if made_from is None:
        return _count(batch, lengths)
    known = [length for length in lengths if length is not None]
    if not known or made_from in known or _has_entries(batch, made_from):
        return float(made_from), None
    shapes = [tensor.shape for tensor in _tensors(batch) if tensor.ndim]
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
        msg = f"cannot tell the number of samples of a batch of type {type(batch).__name__}: pass `batch_weight`."
        raise ValueError(msg)
    known = [length for length in lengths if length is not None] or [1]
    if (stated := _stated_size(batch, known)) is not None:
        return float(stated), None
    if len(set(known)) > 1:
        obstacle = f"its tensors have first dimensions {_listed(known)}"
    elif lengths[0] is None and len(lengths) > 1:
        obstacle = "its first tensor is a scalar"
    else:
        return float(known[0]), None
    return float(known[0]), (
        f"a batch of type {type(batch).__name__} is taken to hold {known[0]} samples, the first dimension of its first "
        f"tensor that has one, but {obstacle}: {_REMEDY}"
    )


def _stated_size(batch: Any, lengths: Sequence[int], depth: int = 3) -> int | None:
    """Return the number of samples that a batch, or all parts of it that say, state; None if none does.

    Batches of graphs do, whose tensors have as many rows as there are nodes and edges. It must be the length of a
    tensor, or one less than that of the offsets of graphs; otherwise it is something else, such as a setting.
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


def _lengths(batch: Any) -> list[int | None]:
    """Return the first dimensions of the tensors of a batch, None for scalars."""
    return [_length(tensor) for tensor in _tensors(batch)]


def _length(tensor: Any) -> int | None:
    if isinstance(tensor, PackedSequence):
        return int(tensor.batch_sizes[0])
    with _plainly():
        return int(tensor.size(0)) if tensor.ndim else None


def _plainly() -> Any:
    """Return a context in which tensors of subclasses are read as tensors: those with units may refuse otherwise."""
    return torch._C.DisableTorchFunctionSubclass()  # noqa: SLF001


def _tensors(batch: Any, seen: frozenset[int] = frozenset()) -> Iterable[Any]:
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
        yield from _tensors(part, seen | {id(batch)})


def _parts(batch: Any) -> list[Any]:
    """Return what a batch consists of, by its own account."""
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
    """Return what the built-in base of a container holds; nothing of other objects."""
    kind = type(batch)
    if issubclass(kind, dict):
        return list(dict.values(batch))
    bases: Sequence[Any] = (list, tuple)
    return next((list(base.__iter__(batch)) for base in bases if issubclass(kind, base)), [])


def _has_entries(batch: Any, count: int, depth: int = 3) -> bool:
    """Whether there is a list of so many entries in a batch, not too far down, that are no tensors."""
    if isinstance(batch, list | tuple) and len(batch) == count and not any(isinstance(p, Tensor) for p in batch):
        return True
    parts: Any = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return depth > 1 and any(_has_entries(part, count, depth - 1) for part in parts)


def _is_list_of_tensors(batch: Any, count: int) -> bool:
    """Whether a batch is, or begins with, a list of so many tensors."""
    if not isinstance(batch, list | tuple) or not batch:
        return False
    return (len(batch) == count and isinstance(batch[0], Tensor)) or _is_list_of_tensors(batch[0], count)
