"""The loss of a batch beside those of two chunks of it: they tell whether the loss is a mean over samples or tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.inputs.tokens import IGNORED, TokenCount, find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch

MIN_DIFFERENCE = 1e-6
"""Smallest difference of a chunk's share of the tokens and of the samples that can be seen in a loss."""

ROUNDING = 64.0
"""Units of rounding by which the mean of the losses of chunks may differ from the loss of their batch."""


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
        of_samples = torch.arange(1, len(counts)) / len(counts)
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
