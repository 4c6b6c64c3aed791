"""The Hessian of a mean loss as a matrix-vector product: v -> Hv on flat vectors, without ever forming H.

H = Σ_b (w_b/W) H_b over batches b with weights w_b (their numbers of samples), W = Σ w_b. The sum may run over
several processes: each holds a share of the batches, and `all_reduce` adds the shares up.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_hesd.memory import MemoryMeter
from lightning_hesd.products import (
    FiniteDifferences,
    gradient,
    recomputed_product,
    retained_graph_product,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.batches import WeightedBatch
    from lightning_hesd.products import Product, Strategy

    AllReduce = Callable[[Tensor], Tensor]
    """Sums a tensor over all processes."""

LADDER_FACTOR = 4.0
LADDER_RUNGS = 10


class AnotherProcessFailedError(RuntimeError):
    """This process is fine, but the sum over processes cannot be completed."""

    def __init__(self) -> None:
        super().__init__("the analysis failed on another process, whose own message names the cause")


@dataclass
class Calibration:
    """What is found out about a loss at its first analysis, and holds as long as shapes stay the same.

    Attributes:
        graph_bytes: Memory that the gradient's graph holds per unit of batch weight; None: not measured.
        product_bytes: Memory that a product takes beside graphs, per unit of batch weight.
        obstacle: Why the loss cannot be differentiated twice; None if it can.
        step: Step of central differences; None: not chosen.
        dimension: Number of analysed parameters it was found out with; None: nothing was.
    """

    graph_bytes: float | None = None
    product_bytes: float = 0.0
    obstacle: str | None = None
    step: float | None = None
    dimension: int | None = None

    def renew(self, dimension: int) -> None:
        """Forget what was found out with other parameters."""
        if self.dimension != dimension:
            self.graph_bytes = self.obstacle = self.step = None
            self.dimension = dimension


class HessianOperator:
    """Hessian-vector products of the weighted mean loss over batches and processes.

    With "auto" the products are exact wherever the loss can be differentiated twice: from retained graphs for as many
    batches as fit into the memory, recomputed for the rest. There is nothing to time: a recomputed product is a
    product from a retained graph, and the gradient that builds the graph on top of it. Only a loss without a second
    derivative is left to central differences.

    With several processes a failure must not leave the others waiting in `all_reduce`: the process that fails goes on
    contributing NaN, which every process sees at the same step, and raises its own error from `failure` afterwards.

    Attributes:
        batches: This process's share.
        dtype: Floating-point type of the flat vectors.
        loss: Mean loss over all batches.
        weight: Sum of the weights of all batches.
        num_batches: Number of batches of all processes.
        strategy: The strategy in use; "graph" if any batch's graph is retained.
        strategy_reason: Why.
        graph_bytes: What the retained graphs hold, and a product takes on top; None unless "auto" measured it.
        product_error: Norm of the error of a product with a unit vector, beyond rounding: of central differences.
        failure: What went wrong in this process, if anything did.
        matvecs: Products so far.
        seconds_per_product: Mean time; meaningful on the CPU only, where calls do not return early.
    """

    def __init__(
        self,
        loss_fn: Callable[[WeightedBatch], Tensor],
        batches: Sequence[WeightedBatch],
        parameters: Sequence[Tensor],
        *,
        strategy: Strategy | Literal["auto"],
        dtype: torch.dtype,
        all_reduce: AllReduce | None = None,
        graph_memory: float = math.inf,
        calibration: Calibration | None = None,
    ) -> None:
        """Evaluate the loss of every batch and prepare the products.

        Args:
            loss_fn: Mean loss of one batch, a scalar tensor; the same at every call.
            batches: This process's share; may be empty if there are others.
            parameters: The analysed parameters, n elements together.
            strategy: How to compute products.
            dtype: Floating-point type of the flat vectors.
            all_reduce: Sums a tensor over processes; None for a single process.
            graph_memory: Bytes that "auto" may spend on graphs, those that come and go included.
            calibration: What is known from an earlier analysis; brought up to date.

        Raises:
            ValueError: If no process has a batch.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        self.failure: Exception | None = None
        self.matvecs = 0
        self.seconds_per_product = 0.0
        self._timed = 0
        self.product_error = 0.0
        self.graph_bytes: float | None = None
        self.batches = batches
        self.dtype = dtype
        self._loss_fn = loss_fn
        self._parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        self._device = parameters[0].device
        self._all_reduce = all_reduce
        self._calibration = calibration or Calibration()
        self._calibration.renew(sum(self._sizes))
        self._products: list[Product]
        self._differences: FiniteDifferences | None

        obstacle = self._calibration.obstacle if strategy == "auto" else None
        self.strategy: Strategy = "finite_difference" if obstacle else "graph" if strategy == "auto" else strategy
        self.strategy_reason = f"auto: {obstacle}" if obstacle else "as asked"
        if not self._build(measured=strategy == "auto" and obstacle is None, graph_memory=graph_memory):
            # On one process at least, so on all of them.
            self.strategy = "finite_difference"
            obstacle = self._calibration.obstacle or "on another process there is no second derivative"
            self._calibration.obstacle = obstacle
            self.strategy_reason = f"auto: {obstacle}"
            self._build(measured=False, graph_memory=graph_memory)
        if self._differences is not None:
            self._choose_step(self._differences)

    def _build(self, *, measured: bool, graph_memory: float) -> bool:
        """Prepare the products of all batches; return False if some process found that there is no exact one.

        Raises:
            ValueError: If no process has a batch.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        self._products = []
        self._differences = None
        own = torch.zeros(5, dtype=torch.float64)  # weight, weight·loss, batches, failures, those for want of a Hessian
        try:
            if self.strategy == "finite_difference":
                self._differences = FiniteDifferences(self._parameters)
            for batch, (loss, product) in self._prepared(measured=measured, graph_memory=graph_memory):
                if not loss.isfinite():
                    msg = f"the loss of batch {batch.index} is {loss.item()}; the Hessian is undefined there."
                    raise ArithmeticError(msg)  # noqa: TRY301 - on its way to the other processes
                self._products.append(product)
                own += torch.tensor([batch.weight, batch.weight * loss.item(), 1.0, 0.0, 0.0], dtype=torch.float64)
        except _NoHessianError as error:
            self._products = []
            self._calibration.obstacle = str(error)
            own = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        except Exception as error:
            if self._all_reduce is None:
                raise
            self.failure = error
            own = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        total = self.sum_over_processes(own.to(self._device)).tolist()
        self.weight, weighted_loss, num_batches, failures, without_hessian = total
        self.num_batches = round(num_batches)
        if failures:
            raise self.failure or AnotherProcessFailedError
        if without_hessian:
            return False
        if not self.weight:
            msg = "there are no batches to analyse: `batches` is empty."
            raise ValueError(msg)
        self.loss = weighted_loss / self.weight
        return True

    def _prepared(
        self, *, measured: bool, graph_memory: float
    ) -> Iterator[tuple[WeightedBatch, tuple[Tensor, Product]]]:
        """Yield every batch with its loss and product.

        Raises:
            _NoHessianError: If there is no exact product.
        """
        for batch in self.batches:
            if not measured:
                yield batch, self._make_product(batch, self.strategy)
        if not measured or not self.batches:
            return
        first = None
        if self._calibration.graph_bytes is None:
            first = self._make_measured_product(self.batches[0])
        graph, product = self._calibration.graph_bytes or 0.0, self._calibration.product_bytes
        largest = max(batch.weight for batch in self.batches)
        # A product takes some memory beside the graphs that stay, and a recomputed one a graph of its own.
        needed = product * largest
        if graph * sum(batch.weight for batch in self.batches) + needed > graph_memory:
            needed += graph * largest
        if needed > graph_memory:
            sizes = (f"{size / 2**20:.1f} MiB" for size in (needed, graph_memory))
            msg = "the gradient graph of one batch and a product take {}, and there is room for {}".format(*sizes)
            raise _NoHessianError(msg)
        kept, held = 0, 0.0
        for position, batch in enumerate(self.batches):
            fits = held + graph * batch.weight + needed <= graph_memory
            if position == 0 and first is not None and fits:
                made = first
            else:
                made = self._make_product(batch, "graph" if fits else "recompute")
            first = None
            held += graph * batch.weight if fits else 0.0
            kept += fits
            yield batch, made
        self.strategy = "graph" if kept else "recompute"
        self.graph_bytes = held + needed
        self.strategy_reason = (
            f"auto: the gradient graphs of {kept} of {len(self.batches)} batches hold {held / 2**20:.1f} MiB"
        )
        if kept < len(self.batches):
            self.strategy_reason += f"; there is room for {graph_memory / 2**20:.1f} MiB, the rest is recomputed"

    def _make_product(self, batch: WeightedBatch, strategy: Strategy) -> tuple[Tensor, Product]:
        loss = partial(self._loss_fn, batch)
        if strategy == "finite_difference":
            assert self._differences is not None  # noqa: S101 - made before the products
            return self._differences.product(loss)
        return (retained_graph_product if strategy == "graph" else recomputed_product)(loss, self._parameters)

    def _make_measured_product(self, batch: WeightedBatch) -> tuple[Tensor, Product]:
        """Make a product from a retained graph, and find out what the graph holds and a product takes.

        One product is computed for that; some losses fail only then.

        Raises:
            _NoHessianError: If there is none, though there is a gradient.
        """
        try:
            with MemoryMeter() as meter:
                made = self._make_product(batch, "graph")
                held = meter.live
                made[1]([torch.ones_like(p) for p in self._parameters])
        except RuntimeError as error:
            FiniteDifferences(self._parameters).product(partial(self._loss_fn, batch))  # or else the loss is at fault
            msg = f"the loss cannot be differentiated twice ({str(error).splitlines()[0]})"
            raise _NoHessianError(msg) from error
        self._calibration.graph_bytes = held / batch.weight
        self._calibration.product_bytes = max(meter.peak - held, held) / batch.weight
        return made

    def _choose_step(self, differences: FiniteDifferences) -> None:
        """Choose the step that balances truncation, which falls with the step, against rounding, which grows.

        From a long step downward, each a quarter of the one before, products of neighbouring steps differ by the
        truncation of the longer and the rounding of the shorter; where they differ least, that difference is the error
        of the shorter. The test vector is rich in the directions of extreme curvature, where truncation is worst.
        """
        epsilon = max(torch.finfo(p.dtype).eps for p in self._parameters)
        size = math.sqrt(sum(float(p.detach().double().square().sum()) for p in self._parameters))
        generator = torch.Generator().manual_seed(0)
        known = self._calibration.step
        differences.step = known or max(size, 1.0) * epsilon ** (1 / 3) / LADDER_FACTOR
        vector = torch.randn(sum(self._sizes), generator=generator, dtype=torch.float64)
        for _ in range(2):
            vector = vector.to(device=self._device, dtype=self.dtype)
            vector = self.matvec(vector / torch.linalg.vector_norm(vector))
        norm = torch.linalg.vector_norm(vector)
        if not 0 < float(norm) < math.inf:
            return  # no curvature, or a failure, which the first product will tell
        vector /= norm

        best = (math.inf, differences.step)
        differences.step *= LADDER_FACTOR if known else LADDER_FACTOR**2
        previous = self.matvec(vector)
        for _ in range(LADDER_RUNGS):
            differences.step /= LADDER_FACTOR
            product = self.matvec(vector)
            gap = float(torch.linalg.vector_norm(product - previous))
            best = min(best, (gap, differences.step))
            if gap > 2 * best[0]:
                break
            previous = product
        gap, differences.step = best
        self.product_error = 4 * gap  # one sample of the rounding stands for those of all products
        self._calibration.step = differences.step

    @property
    def is_distributed(self) -> bool:
        """Whether other processes take part."""
        return self._all_reduce is not None

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor if self._all_reduce is None else self._all_reduce(tensor)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """View a flat vector in the shapes, and cast it to the dtypes, of the parameters."""
        parts = torch.split(vector, self._sizes)
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self._parameters, strict=True)]

    def matvec(self, vector: Tensor) -> Tensor:
        """Return Hv, shape (n,), summed over batches and processes; v has shape (n,) and, for differences, length 1."""
        started = time.perf_counter()
        result = torch.zeros(sum(self._sizes), dtype=self.dtype, device=self._device)
        try:
            if self.failure is None:
                directions = self._split(vector)
                for batch, product in zip(self.batches, self._products, strict=True):
                    self._add(product(directions), batch.weight / self.weight, result)
        except Exception as error:
            if self._all_reduce is None:
                raise
            self.failure = error
        if self.failure is not None:
            result.fill_(math.nan)
        result = self.sum_over_processes(result)
        self.seconds_per_product += (time.perf_counter() - started - self.seconds_per_product) / (self._timed + 1)
        self._timed += 1
        self.matvecs += 1
        return result

    def _add(self, product: Sequence[Tensor | None], weight: float, result: Tensor) -> None:
        targets = torch.split(result, self._sizes)
        for target, part in zip(targets, product, strict=True):
            if part is not None:
                target.view_as(part).add_(part, alpha=weight)

    def group_products(self, vectors: Tensor, parts: int) -> Iterator[tuple[WeightedBatch, int, Tensor]]:
        """Yield the products of groups of samples, each batch of this process cut into at most `parts` of them.

        Args:
            vectors: Unit vectors, shape (count, n).
            parts: Groups per batch.

        Yields:
            The group, its position among those of its batch, and its products with the vectors, shape (count, n).
        """
        directions = [self._split(vector) for vector in vectors]
        for batch in self.batches:
            for position, group in enumerate(batch.split(parts) if parts > 1 else [batch]):
                _, product = self._make_product(
                    group, "finite_difference" if self._differences is not None else "graph"
                )
                result = torch.zeros(len(vectors), sum(self._sizes), dtype=self.dtype, device=self._device)
                for row, direction in zip(result, directions, strict=True):
                    self._add(product(direction), 1.0, row)
                yield group, position, result
        self.matvecs += len(vectors)

    def explain_non_finite(self, vector: Tensor | None) -> Exception:
        """Return the error for a product with `vector` that came out NaN or infinite, naming the batch."""
        if vector is None:
            msg = "a Hessian-vector product is NaN or infinite; which batch it comes from was not kept."
            return self.failure or ArithmeticError(msg)
        total = self.matvec(vector)  # before anybody returns: the other processes take part in it
        if self.failure is not None:
            return self.failure
        directions = self._split(vector)
        for batch, product in zip(self.batches, self._products, strict=True):
            for part in product(directions):
                if part is not None and not part.isfinite().all():
                    msg = (
                        f"the Hessian-vector product of batch {batch.index} is NaN or infinite, though its loss is "
                        "finite; look for operations with undefined second derivatives (a square root or norm at "
                        "zero, for example)."
                    )
                    return ArithmeticError(msg)
        if total.isfinite().all():
            msg = f"the Hessian-vector products are too large for the arithmetic of {self.dtype}: scale the loss down."
            return ArithmeticError(msg)
        return AnotherProcessFailedError()

    def time_gradient(self) -> float:
        """Return the seconds of one plain gradient over this process's batches."""
        started = time.perf_counter()
        for batch in self.batches:
            if self._differences is None:
                gradient(self._loss_fn(batch), self._parameters)
            else:
                self._differences.gradient(partial(self._loss_fn, batch))
        return time.perf_counter() - started


class _NoHessianError(RuntimeError):
    """There is a gradient, but no exact product; says why."""
