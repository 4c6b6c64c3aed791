"""Weights of batches by their tokens, where the loss is a mean over tokens and not over samples.

A language model's loss is the mean over the tokens that have a label, in the whole batch. The weighted mean of such
losses over batches is the mean over all tokens if each batch counts by its number of tokens, and only then is the loss
of a batch the weighted mean of those of its groups of samples.

Tokens are the labels other than -100, the entry `labels` of the batch, of two dimensions or more. A model that predicts
the next token drops the first label of each row; whether it does follows from the loss. Without `labels`, tokens are
the nonzero values of `attention_mask`, or those after the first of each row, whichever agrees with the loss.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.inputs.tokens import (
    ADVICE,
    ChunkLosses,
    TokenCount,
    find,
    most_uneven_cut,
    with_other_first_labels,
)
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.numerics.inputs.tokens import Source

NEITHER = "the loss of a batch is no mean of the losses of its chunks, neither by samples nor by tokens"


@dataclass(eq=False)
class Weighing:
    """Decides how the batches of an analysis are weighed, equally on all ranks.

    Losses may wait for those of other ranks. Therefore all ranks that have a batch evaluate equally many losses, and a
    rank whose evaluation fails says so, and goes on.

    Attributes:
        wanted: The option `batch_weight`.
        batches: This rank's share of the batches.
        loss: Mean loss of a batch.
        collectives: Communication between the ranks that the batches are divided among.
        is_settled: Whether the decision also holds for other parameters of the module.
    """

    wanted: Weigh | None
    batches: Sequence[WeightedBatch]
    loss: Callable[[WeightedBatch], Tensor]
    collectives: Collectives = LOCAL
    is_settled: bool = field(default=True, init=False)
    _reason: str = field(default="", init=False)  # why this rank cannot tell, in words

    def decide(self) -> TokenCount | None:
        """Return how tokens are counted; None if batches do not count by their tokens.

        Raises:
            ValueError: If the option is "tokens", and it cannot be told how they are counted.
        """
        if callable(self.wanted):
            return None
        source = self._source()
        if source is None:
            if self.wanted is None:
                return None
            msg = (
                '`batch_weight="tokens"` needs batches that all have an entry `labels`, whole numbers, or all an entry '
                f"`attention_mask`: pass a function of the batch, such as `{ADVICE}`."
            )
            raise ValueError(msg)
        if self.wanted is None and not self._is_mean_over_tokens(source):
            return None
        count = TokenCount(source, shifted=self._is_shifted(source))
        if self.wanted is None:
            self._warn(
                f"the loss is a mean over tokens, so each batch counts by its {count}. Pass "
                '`batch_weight="tokens"` if this is meant, or a function of the batch.'
            )
        else:
            self._check(count)
        return count

    def apply(self, count: TokenCount | None) -> list[WeightedBatch]:
        """Return the batches with their weights, without batches that have no token.

        Raises:
            ValueError: If no batch of any rank has a token.
        """
        if count is None:
            weigh = self.wanted if callable(self.wanted) else None
            return [replace(batch, weigh=weigh) for batch in self.batches]
        weights = [count(batch.data) for batch in self.batches]
        if not self.collectives.sum_values([math.fsum(weights)])[0]:
            msg = f"no batch has a token: there are no {count}."
            raise ValueError(msg)
        pairs = zip(self.batches, weights, strict=True)
        return [replace(batch, weight=weight, weigh=count) for batch, weight in pairs if weight]

    def _source(self) -> Source | None:
        """Return the entry that tells the tokens of all batches of all ranks; None if there is none."""
        sources: tuple[Source, Source] = ("labels", "attention_mask")
        has = [sum(find(batch.data, source) is not None for batch in self.batches) for source in sources]
        total, *found = self.collectives.sum_values([len(self.batches), *has])
        known = next(((s, count) for s, count in zip(sources, found, strict=True) if count), None)
        return known[0] if known is not None and known[1] == total else None

    def _is_mean_over_tokens(self, source: Source) -> bool:
        """Return whether the loss of a batch is the mean of those of its chunks by tokens, and not by samples."""
        if source == "attention_mask" and self.collectives.is_distributed:
            return False  # a loss of whole texts may compare those of all ranks, and needs equally many of each

        def judge(found: ChunkLosses) -> list[bool]:
            tokens = any(found.is_mean_over_tokens(TokenCount(source, shifted=s)) for s in (True, False))
            samples = found.is_mean_over_samples()
            return [tokens and not samples, samples and not tokens, not tokens and not samples]

        votes = self._votes_by_chunks(source, judge)
        if votes is None:
            return False
        failed, tokens, samples, neither = votes
        self.is_settled = any(votes)  # or all chunks have the same loss
        if (failed or neither) and not (tokens or samples) and source == "labels":
            self._warn(
                f"the samples of a batch hold unequal numbers of {TokenCount(source, shifted=False)}, and it cannot be "
                f"told whether the loss is a mean over these ({self._reason or NEITHER}): each batch counts by its "
                'samples. Pass `batch_weight="tokens"` if it is, or a function of the batch.'
            )
        return bool(tokens) and not samples

    def _is_shifted(self, source: Source) -> bool:
        """Return whether the first token of each row does not count.

        Raises:
            ValueError: If that cannot be told, and makes a difference.
        """
        votes = self._votes_by_labels() if source == "labels" else self._votes_by_mask()
        _, counts, does_not, _ = votes or [0.0] * 4
        if bool(counts) != bool(does_not):
            return bool(does_not)
        if not self._matters(source):
            return False
        reason = f" ({self._reason})" if self._reason else ""
        every, after_first = TokenCount(source, shifted=False), TokenCount(source, shifted=True)
        msg = (
            f"it cannot be told whether the loss is the mean over {every} or over those after the first of each "
            f"row{reason}: pass `{every.advice()}` or `{after_first.advice()}`."
        )
        raise ValueError(msg)

    def _votes_by_labels(self) -> list[float] | None:
        """Count the ranks whose loss depends on first labels of rows, and whose does not; None if no label counts."""
        batches = sorted(self.batches, key=lambda batch: batch.num_samples)
        changed = ((batch, other) for batch in batches if (other := with_other_first_labels(batch)) is not None)
        pair = next(changed, None)

        def vote() -> list[bool]:
            if pair is None:
                return self._abstain(batches, 2)
            before, after = map(self.loss, pair)
            depends = abs(after.item() - before.item()) > 8 * torch.finfo(before.dtype).eps * abs(before.item())
            return [depends, not depends]

        return self._votes(vote) if self.collectives.any(pair is not None) else None

    def _votes_by_mask(self) -> list[float] | None:
        """Count the ranks whose loss is nearer to the mean by all values, or not."""
        counts = [TokenCount("attention_mask", shifted=shifted) for shifted in (False, True)]

        def judge(found: ChunkLosses) -> list[bool]:
            if not any(map(found.is_mean_over_tokens, counts)):
                self._reason = NEITHER
                return []
            every, after_first = map(found.distance_by_tokens, counts)
            return [every < after_first, after_first <= every]

        return self._votes_by_chunks("attention_mask", judge)

    def _matters(self, source: Source) -> bool:
        """Return whether the weights of batches depend on whether first tokens count."""
        both = [[TokenCount(source, shifted=s)(batch.data) for s in (False, True)] for batch in self.batches]
        every, after_first = self.collectives.sum_values([math.fsum(pair[i] for pair in both) for i in (0, 1)])
        return self.collectives.any(any(not math.isclose(a * after_first, b * every, rel_tol=1e-12) for a, b in both))

    def _check(self, count: TokenCount) -> None:
        """Warn if it can be told that the loss is not the mean over these tokens."""
        votes = self._votes_by_chunks(count.source, lambda found: [not found.is_mean_over_tokens(count)])
        if votes is not None and votes[1]:
            self._warn(
                f"each batch counts by its {count}, but its loss is not the mean over these: the losses of chunks of a "
                "batch, so weighed, have another mean. Pass a function of the batch to `batch_weight` if other labels "
                "than these are ignored."
            )

    def _votes_by_chunks(self, source: Source, judge: Callable[[ChunkLosses], list[bool]]) -> list[float] | None:
        """Compare a batch with two chunks of it on each rank, and count the votes that `judge` returns, as `_votes`.

        None if on all ranks all samples of a batch have as many tokens.
        """
        cut = most_uneven_cut(self.batches, TokenCount(source, shifted=True))
        if not self.collectives.any(cut is not None):
            return None

        def vote() -> list[bool]:
            return self._abstain(self.batches, 3) if cut is None else judge(ChunkLosses.of(*cut, self.loss))

        return self._votes(vote)

    def _votes(self, vote: Callable[[], list[bool]]) -> list[float]:
        """Return the number of ranks on which `vote` fails, and those on which each of its three results is true.

        A result that `vote` leaves out is false.
        """
        try:
            votes = [False, *vote()]
        except Exception as error:  # noqa: BLE001 - other ranks wait; the loss of the whole batch fails again, later
            self._reason = f"{type(error).__name__}: {one_line(error)}"
            votes = [True]
        return self.collectives.sum_values([*map(float, votes), *[0.0] * (4 - len(votes))])

    def _abstain(self, batches: Sequence[WeightedBatch], times: int) -> list[bool]:
        """Evaluate the first batch as often as other ranks evaluate theirs, and return no votes."""
        for batch in batches[:1]:
            for _ in range(times):
                self.loss(batch)
        return []

    def _warn(self, message: str) -> None:
        if any(batch.index == 0 for batch in self.batches):  # on one rank
            warnings.warn(f"lightning_hesd: {message}", RuntimeWarning, stacklevel=2)
