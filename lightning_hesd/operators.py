"""The Hessian of a mean loss as a matrix-vector product: v -> Hv on flat vectors, without ever forming H.

H = Σ_b (w_b/W) H_b over batches b with weights w_b (their numbers of samples), W = Σ w_b. The sum may run over
several processes: each holds a share of the batches, and `all_reduce` adds the shares up.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_hesd.products import choose_strategy, gradient, recomputed_product, retained_graph_product

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd.products import Product, Strategy

    AllReduce = Callable[[Tensor], Tensor]
    """Sums a tensor over all processes."""


@dataclass(frozen=True)
class WeightedBatch:
    """One batch of the analysis.

    Attributes:
        data: The batch as the loss function takes it.
        weight: Its weight in the mean loss: its number of samples.
        index: Its position among the batches of all processes; it seeds whatever is random in the forward pass.
    """

    data: Any
    weight: float
    index: int

    def __post_init__(self) -> None:
        """Check the weight.

        Raises:
            ValueError: If it is not positive and finite.
        """
        if not 0 < self.weight < math.inf:
            msg = f"`batch_weight` must be positive and finite, got {self.weight} for batch {self.index}."
            raise ValueError(msg)

    def copy(self) -> WeightedBatch:
        """Return a copy for code that may change its batch in place, which every evaluation must find unchanged."""
        try:
            data = copy.deepcopy(self.data)
        except Exception:  # noqa: BLE001 - what cannot be copied is passed on as it is
            data = self.data
        return WeightedBatch(data, self.weight, self.index)


class AnotherProcessFailedError(RuntimeError):
    """This process is fine, but the sum over processes cannot be completed."""

    def __init__(self) -> None:
        super().__init__("the analysis failed on another process, whose own message names the cause")


class HessianOperator:
    """Hessian-vector products of the weighted mean loss over batches and processes.

    With several processes a failure must not leave the others waiting in `all_reduce`: the process that fails goes on
    contributing NaN, which every process sees at the same step, and raises its own error from `failure` afterwards.

    Attributes:
        batches: This process's share.
        dtype: Floating-point type of the flat vectors.
        loss: Mean loss over all batches.
        weight: Sum of the weights of all batches.
        strategy: The strategy in use.
        strategy_reason: Why.
        failure: What went wrong in this process, if anything did.
        seconds: Time spent in products so far; meaningful on the CPU only, where calls do not return early.
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
    ) -> None:
        """Evaluate the loss of every batch and prepare the products.

        Args:
            loss_fn: Mean loss of one batch, a scalar tensor; the same at every call.
            batches: This process's share; may be empty if there are others.
            parameters: The analysed parameters, n elements together.
            strategy: How to compute products.
            dtype: Floating-point type of the flat vectors.
            all_reduce: Sums a tensor over processes; None for a single process.

        Raises:
            ValueError: If no process has a batch.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        self.strategy: Strategy
        self.strategy_reason: str
        self.failure: Exception | None = None
        self.seconds = 0.0
        self._loss_fn = loss_fn
        self.batches = batches
        self._parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        self.dtype = dtype
        self._device = parameters[0].device
        self._all_reduce = all_reduce
        self._products: list[Product] = []

        total = torch.zeros(3, dtype=torch.float64)  # weight, weight·loss, number of failed processes
        try:
            self._build(strategy, total)
        except Exception as error:
            if all_reduce is None:
                raise
            self.failure = error
            total = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        self.weight, weighted_loss, failures = self._sum_over_processes(total.to(self._device)).tolist()
        if failures:
            raise self.failure or AnotherProcessFailedError
        if not self.weight:
            msg = "there are no batches to analyse: `batches` is empty."
            raise ValueError(msg)
        self.loss = weighted_loss / self.weight

    def _build(self, strategy: Strategy | Literal["auto"], total: Tensor) -> None:
        self.strategy, self.strategy_reason = ("graph", "no batches") if strategy == "auto" else (strategy, "as asked")
        if strategy == "auto" and self.batches:
            first = self.batches[0]
            scale = sum(batch.weight for batch in self.batches) / first.weight
            loss_of_first = partial(self._loss_fn, first)
            self.strategy, self.strategy_reason = choose_strategy(loss_of_first, self._parameters, scale)
        make_product = retained_graph_product if self.strategy == "graph" else recomputed_product
        for batch in self.batches:
            loss, product = make_product(partial(self._loss_fn, batch), self._parameters)
            if not loss.isfinite():
                msg = f"the loss of batch {batch.index} is {loss.item()}; the Hessian is undefined there."
                raise ArithmeticError(msg)
            self._products.append(product)
            total += torch.tensor([batch.weight, batch.weight * loss.item(), 0.0], dtype=torch.float64)

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return tensor if self._all_reduce is None else self._all_reduce(tensor)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """View a flat vector in the shapes, and cast it to the dtypes, of the parameters."""
        parts = torch.split(vector, self._sizes)
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self._parameters, strict=True)]

    def matvec(self, vector: Tensor) -> Tensor:
        """Return Hv, shape (n,), summed over batches and processes; v has shape (n,)."""
        started = time.perf_counter()
        result = torch.zeros(sum(self._sizes), dtype=self.dtype, device=self._device)
        try:
            if self.failure is None:
                self._add_products(vector, result)
        except Exception as error:
            if self._all_reduce is None:
                raise
            self.failure = error
        if self.failure is not None:
            result.fill_(math.nan)
        result = self._sum_over_processes(result)
        self.seconds += time.perf_counter() - started
        return result

    def _add_products(self, vector: Tensor, result: Tensor) -> None:
        directions = self._split(vector)
        targets = [part.view_as(p) for part, p in zip(torch.split(result, self._sizes), self._parameters, strict=True)]
        for batch, product in zip(self.batches, self._products, strict=True):
            for target, part in zip(targets, product(directions), strict=True):
                if part is not None:
                    target.add_(part, alpha=batch.weight / self.weight)

    def explain_non_finite(self, vector: Tensor) -> Exception:
        """Return the error for a product with `vector` that came out NaN or infinite, naming the batch."""
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
            gradient(self._loss_fn(batch), self._parameters)
        return time.perf_counter() - started
