"""The Hessian of a mean loss as a matrix-vector product: v -> Hv on flat vectors, without ever forming H.

H = Σ_b (w_b/W) H_b over batches b with weights w_b (their numbers of samples), W = Σ w_b. The sum may run over
several processes: each holds a share of the batches, and `all_reduce` adds the shares up.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_hesd.strategies import Calibration, NoExactProductError, ProductMaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.batches import WeightedBatch
    from lightning_hesd.products import Product, Strategy

    AllReduce = Callable[[Tensor], Tensor]
    """Sums a tensor over all processes."""


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
        num_batches: Number of batches of all processes.
        maker: Makes the products, and knows their strategy.
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
        scale: Tensor | None = None,
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
            scale: Diagonal of S, shape (n,), to take S H S for H.

        Raises:
            ValueError: If no process has a batch.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        self.failure: Exception | None = None
        self.matvecs = 0
        self.seconds_per_product = 0.0
        self.product_error = 0.0
        self.batches = batches
        self.dtype = dtype
        self._timed = 0
        self._parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        self._device = parameters[0].device
        self._all_reduce = all_reduce
        self._scale = scale
        self._products: list[Product] = []

        calibration = calibration or Calibration()
        calibration.renew(sum(self._sizes))
        self.maker = ProductMaker(loss_fn, parameters, strategy, graph_memory=graph_memory, calibration=calibration)
        if not self._prepare():
            self._prepare()
        if self.maker.differences is not None:
            generator = torch.Generator().manual_seed(0)
            vector = torch.randn(sum(self._sizes), generator=generator, dtype=torch.float64)
            self.product_error = self.maker.differences.choose_step(
                self.matvec, vector.to(device=self._device, dtype=dtype), calibration.step
            )
            calibration.step = self.maker.differences.step

    def _prepare(self) -> bool:
        """Prepare the products of all batches.

        If some process finds that there are no exact ones, all processes fall back and False is returned.

        Raises:
            ValueError: If no process has a batch.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        own = torch.zeros(5, dtype=torch.float64)  # weight, weight·loss, batches, failures, lacks of an exact product
        obstacle = None
        try:
            for batch, (loss, product) in self.maker.make_all(self.batches):
                if not loss.isfinite():
                    msg = f"the loss of batch {batch.index} is {loss.item()}; the Hessian is undefined there."
                    raise ArithmeticError(msg)  # noqa: TRY301 - on its way to the other processes
                self._products.append(product)
                own += torch.tensor([batch.weight, batch.weight * loss.item(), 1.0, 0.0, 0.0], dtype=torch.float64)
        except NoExactProductError as error:
            obstacle = str(error)
            own = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        except Exception as error:
            if self._all_reduce is None:
                raise
            self.failure = error
            own = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        total = self.sum_over_processes(own.to(self._device)).tolist()
        self.weight, weighted_loss, num_batches, failures, without_product = total
        self.num_batches = round(num_batches)
        if failures:
            raise self.failure or AnotherProcessFailedError
        if without_product:
            self._products = []
            self.maker.fall_back(obstacle or "another process found no exact product")
            return False
        if not self.weight:
            msg = "there are no batches to analyse: `batches` is empty."
            raise ValueError(msg)
        self.loss = weighted_loss / self.weight
        return True

    @property
    def is_distributed(self) -> bool:
        """Whether other processes take part."""
        return self._all_reduce is not None

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor if self._all_reduce is None else self._all_reduce(tensor)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """View a flat vector, scaled, in the shapes, and cast it to the dtypes, of the parameters."""
        parts = torch.split(self._scaled(vector), self._sizes)
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self._parameters, strict=True)]

    def squared_weight_norm(self) -> float:
        """Return the squared length of the parameters, in the coordinates of the vectors."""
        scales: Sequence[Tensor | float] = [1.0] * len(self._sizes)
        if self._scale is not None:
            scales = torch.split(self._scale, self._sizes)
        pairs = zip(self._parameters, scales, strict=True)
        return math.fsum(float((p.detach().flatten().double() / scale).square().sum()) for p, scale in pairs)

    def _scaled(self, vector: Tensor) -> Tensor:
        return vector if self._scale is None else vector * self._scale

    def matvec(self, vector: Tensor) -> Tensor:
        """Return Hv, shape (n,), summed over batches and processes; v has shape (n,) and, for differences, length 1."""
        if self._scale is None or self.maker.differences is None:
            return self._matvec(vector)
        length = float(torch.linalg.vector_norm(self._scaled(vector)))
        return self._matvec(vector / length) * length

    def _matvec(self, vector: Tensor) -> Tensor:
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
        result = self.sum_over_processes(self._scaled(result))
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
                _, product = self.maker.make(group, "graph")
                result = torch.zeros(len(vectors), sum(self._sizes), dtype=self.dtype, device=self._device)
                for row, direction in zip(result, directions, strict=True):
                    self._add(product(direction), 1.0, row)
                yield group, position, self._scaled(result)
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
            self.maker.gradient(batch)
        return time.perf_counter() - started
