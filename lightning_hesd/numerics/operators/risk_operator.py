"""The risk operator: the curvature matrix of the mean loss over all samples, known by its products.

H = Σ_b (w_b/W) H_b over batches b with weights w_b (their numbers of samples), W = Σ w_b. The sum runs over the batches
of all ranks: `collectives` adds up the products of the ranks. Where parameters are sharded, all ranks evaluate every
batch together, and the product of a batch is complete without that sum.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Literal

import torch

from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.inputs.batches import SkippedBatchError
from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.numerics.krylov.vectors import add_in_shape
from lightning_hesd.numerics.operators.curvature import gradient
from lightning_hesd.numerics.operators.finite_differences import FiniteDifferences
from lightning_hesd.numerics.operators.strategies import (
    STRATEGIES,
    AnalysisCache,
    NoExactProductError,
    measured_graph,
    plan_graphs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix, Matvec, Vector
    from lightning_hesd.numerics.operators.strategies import Strategy
    from lightning_hesd.numerics.operators.verification import Verification


PASSES_PER_GRADIENT = 60
"""Number of products from which on the time of a gradient is measured: it takes about 1 % of theirs then."""


class RiskOperator:
    """The curvature matrix of the mean loss, multiplied in one pass over the batches.

    With "auto", products are exact wherever the loss can be differentiated twice. Only where there is no exact product,
    or no memory for one, central differences take its place.

    A rank that fails must not leave the others waiting for its product: it goes on contributing NaN, which every rank
    finds at the same step, and raises its own error, `failure`, afterwards.

    Attributes:
        matrix: The curvature matrix of a batch.
        batches: This rank's share of the batches, without the skipped ones.
        matvecs, losses: Their products, in the shapes of the parameters, and their losses.
        dtype: Floating-point type of the products.
        sharding: How the parameters are distributed over ranks.
        collectives: Communication between the ranks that the batches are divided among.
        space: The space of vectors over all parameters.
        size: Number of elements of a vector on this rank: n, unless parameters are sharded.
        loss: Mean loss over all batches.
        weight: Sum of the weights of all batches.
        num_samples: Number of samples of all batches.
        num_batches: Number of batches of all ranks, without the skipped ones.
        num_skipped: Number of batches of all ranks that the loss function skipped.
        uncut_reason: Why a batch of this rank was not cut into groups; None if all were.
        strategy: HVP strategy in use; "graph" if the graph of any batch is kept.
        strategy_reason: Why it is that one, in words.
        graph_bytes: Bytes of the kept graphs and of a product; None unless "auto" measured them.
        kept_bytes: Bytes of the kept graphs alone; 0 unless "auto" measured them.
        comparison_bytes: Bytes while the loss was compared with its derivatives, kept graphs included; 0: not now.
        spare_memory: Bytes of the memory for graphs that "auto" leaves; 0 if it does not keep all graphs.
        differences: Central differences; None: products are exact.
        cache: What earlier analyses of the same loss have measured; brought up to date.
        product_error: Norm of the error of a product with a unit vector, beyond rounding: of central differences.
        epsilon: Machine epsilon of the coarsest floating-point type in the graphs of the loss, on any rank.
        failure: Error of this rank; None if it did not fail.
        passes: Number of products so far.
        seconds_per_product: Their average time; too short on accelerators, where calls return early.
    """

    def __init__(
        self,
        matrix: CurvatureMatrix,
        batches: Sequence[WeightedBatch],
        *,
        strategy: Strategy | Literal["auto"],
        dtype: torch.dtype,
        collectives: Collectives = LOCAL,
        graph_memory: float = math.inf,
        cache: AnalysisCache | None = None,
        sharding: ParameterSharding | None = None,
    ) -> None:
        """Evaluate the loss of every batch and make the products.

        `batches` may be empty if other ranks have some. `graph_memory` is in bytes, for graphs with "auto", temporary
        ones included. The other arguments are attributes.

        Raises:
            ValueError: If no rank has a batch, or the matrix is not defined for these functions.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            RuntimeError: If there are no products.
            AnotherRankFailedError: If another rank failed.
        """
        self.matrix = matrix
        self.batches = batches
        self.dtype = dtype
        self.collectives = collectives
        self.sharding = sharding or ParameterSharding()
        self.space = self.sharding.space(matrix.parameters)
        self.failure: Exception | None = None
        self.product_error = self.epsilon = self.seconds_per_product = 0.0
        self.passes = 0
        self.num_skipped = 0
        self.uncut_reason: str | None = None
        self.strategy: Strategy = "graph" if strategy == "auto" else strategy
        self.strategy_reason = "as asked"
        self.graph_bytes: float | None = None
        self.spare_memory = self.kept_bytes = self.comparison_bytes = 0.0
        self.differences: FiniteDifferences | None = None
        self.cache = cache or AnalysisCache()
        self.cache.invalidate(self.space.dimension)
        self._is_auto = strategy == "auto"
        self._graph_memory = graph_memory
        self.matvecs: list[Matvec] = []
        self.losses: list[float] = []
        self._skipped = 0
        self._sizes = [p.numel() for p in matrix.parameters]
        self.size = sum(self._sizes)
        if self._is_auto and self.cache.inexact_reason:
            self.fall_back(self.cache.inexact_reason)
        else:
            if strategy == "finite_difference":
                self.differences = FiniteDifferences(matrix.parameters, self.space, matrix.blocks, facts=matrix.facts)
            self._prepare()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.matrix.parameters[0].device

    @property
    def is_exact(self) -> bool:
        """Whether products come from differentiating twice, not from differences."""
        return self.differences is None

    @property
    def verification(self) -> Verification:
        """Comparison of the loss with its derivatives, by `self_checks.check_derivatives`."""
        assert self.cache.verification is not None  # noqa: S101 - the check comes first
        return self.cache.verification

    @property
    def may_fall_back(self) -> bool:
        """Whether central differences may take the place of exact products."""
        return self._is_auto and self.matrix.is_hessian

    def fall_back(self, reason: str) -> None:
        """Take central differences from now on.

        Raises:
            RuntimeError: If differences of gradients do not give this matrix.
        """
        matrix = self.matrix
        if not matrix.is_hessian:
            msg = f"{reason}; central differences, which would do for the Hessian, do not give this matrix."
            raise RuntimeError(msg)
        self.matvecs = []
        self._is_auto = False
        self.cache.inexact_reason = reason
        self.strategy, self.strategy_reason = "finite_difference", f"auto: {reason}"
        self.differences = FiniteDifferences(matrix.parameters, self.space, matrix.blocks, facts=matrix.facts)
        self._prepare()

    def _prepare(self) -> None:
        """Make the products of all batches; if a rank finds no exact ones, all ranks fall back.

        Raises:
            ValueError: If no rank has a batch.
        """
        reason = self.collectives.run_together(self._make_matvecs)
        pairs = zip(self.batches, self.losses, strict=reason is None)
        own = [
            math.fsum(batch.weight for batch in self.batches),
            math.fsum(batch.weight * loss for batch, loss in pairs),
            float(len(self.batches)),
            float(reason is not None),
            float(self._skipped),
            math.fsum(batch.num_samples for batch in self.batches),
        ]
        total = self.collectives.sum_values(own)
        self.weight, weighted_loss, num_batches, without_product, num_skipped, self.num_samples = total
        self.num_batches, self.num_skipped = round(num_batches), round(num_skipped)
        if without_product:
            self.fall_back(reason or "another rank found no exact product")
            return
        if self.num_skipped:
            everything = self.num_batches + self.num_skipped
            self.strategy_reason += f"; {self.num_skipped} of {everything} batches left out, for which there is no loss"
        if not self.weight:
            msg = "there are no batches to analyze: `batches` is empty."
            if self.num_skipped:
                msg = (
                    f"there is no loss to analyze: the loss function skipped all {self.num_skipped} batches, as a "
                    "`training_step` that returns None does. Pass a `loss_fn` that returns the loss of every batch."
                )
            raise ValueError(msg)
        self.loss = weighted_loss / self.weight

    def _make_matvecs(self) -> str | None:
        """Make the products of this rank, and return the reason why there are no exact ones; None if there are.

        Raises:
            ArithmeticError: If the loss of a batch is NaN or infinite.
            SkippedBatchError: If a batch is skipped that all ranks must evaluate together.
        """
        self.matvecs, self.losses = [], []
        try:
            for batch, (loss, matvec) in self._batch_matvecs():
                value = loss.item()
                if not math.isfinite(value):
                    msg = f"the loss of {batch.label} is {value}; the Hessian is undefined there."
                    raise ArithmeticError(msg)
                self.matvecs.append(matvec)
                self.losses.append(value)
        except SkippedBatchError:
            if self.sharding.is_sharded:  # ranks that evaluate every batch together cannot tell each other
                raise
            kept = [batch for batch in self.batches if self.matrix.has_loss(batch)]
            if len(kept) == len(self.batches):
                raise
            self._skipped += len(self.batches) - len(kept)
            self.batches = kept
            return self._make_matvecs()
        except NoExactProductError as error:
            return str(error)
        return None

    def _batch_matvecs(self) -> Iterator[tuple[WeightedBatch, tuple[Tensor, Matvec]]]:
        """Yield every batch of this rank with its loss, a scalar, and its product."""
        if self.batches:
            self.matrix.check(self.batches[0])
        if not self._is_auto or not self.batches:
            for batch in self.batches:
                yield batch, self.make_matvec(batch)
            return
        first = None
        if self.cache.graph_bytes is None:
            first = measured_graph(self.matrix, self.batches[0], self.cache, self.sharding.collectives.max)
        samples = [batch.num_samples for batch in self.batches]
        is_kept, graph_bytes, reason = plan_graphs(samples, self.cache, self._graph_memory)
        for batch, keeps in zip(self.batches, is_kept, strict=True):
            ready, first = (first if keeps else None), None  # a reference less, so that its memory is freed
            yield batch, ready or STRATEGIES["graph" if keeps else "recompute"](self.matrix, batch)
        self.strategy, self.strategy_reason = "graph" if any(is_kept) else "recompute", reason
        self.graph_bytes = graph_bytes
        kept = sum(count for count, keeps in zip(samples, is_kept, strict=True) if keeps)
        self.kept_bytes = kept * (self.cache.graph_bytes or 0.0)
        self.spare_memory = self._graph_memory - graph_bytes if graph_bytes is not None and all(is_kept) else 0.0

    def make_matvec(self, batch: WeightedBatch) -> tuple[Tensor, Matvec]:
        """Return the loss of a batch, a scalar, and its product by the strategy in use."""
        if self.differences is None:
            return STRATEGIES[self.strategy](self.matrix, batch)
        loss = self.matrix.loss(batch)
        self.matrix.facts.add([loss])
        return loss.detach(), self.differences.make_matvec(self.matrix.function(batch))

    def product(self, vector: Vector) -> Tensor:
        """Return Hv, shape (n,), summed over batches and ranks, of a vector in the shapes of the parameters."""
        started = time.perf_counter()
        result = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        try:
            if self.failure is None:
                for batch, matvec in zip(self.batches, self.matvecs, strict=True):
                    add_in_shape(result, matvec(vector), self._sizes, batch.weight / self.weight)
        except Exception as error:
            if not self.collectives.is_distributed:
                raise
            self.failure = error
        if self.failure is not None:
            result.fill_(math.nan)
        result = self.collectives.sum(result)
        self.passes += 1
        self.seconds_per_product += (time.perf_counter() - started - self.seconds_per_product) / self.passes
        return result

    def gradient_equivalents(self) -> float | None:
        """Return seconds per product over those per gradient; None after few products, and where calls return early."""
        if self.device.type != "cpu" or not self.batches or self.passes < PASSES_PER_GRADIENT:
            return None
        # The last measurement, so that the caches are as warm as they were for the products.
        started = time.perf_counter()
        for batch in self.batches:
            gradient(self.matrix.loss(batch), self.matrix.parameters)
        seconds = time.perf_counter() - started
        return self.seconds_per_product / seconds if seconds > 0 else None
