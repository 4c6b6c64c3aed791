"""Batches of an analysis: data, weight in the mean loss, number of samples, and position in the epoch."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError, cut
from lightning_hesd.numerics.inputs.sample_counts import batch_size, count_samples, lengths_of, tensors_of
from lightning_hesd.numerics.isolation.snapshot import restore_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Weigh = Literal["tokens"] | Callable[[Any], float]
"""Weight of a batch, other than its number of samples: by its tokens, or by a function of the batch."""


class SkippedBatchError(Exception):
    """The loss function has no loss for a batch, like a `training_step` that returns None: the batch is left out."""


@dataclass(frozen=True)
class WeightedBatch:
    """One batch of an analysis.

    Attributes:
        data: The batch as the loss function takes it.
        weight: Weight in the mean loss: the number of samples, or the value of `batch_weight`.
        index: Position among the batches of all ranks; it seeds the random numbers of the forward pass.
        is_padding: Whether this is a padding batch of weight zero, for a rank that has no samples.
        position: Position in an epoch of training, the `batch_idx` of a training step; None: the index.
        size: Number of samples; None: the weight.
        weigh: Function from the data of a batch, or of a chunk of it, to its weight; None: the number of samples.
        merged_from: The batches that this one was made from; empty if it was not merged.

    Raises:
        ValueError: If there are no samples, or the weight is not positive and finite.
    """

    data: Any
    weight: float
    index: int
    is_padding: bool = field(default=False, kw_only=True)
    position: int | None = field(default=None, kw_only=True)
    size: float | None = field(default=None, kw_only=True)
    weigh: Callable[[Any], float] | None = field(default=None, kw_only=True)
    merged_from: tuple[WeightedBatch, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.size == 0:
            msg = f"batch {self.index} holds no samples: leave it out."
            raise ValueError(msg)
        if not 0 < self.weight < math.inf:
            msg = f"`batch_weight` must be positive and finite, got {self.weight} for batch {self.index}."
            raise ValueError(msg)

    @property
    def label(self) -> str:
        """Name in messages."""
        return f"batch {self.index}"

    @property
    def num_samples(self) -> float:
        """Number of samples, or the weight where that number is unknown."""
        return self.weight if self.size is None else self.size

    def copy(self, replaced: Mapping[int, object] | None = None) -> WeightedBatch:
        """Return a copy: code may change its batch in place, and every evaluation must start from the same data.

        `replaced` maps the ids of objects that are not copied to the objects in their place.
        """
        return replace(self, data=copied(self.data, replaced))

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Return a context in which `position_in_epoch` returns the position of this batch."""
        token = _position.set(self.index if self.position is None else self.position)
        try:
            yield
        finally:
            _position.reset(token)

    def split(self, count: int) -> list[WeightedBatch]:
        """Cut the batch into `count` chunks of nearly equal size, or fewer if it has fewer samples.

        Values that belong to samples are cut (see `cuts`); all others are common to the samples. The chunks have the
        weights that `weigh` returns if these add up to the weight of the batch, and chunks of weight zero are left out;
        otherwise the weight is divided by size.

        Raises:
            UnsplittableBatchError: If no value belongs to the samples, or it is not clear which do.
        """
        size = self.length()
        ends = np.linspace(0, size, min(count, size) + 1).round().astype(int).tolist()
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

    def thinned(self, count: int) -> WeightedBatch:
        """Return at most `count` evenly spaced samples of the batch; all of them if it cannot be cut."""
        try:
            size = self.length()
            chosen = range(size)[:: math.ceil(size / count)]
            [data] = cut(self.data, size, [slice(chosen.start, chosen.stop, chosen.step)])
        except ValueError:
            return self
        share = len(chosen) / size
        return replace(self, data=data, weight=self.weight * share, size=self.num_samples * share)

    def length(self) -> int:
        """Return the length of the dimension to cut: the number of samples, if there is a tensor of that length.

        Raises:
            UnsplittableBatchError: If the samples are along another dimension than the first.
        """
        size = self.num_samples
        if size in lengths_of(self.data):
            return int(size)
        if any(isinstance(t, Tensor) and t.ndim > 1 and t.size(1) == size for t in tensors_of(self.data)):
            msg = f"the {size:.0f} samples of a batch are along the second dimension of its tensors"
            raise UnsplittableBatchError(msg)
        return int(batch_size(self.data))


_position: ContextVar[int] = ContextVar("position", default=0)


def position_in_epoch() -> int:
    """Return the position in the epoch of the batch that is being evaluated; 0 outside of an evaluation."""
    return _position.get()


def copied(data: Any, replaced: Mapping[int, object] | None = None) -> Any:
    """Return a copy of a batch, or the batch itself if it cannot be copied; `replaced` as for `WeightedBatch.copy`."""
    try:
        return copy.deepcopy(data, dict(replaced or {}))
    except Exception:  # noqa: BLE001 - batches of any kind are analyzed
        return data


def weighted_batches(batches: Iterable[Any], weigh: Weigh | None = None) -> list[WeightedBatch]:
    """Read batches and their weights, by default their numbers of samples; warn once if a number is a guess.

    Raises:
        ValueError: If a batch holds no tensor, or a weight is not positive.
    """
    found: list[WeightedBatch] = []
    doubts: list[str] = []
    with restore_state():  # a data loader draws random numbers
        for index, batch in enumerate(batches):
            size, weight, doubt = size_and_weight(batch, weigh)
            if doubt is not None:
                doubts.append(doubt)
            found.append(WeightedBatch(batch, weight, index, size=size))
    if doubts:
        warnings.warn(f"lightning_hesd: {doubts[0]}", RuntimeWarning, stacklevel=3)
    return found


def size_and_weight(batch: Any, weigh: Weigh | None, made_from: int | None = None) -> tuple[float, float, str | None]:
    """Return the number of samples of a batch, its weight, and the reason why they are a guess, None if they are not.

    Args:
        batch: The batch.
        weigh: As for `hessian_spectrum`. With "tokens" the weight is the number of samples: that of tokens takes the
            loss, and comes later (see `token_weights`).
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
