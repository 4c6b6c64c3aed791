"""Which strategy for which batch: retained graphs as far as the memory goes, and what to do without exact products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.numerics.operators.curvature import gradient
from lightning_hesd.numerics.operators.finite_differences import FiniteDifferences
from lightning_hesd.numerics.operators.memory import MemoryMeter, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.tokens import TokenCount
    from lightning_hesd.numerics.operators.curvature import Matrix, Product, Vector
    from lightning_hesd.numerics.operators.verification import Verification

Strategy = Literal["graph", "recompute", "finite_difference"]


@dataclass
class AnalysisCache:
    """What is found out about a loss at its first analysis, and holds as long as shapes stay the same.

    Attributes:
        graph_bytes: Memory that the gradient's graph holds per sample; None: not measured.
        product_bytes: Memory that a product takes beside graphs, per sample.
        obstacle: Why there are no exact products; None if there are.
        step: Step of central differences; None: not chosen.
        verification: What comparing the loss with its derivatives has shown; None: not compared.
        kinds: Names of the operations in the graphs that were compared.
        dimension: Number of analysed parameters it was found out with; None: nothing was.
        is_weighed: Whether it is known how batches are weighed.
        count: How their tokens are counted, if they are weighed by them.
    """

    graph_bytes: float | None = None
    product_bytes: float = 0.0
    obstacle: str | None = None
    step: float | None = None
    verification: Verification | None = None
    kinds: frozenset[str] = frozenset()
    dimension: int | None = None
    is_weighed: bool = False
    count: TokenCount | None = None

    def invalidate(self, dimension: int) -> None:
        """Forget what was found out with other parameters."""
        if self.dimension != dimension:
            self.graph_bytes = self.obstacle = self.step = self.verification = None
            self.dimension = dimension


class NoExactProductError(RuntimeError):
    """There is a gradient, but no exact product; the message says why."""


class ProductMaker:
    """Makes the products of batches by the strategy asked for, or by the one that suits.

    With "auto" the products are exact wherever the loss can be differentiated twice: from retained graphs for as many
    batches as fit into the memory, recomputed for the rest. There is nothing to time: a recomputed product is a
    product from a retained graph, and the gradient that builds the graph on top of it. Only where there is no exact
    product, or no memory for one, central differences take its place.

    Attributes:
        strategy: The strategy in use; "graph" if any batch's graph is retained.
        reason: Why.
        graph_bytes: What the retained graphs hold, and a product takes on top; None unless "auto" measured it.
        differences: The central differences, if they are in use.
    """

    def __init__(
        self,
        matrix: Matrix,
        strategy: Strategy | Literal["auto"],
        *,
        graph_memory: float,
        cache: AnalysisCache,
        sharding: ParameterSharding | None = None,
    ) -> None:
        """Decide what can be decided without the batches.

        Args:
            matrix: What is multiplied.
            strategy: How to compute products.
            graph_memory: Bytes that "auto" may spend on graphs, those that come and go included.
            cache: What is known from an earlier analysis; brought up to date.
            sharding: How the parameters are distributed over ranks; default: every rank holds all of them.
        """
        self._sharding = sharding or ParameterSharding()
        self.strategy: Strategy = "graph" if strategy == "auto" else strategy
        self.reason = "as asked"
        self.graph_bytes: float | None = None
        self.differences: FiniteDifferences | None = None
        self._matrix = matrix
        self._graph_memory = graph_memory
        self._cache = cache
        self._plans = strategy == "auto"
        if self._plans and cache.obstacle:
            self.fall_back(cache.obstacle)
        elif strategy == "finite_difference":
            self.differences = self._make_differences()

    @property
    def is_free(self) -> bool:
        """Whether central differences may take the place of exact products."""
        return self._plans and self._matrix.is_hessian

    def fall_back(self, obstacle: str) -> None:
        """Take central differences from now on, because of `obstacle`.

        Raises:
            RuntimeError: If the matrix cannot be had by differences.
        """
        if not self._matrix.is_hessian:
            msg = f"{obstacle}; central differences, which would do for the Hessian, do not give this matrix."
            raise RuntimeError(msg)
        self._plans = False
        self._cache.obstacle = obstacle
        self.strategy, self.reason = "finite_difference", f"auto: {obstacle}"
        self.differences = self._make_differences()

    def _make_differences(self) -> FiniteDifferences:
        matrix = self._matrix
        return FiniteDifferences(matrix.parameters, self._sharding.space(matrix.parameters), matrix.blocks)

    def make_all(self, batches: Sequence[WeightedBatch]) -> Iterator[tuple[WeightedBatch, tuple[Tensor, Product]]]:
        """Yield every batch with its loss, a scalar, and its product.

        Raises:
            NoExactProductError: If there is none, and the choice is free.
        """
        if batches:
            self._matrix.check(batches[0])
        if self._plans and batches:
            yield from self._planned(batches)
        else:
            for batch in batches:
                yield batch, self.make(batch)

    def make(self, batch: WeightedBatch, strategy: Strategy | None = None) -> tuple[Tensor, Product]:
        """Return the loss of a batch, a scalar, and its product by `strategy`, by default the one in use."""
        matrix = self._matrix
        if self.differences is not None:
            loss = matrix.loss(batch)
            matrix.facts.add([loss])
            return loss.detach(), self.differences.product(matrix.function(batch))
        if (strategy or self.strategy) == "graph":
            return matrix.product(batch, retain=True)

        def product(vector: Vector) -> Vector:
            _, once = matrix.product(batch, retain=False)
            return once(vector)

        loss, _ = matrix.product(batch, retain=False)  # finds out whether there is one
        return loss, product

    def gradient(self, batch: WeightedBatch) -> list[Tensor]:
        """Return the plain gradient of a batch's loss, in the shapes of the parameters."""
        if self.differences is not None:
            return self.differences.gradient(lambda: self._matrix.loss(batch))
        return gradient(self._matrix.loss(batch), self._matrix.parameters)

    def _planned(self, batches: Sequence[WeightedBatch]) -> Iterator[tuple[WeightedBatch, tuple[Tensor, Product]]]:
        measured = self._measured(batches[0]) if self._cache.graph_bytes is None else None
        if self._cache.graph_bytes is None:
            self.strategy, self.reason = "recompute", "auto: the memory of graphs cannot be measured here"
            for batch in batches:
                yield batch, self.make(batch)
            return
        graph, product = self._cache.graph_bytes, self._cache.product_bytes
        largest = max(batch.num_samples for batch in batches)
        # A product takes some memory beside the graphs that stay, and a recomputed one a graph of its own.
        needed = product * largest
        if graph * sum(batch.num_samples for batch in batches) + needed > self._graph_memory:
            needed += graph * largest
        room = f"there is room for {self._graph_memory / 2**20:.1f} MiB"
        if needed > self._graph_memory:
            msg = f"the gradient graph of one batch and a product take {needed / 2**20:.1f} MiB, and {room}"
            raise NoExactProductError(msg)
        kept, held = 0, 0.0
        for batch in batches:
            fits = held + graph * batch.num_samples + needed <= self._graph_memory
            ready, measured = (measured if fits else None), None  # the measured one is the first batch's
            yield batch, ready or self.make(batch, "graph" if fits else "recompute")
            held += graph * batch.num_samples if fits else 0.0
            kept += fits
        self.strategy = "graph" if kept else "recompute"
        self.graph_bytes = held + needed
        self.reason = f"auto: the gradient graphs of {kept} of {len(batches)} batches hold {held / 2**20:.1f} MiB"
        if kept < len(batches):
            self.reason += f"; {room}, the rest is recomputed"

    def _measured(self, batch: WeightedBatch) -> tuple[Tensor, Product]:
        """Make a product from a retained graph, and find out what the graph holds and a product takes.

        One product is computed for that; some losses fail only then.

        Raises:
            NoExactProductError: If there is none, though there is a gradient.
            RuntimeError: If memory runs out.
            Warning: If it does in place of that error.
        """
        try:
            made, held, peak = self._metered(batch)
        except (RuntimeError, Warning) as error:  # a kernel without a formula warns, which may be an error
            if is_out_of_memory(error):
                raise
            # If this fails, too, the loss is at fault.
            self._make_differences().gradient(lambda: self._matrix.loss(batch))
            msg = f"the loss cannot be differentiated twice ({str(error).splitlines()[0]})"
            raise NoExactProductError(msg) from error
        if held is not None:
            # The same in all processes that work on it together: what follows from it must be.
            self._cache.graph_bytes = self._sharding.collectives.max(held / batch.num_samples)
            self._cache.product_bytes = self._sharding.collectives.max(max(peak - held, held) / batch.num_samples)
        return made

    def _metered(self, batch: WeightedBatch) -> tuple[tuple[Tensor, Product], int | None, int]:
        """Make a product from a retained graph, and use it.

        Returns:
            made: The loss and the product.
            held: Bytes that the graph holds; None if they could not be measured.
            peak: The most bytes in use.

        Raises:
            RuntimeError: If there is no product, or memory runs out.
        """
        device = self._matrix.parameters[0].device
        ones = [torch.ones_like(p) for p in self._matrix.parameters]
        try:
            with MemoryMeter(device) as building:
                made = self.make(batch, "graph")
            with MemoryMeter(device) as multiplying:
                made[1](ones)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            made = self.make(batch, "graph")  # once more, in case that the loss uses the profiler itself
            made[1](ones)
            return made, None, 0
        held = building.live if multiplying.live is not None else None
        return made, held, max(building.peak, (held or 0) + multiplying.peak)
