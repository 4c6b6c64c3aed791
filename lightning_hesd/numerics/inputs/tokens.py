"""The tokens of a batch (labels that are not ignored, or nonzero values of the attention mask), and its mean loss.

The loss of a batch beside those of two chunks of it tells whether it is a mean over samples or over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.isolation.attributes import attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.numerics.inputs.batches import WeightedBatch

IGNORED = -100
"""The label that PyTorch and Hugging Face's models ignore."""

MIN_DIFFERENCE = 1e-6
"""Smallest difference of a chunk's share of the tokens and of the samples that can be seen in a loss."""

ROUNDING = 64.0
"""Units of rounding by which the mean of the losses of chunks may differ from the loss of their batch."""

Source = Literal["labels", "attention_mask"]


@dataclass(frozen=True)
class TokenCount:
    """A rule for counting the tokens of a batch.

    Attributes:
        source: The entry of the batch that shows which tokens count.
        shifted: Whether the first token of each row does not count.
    """

    source: Source
    shifted: bool

    def __call__(self, batch: Any) -> float:
        """Return the number of tokens."""
        return float(self.per_sample(batch).sum())

    def per_sample(self, batch: Any) -> Tensor:
        """Return the number of tokens in each row, shape (rows,), on the CPU.

        Raises:
            ValueError: If the batch does not have the entry.
        """
        found = find(batch, self.source)
        if found is None:
            msg = (
                f"`batch_weight` counts tokens by `{self.source}`, which a batch of type {type(batch).__name__} lacks."
            )
            raise ValueError(msg)
        counted = found.values != (IGNORED if self.source == "labels" else 0)
        if self.shifted and counted.ndim > 1:
            counted = counted[..., 1:]
        return counted.reshape(len(counted), -1).sum(1).cpu()

    def __str__(self) -> str:
        """Return the rule in words."""
        counted = f"`labels` other than {IGNORED}" if self.source == "labels" else "nonzero values of `attention_mask`"
        return f"{counted} after the first of each row" if self.shifted else counted

    def advice(self) -> str:
        """Return the argument `batch_weight` that counts by this rule."""
        part = "[:, 1:]" if self.shifted else ""
        entry = f'batch["{self.source}"]{part}'
        return f"batch_weight=lambda batch: {f'({entry} != {IGNORED})' if self.source == 'labels' else entry}.sum()"


ADVICE = TokenCount("labels", shifted=True).advice()
"""The rule for models that predict the next token."""


@dataclass(frozen=True)
class Entry:
    """The labels or the attention mask of a batch.

    Attributes:
        holder: The mapping or object with the entry.
        name: Name of the entry.
        values: Labels, or an attention mask.
    """

    holder: Any
    name: Source
    values: Tensor

    def replace(self, values: Tensor) -> None:
        """Replace the values in the holder."""
        if isinstance(self.holder, Mapping):
            self.holder[self.name] = values  # type: ignore[index]  # or it raises
        else:
            setattr(self.holder, self.name, values)


def find(batch: Any, name: Source) -> Entry | None:
    """Return the entry of this name at any depth of a batch; None if there is none, or more than one."""
    try:
        found = list(_entries(batch, name))
    except Exception:  # noqa: BLE001 - objects that cannot be read by their own methods
        return None
    if len(found) != 1 or found[0].values.ndim == 0:
        return None
    return None if name == "labels" and found[0].values.is_floating_point() else found[0]


def _entries(part: Any, name: Source, depth: int = 4) -> Iterator[Entry]:
    if isinstance(part, Tensor) or depth == 0:
        return
    inner: Sequence[Any] = part if isinstance(part, list | tuple) else ()
    if not isinstance(part, list | tuple):
        known = part if isinstance(part, Mapping) else attributes(part)
        if isinstance(known.get(name), Tensor):
            yield Entry(part, name, known[name])
        inner = list(known.values())
    for value in inner:
        if isinstance(value, Mapping | list | tuple):
            yield from _entries(value, name, depth - 1)


@dataclass(frozen=True)
class ChunkLosses:
    """The loss of a batch and those of its chunks.

    Attributes:
        whole: Loss of the batch.
        losses: Losses of the chunks.
        chunks: The chunks.
        rounding: Bound of the rounding error of the difference between a loss and a mean of losses.
    """

    whole: float
    losses: Sequence[float]
    chunks: Sequence[WeightedBatch]
    rounding: float

    @classmethod
    def of(cls, batch: WeightedBatch, position: int, loss: Callable[[WeightedBatch], Tensor]) -> ChunkLosses:
        """Cut a batch in two before a sample, and evaluate the loss of the batch and of both chunks."""
        chunks = batch.cut_at([position])
        evaluated = [loss(part) for part in (batch, *chunks)]
        facts = GraphFacts()
        facts.add(evaluated)
        whole, *losses = [value.item() for value in evaluated]
        epsilon = max(facts.epsilon, torch.finfo(evaluated[0].dtype).eps)
        return cls(whole, losses, chunks, ROUNDING * epsilon * max(abs(whole), *map(abs, losses)))

    def distance(self, weights: Sequence[float]) -> float:
        """Return the distance of the weighted mean of the chunks' losses from the loss of the batch."""
        weighted = math.fsum(w * loss for w, loss in zip(weights, self.losses, strict=True))
        return abs(weighted / math.fsum(weights) - self.whole)

    def distance_by_tokens(self, count: TokenCount) -> float:
        """Return the distance if each chunk counts by its tokens."""
        return self.distance([count(chunk.data) for chunk in self.chunks])

    def is_mean_over_samples(self) -> bool:
        """Return whether the loss is the mean over samples, to rounding."""
        return self.distance([chunk.num_samples for chunk in self.chunks]) <= self.rounding < math.inf

    def is_mean_over_tokens(self, count: TokenCount) -> bool:
        """Return whether the loss is the mean over tokens, to rounding."""
        return self.distance_by_tokens(count) <= self.rounding < math.inf


def most_uneven_cut(batches: Sequence[WeightedBatch], count: TokenCount) -> tuple[WeightedBatch, int] | None:
    """Return the batch, and the sample before which to cut it in two, whose chunks differ most in tokens per sample.

    None if all samples of each batch have as many tokens.
    """
    largest, found = MIN_DIFFERENCE, None
    for batch in batches:
        counts = count.per_sample(batch.data).double()
        if len(counts) != batch.num_samples or not counts.sum():
            continue
        of_tokens = (counts.cumsum(0) / counts.sum())[:-1]
        of_samples = torch.arange(1, len(counts), device=counts.device) / len(counts)
        differences = (of_tokens - of_samples).abs().where((of_tokens > 0) & (of_tokens < 1), 0)
        if len(differences) and float(differences.max()) > largest:
            largest, found = float(differences.max()), (batch, int(differences.argmax()) + 1)
    return found


def with_other_first_labels(batch: WeightedBatch) -> WeightedBatch | None:
    """Return a batch in which the first label of each row is another one that occurs; None if no first one counts."""
    other = batch.copy()
    entry = find(other.data, "labels")
    if entry is None or entry.values.ndim < 2:
        return None
    counted = entry.values[entry.values != IGNORED]
    if not len(counted):
        return None
    low, high = counted.min(), counted.max()
    changed, first = entry.values.clone(), entry.values[..., 0]
    changed[..., 0] = torch.where(first == IGNORED, first, torch.where(first == low, high, low))
    if torch.equal(changed, entry.values):
        return None
    entry.replace(changed)  # a new tensor, as inputs and labels may be the same one
    return other
