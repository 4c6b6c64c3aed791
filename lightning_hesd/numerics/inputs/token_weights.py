"""Weights of batches by their tokens, where the loss is a mean over tokens and not over samples.

A language model's loss is the mean over the tokens that have a label, in the whole batch. Such means over batches make
the mean over all tokens if each batch counts by its number of tokens, and only then do the losses of groups of samples
make the loss of their batch.

Tokens are the labels other than -100, the entry `labels` of the batch, of two dimensions or more. A model that predicts
the next token drops the first label of each row; the loss tells whether it does. Without `labels`, tokens are the
nonzero values of `attention_mask`, or those after the first of each row, whichever agrees with the loss.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.devices import to_device
from lightning_hesd.numerics.inputs.tokens import ADVICE, IGNORED, TokenCount, find
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import Weigh, WeightedBatch
    from lightning_hesd.numerics.inputs.parameter_sharding import AllReduce
    from lightning_hesd.numerics.inputs.tokens import Source

MIN_DIFFERENCE = 1e-6
"""Of shares of a part in the tokens and in the samples of its batch: less cannot be seen in the loss."""

ROUNDING = 64.0
"""Units of rounding by which the mean of the losses of parts may differ from the loss of their batch."""


@dataclass(frozen=True)
class _Parts:
    """The losses of a batch and of its parts.

    Attributes:
        whole: Loss of the batch.
        losses: Losses of the parts.
        parts: The parts.
        rounding: What rounding can make of the difference of a loss and a mean of losses.
    """

    whole: float
    losses: Sequence[float]
    parts: Sequence[WeightedBatch]
    rounding: float

    def apart(self, weights: Sequence[float]) -> float:
        """Return how far the mean of the losses, with these weights, is from the loss of the batch."""
        weighted = math.fsum(w * loss for w, loss in zip(weights, self.losses, strict=True))
        return abs(weighted / math.fsum(weights) - self.whole)

    def by_samples(self) -> bool:
        """Return whether the loss is the mean over samples, to rounding."""
        return self.apart([part.num_samples for part in self.parts]) <= self.rounding < math.inf

    def by_tokens(self, count: TokenCount) -> bool:
        """Return whether the loss is the mean over tokens, to rounding."""
        return self.apart([count(part.data) for part in self.parts]) <= self.rounding < math.inf


class Weighing:
    """Decides how the batches of an analysis are weighed, in all processes alike.

    Attributes:
        is_settled: Whether the decision holds for other weights of the module, too.
    """

    def __init__(
        self,
        wanted: Weigh | None,
        batches: Sequence[WeightedBatch],
        loss: Callable[[WeightedBatch], Tensor],
        all_reduce: AllReduce | None,
        device: torch.device,
    ) -> None:
        """Prepare.

        Args:
            wanted: As for `hessian_spectrum`.
            batches: This process's share of the batches.
            loss: Mean loss of a batch.
            all_reduce: Sums a tensor over all processes; None for a single one.
            device: Where the sums are made.
        """
        self.is_settled = True
        self._wanted = wanted
        self._batches = batches
        self._loss = loss
        self._all_reduce = all_reduce
        self._device = device
        self._obstacle = ""

    def decide(self) -> TokenCount | None:
        """Return how tokens are counted; None if batches do not count by their tokens.

        Raises:
            ValueError: If tokens are to be counted, and it cannot be told how.
        """
        if callable(self._wanted):
            return None
        source = self._source()
        if source is None:
            if self._wanted is None:
                return None
            msg = (
                '`batch_weight="tokens"` needs batches that all have an entry `labels`, whole numbers, or all an entry '
                f"`attention_mask`: pass a function of the batch, such as `{ADVICE}`."
            )
            raise ValueError(msg)
        if self._wanted is None and not self._is_mean_over_tokens(source):
            return None
        count = TokenCount(source, shifted=self._is_shifted(source))
        if self._wanted is None:
            self._warn(
                f"the loss is a mean over tokens, so each batch counts by its {count}. Pass "
                '`batch_weight="tokens"` if this is meant, or a function of the batch.'
            )
        else:
            self._check(count)
        return count

    def apply(self, count: TokenCount | None) -> list[WeightedBatch]:
        """Return the batches with their weights; those without a token are left out.

        Raises:
            ValueError: If there is no token in any process.
        """
        if count is None:
            weigh = self._wanted if callable(self._wanted) else None
            return [replace(batch, weigh=weigh) for batch in self._batches]
        weights = [count(batch.data) for batch in self._batches]
        if not self._total([math.fsum(weights)])[0]:
            msg = f"no batch has a token: there are no {count}."
            raise ValueError(msg)
        pairs = zip(self._batches, weights, strict=True)
        return [replace(batch, weight=weight, weigh=count) for batch, weight in pairs if weight]

    def _source(self) -> Source | None:
        """Return which entry tells the tokens, the same in the batches of all processes."""
        sources: tuple[Source, Source] = ("labels", "attention_mask")
        has = [sum(find(batch.data, source) is not None for batch in self._batches) for source in sources]
        total, *found = self._total([len(self._batches), *has])
        known = next(((s, count) for s, count in zip(sources, found, strict=True) if count), None)
        return known[0] if known is not None and known[1] == total else None

    def _is_mean_over_tokens(self, source: Source) -> bool:
        """Return whether the losses of parts make that of their batch if weighed by tokens, and not by samples."""
        if source == "attention_mask" and self._all_reduce is not None:
            return False  # a loss of whole texts may compare those of all processes, and needs equally many of each

        def judge(found: _Parts) -> list[float]:
            tokens = any(found.by_tokens(TokenCount(source, shifted=shifted)) for shifted in (True, False))
            samples = found.by_samples()
            return [float(tokens and not samples), float(samples and not tokens), float(not tokens and not samples)]

        votes = self._compared(source, judge, 3)
        if votes is None:
            return False
        failed, tokens, samples, neither = votes
        self.is_settled = any(votes)  # or all parts have the same loss
        if (failed or neither) and not (tokens or samples) and source == "labels":
            obstacle = self._obstacle or "the losses of its parts make that of a batch with neither weights"
            self._warn(
                f"the samples of a batch hold unequal numbers of {TokenCount(source, shifted=False)}, and it cannot be "
                f"told whether the loss is a mean over these ({obstacle}): each batch counts by its samples. Pass "
                '`batch_weight="tokens"` if it is, or a function of the batch.'
            )
        return bool(tokens) and not samples

    def _is_shifted(self, source: Source) -> bool:
        """Return whether the first token of each row does not count.

        Raises:
            ValueError: If that cannot be told, and makes a difference.
        """
        _, counts, does_not = self._votes_by_labels() if source == "labels" else self._votes_by_mask()
        if bool(counts) != bool(does_not):
            return bool(does_not)
        if not self._matters(source):
            return False
        found = f" ({self._obstacle})" if self._obstacle else ""
        every, after_first = TokenCount(source, shifted=False), TokenCount(source, shifted=True)
        msg = (
            f"it cannot be told whether the loss is the mean over {every} or over those after the first of each "
            f"row{found}: pass `{every.advice()}` or `{after_first.advice()}`."
        )
        raise ValueError(msg)

    def _votes_by_labels(self) -> list[float]:
        """Return in how many processes the loss depends on the first labels of rows, and in how many it does not.

        Before these, in how many the evaluation failed.
        """
        batches = sorted(self._batches, key=lambda batch: batch.num_samples)
        changed = [(batch, other) for batch in batches if (other := _with_other_first_labels(batch)) is not None]
        pair = next(iter(changed), None)
        if not self._total([float(pair is not None)])[0]:
            return [0.0, 0.0, 0.0]

        def tell() -> list[float]:
            if pair is None:
                for batch in batches[:1]:
                    for _ in range(2):
                        self._loss(batch)
                return [0.0, 0.0]
            before, after = map(self._loss, pair)
            counts = abs(after.item() - before.item()) > 8 * torch.finfo(before.dtype).eps * abs(before.item())
            return [float(counts), float(not counts)]

        return self._total(self._attempt(tell, 2))

    def _votes_by_mask(self) -> list[float]:
        """Return in how many processes all values agree better with the loss, and in how many those after the first.

        Before these, in how many the evaluation failed.
        """
        counts = [TokenCount("attention_mask", shifted=shifted) for shifted in (False, True)]

        def judge(found: _Parts) -> list[float]:
            every, after_first = (found.apart([count(part.data) for part in found.parts]) for count in counts)
            if not any(map(found.by_tokens, counts)):
                self._obstacle = "the losses of its parts make that of a batch with neither weights"
                return [0.0, 0.0]
            return [float(every < after_first), float(after_first <= every)]

        return self._compared("attention_mask", judge, 2) or [0.0, 0.0, 0.0]

    def _matters(self, source: Source) -> bool:
        """Return whether the weights of batches depend on whether first tokens count."""
        both = [[TokenCount(source, shifted=s)(batch.data) for s in (False, True)] for batch in self._batches]
        every, after_first = self._total([math.fsum(pair[i] for pair in both) for i in (0, 1)])
        unlike = any(not math.isclose(a * after_first, b * every, rel_tol=1e-12) for a, b in both)
        return self._total([float(unlike)])[0] > 0

    def _check(self, count: TokenCount) -> None:
        """Warn if the loss is not the mean over these tokens, where that can be told."""
        votes = self._compared(count.source, lambda found: [float(not found.by_tokens(count))], 1)
        if votes is not None and votes[1]:
            self._warn(
                f"each batch counts by its {count}, but its loss is not the mean over these: the losses of parts of a "
                "batch, so weighed, have another mean. Pass a function of the batch to `batch_weight` if other labels "
                "than these are ignored."
            )

    def _compared(self, source: Source, judge: Callable[[_Parts], list[float]], length: int) -> list[float] | None:
        """Return in how many processes the comparison of a batch with its parts fails, and the sums of its votes.

        None if all samples of a batch have as many tokens, in all processes. Otherwise those that have a batch evaluate
        alike: losses may wait for those of other processes.
        """
        cut = self._uneven(source)
        if not self._total([float(cut is not None)])[0]:
            return None

        def compare() -> list[float]:
            if cut is not None:
                return judge(self._evaluated(*cut))
            for batch in self._batches[:1]:
                for _ in range(3):
                    self._loss(batch)
            return [0.0] * length

        return self._total(self._attempt(compare, length))

    def _uneven(self, source: Source) -> tuple[WeightedBatch, int] | None:
        """Return the batch, and where to cut it in two, whose parts differ most in tokens per sample."""
        count = TokenCount(source, shifted=True)
        best, found = MIN_DIFFERENCE, None
        for batch in self._batches:
            counts = count.per_sample(batch.data).double()
            if len(counts) != batch.num_samples or not counts.sum():
                continue
            shares = (counts.cumsum(0) / counts.sum())[:-1]
            unlike = (shares - torch.arange(1, len(counts)) / len(counts)).abs().where((shares > 0) & (shares < 1), 0)
            if len(unlike) and float(unlike.max()) > best:
                best, found = float(unlike.max()), (batch, int(unlike.argmax()) + 1)
        return found

    def _evaluated(self, batch: WeightedBatch, position: int) -> _Parts:
        """Cut a batch in two, and evaluate it and its parts."""
        parts = batch.cut_at([position])
        found = [self._loss(part) for part in (batch, *parts)]
        facts = GraphFacts()
        facts.add(found)
        whole, *losses = [loss.item() for loss in found]
        epsilon = max(facts.epsilon, torch.finfo(found[0].dtype).eps)
        return _Parts(whole, losses, parts, ROUNDING * epsilon * max(abs(whole), *map(abs, losses)))

    def _attempt(self, work: Callable[[], list[float]], length: int) -> list[float]:
        """Return whether some work failed, and the numbers it finds, zeros then."""
        try:
            return [0.0, *work()]
        except Exception as error:  # noqa: BLE001 - other processes wait; that of the whole batch fails again, later
            self._obstacle = f"{type(error).__name__}: {one_line(error)}"
            return [1.0, *[0.0] * length]

    def _total(self, numbers: list[float]) -> list[float]:
        """Return sums over all processes."""
        if self._all_reduce is None:
            return numbers
        total: list[float] = self._all_reduce(
            to_device(torch.tensor(numbers, dtype=torch.float64), self._device)
        ).tolist()
        return total

    def _warn(self, message: str) -> None:
        if any(batch.index == 0 for batch in self._batches):  # in one process
            warnings.warn(f"lightning_hesd: {message}", RuntimeWarning, stacklevel=2)


def _with_other_first_labels(batch: WeightedBatch) -> WeightedBatch | None:
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
