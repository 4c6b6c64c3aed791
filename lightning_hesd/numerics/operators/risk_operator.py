"""A matrix of the mean loss over all samples: the weighted mean of the batches' matrices, over all processes.

H = Σ_b (w_b/W) H_b over batches b with weights w_b (their numbers of samples), W = Σ w_b. The sum may run over
several processes: each holds a share of the batches, and `all_reduce` adds the shares up. Where processes work on one
batch together, which their `layout` tells, its product is complete as it is.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from lightning_hesd.numerics.devices import to_device
from lightning_hesd.numerics.inputs.batches import SkippedBatchError
from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError
from lightning_hesd.numerics.inputs.groups import check_groups
from lightning_hesd.numerics.inputs.parameter_sharding import Layout
from lightning_hesd.numerics.operators.curvature import OutputMatrix
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.numerics.operators.strategies import AnalysisCache, NoExactProductError, ProductMaker
from lightning_hesd.numerics.operators.verification import (
    SHARDED_PART,
    Verification,
    WrongDerivativeError,
    joint_outcome,
    verify,
)
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.parameter_sharding import AllReduce
    from lightning_hesd.numerics.operators.curvature import Matrix, Product, Vector
    from lightning_hesd.numerics.operators.strategies import Strategy
    from lightning_hesd.numerics.operators.verification import InFinest


EPSILONS = (0.0, *(torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)))
"""Precisions that the processes tell each other of."""


class AnotherProcessFailedError(RuntimeError):
    """This process is fine, but the sum over processes cannot be completed."""

    def __init__(self) -> None:
        super().__init__("the analysis failed on another process, whose own message names the cause")


class SampleMean:
    """Products of the mean matrix, from one pass over the batches each.

    With several processes a failure must not leave the others waiting in `all_reduce`: the process that fails goes on
    contributing NaN, which every process sees at the same step, and raises its own error from `failure` afterwards.

    Attributes:
        matrix: The matrix of a batch.
        batches: This process's share, without the batches that were skipped.
        dtype: Floating-point type of the products.
        layout: How the parameters lie in the processes.
        space: The space of vectors over all parameters.
        loss: Mean loss over all batches.
        weight: Sum of the weights of all batches.
        num_samples: Number of samples of all batches.
        num_batches: Number of batches of all processes.
        num_skipped: Number of batches that the loss function skipped, in all processes; they are left out.
        uncut: Why a batch of this process was not cut into groups; None if all were.
        maker: Makes the products, and knows their strategy.
        cache: What is known about the loss.
        product_error: Norm of the error of a product with a unit vector, beyond rounding: of central differences, see
            `prepare_differences`.
        epsilon: Machine epsilon of the coarsest floating-point type in the graphs of the loss, in any process.
        failure: What went wrong in this process, if anything did.
        passes: Products so far.
        seconds_per_product: Mean time; meaningful on the CPU only, where calls do not return early.
    """

    def __init__(
        self,
        matrix: Matrix,
        batches: Sequence[WeightedBatch],
        *,
        strategy: Strategy | Literal["auto"],
        dtype: torch.dtype,
        all_reduce: AllReduce | None = None,
        graph_memory: float = math.inf,
        cache: AnalysisCache | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Evaluate the loss of every batch and prepare the products.

        Args:
            matrix: The matrix of a batch.
            batches: This process's share; may be empty if there are others.
            strategy: How to compute products.
            dtype: Floating-point type of the products.
            all_reduce: Sums a tensor over processes; None for a single process.
            graph_memory: Bytes that "auto" may spend on graphs, those that come and go included.
            cache: What is known from an earlier analysis; brought up to date.
            layout: How the parameters lie in the processes; default: each holds all of them.

        Raises:
            ValueError: If no process has a batch, or the matrix cannot be what it is asked to be.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            RuntimeError: If there are no products.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        self.matrix = matrix
        self.batches = batches
        self.dtype = dtype
        self.failure: Exception | None = None
        self.product_error = 0.0
        self.epsilon = 0.0
        self.passes = 0
        self.seconds_per_product = 0.0
        self._all_reduce = all_reduce
        self._products: list[Product] = []
        self._losses: list[float] = []
        self._skipped = 0
        self.uncut: str | None = None
        self._sizes = [p.numel() for p in matrix.parameters]

        self.cache = cache or AnalysisCache()
        self.layout = layout or Layout()
        self.space = self.layout.space(matrix.parameters)
        self.cache.invalidate(self.space.dimension)
        self.maker = ProductMaker(matrix, strategy, graph_memory=graph_memory, cache=self.cache, layout=self.layout)
        if not self._prepare():
            self._prepare()

    def _prepare(self) -> bool:
        """Prepare the products of all batches.

        If some process finds that there are no exact ones, all processes fall back and False is returned.

        Raises:
            ValueError: If no process has a batch.
            ArithmeticError: If the loss of a batch is NaN or infinite.
            AnotherProcessFailedError: If that or anything else happened on another process.
        """
        failed, lacks_product = 0.0, 0.0
        sums, obstacle = [0.0, 0.0, 0.0], None
        try:
            sums = self._make_products()
        except NoExactProductError as error:
            obstacle, lacks_product = str(error), 1.0
        except Exception as error:
            if self._all_reduce is None:
                raise
            self.failure, failed = error, 1.0
        samples = math.fsum(batch.num_samples for batch in self.batches)
        own = torch.tensor([*sums, failed, lacks_product, self._skipped, samples], dtype=torch.float64)
        total = self.sum_of_numbers(own).tolist()
        self.weight, weighted_loss, num_batches, failures, without_product, num_skipped, self.num_samples = total
        self.num_batches, self.num_skipped = round(num_batches), round(num_skipped)
        if failures:
            raise self.failure or AnotherProcessFailedError
        if without_product:
            self.maker.fall_back(obstacle or "another process found no exact product")
            return False
        if self.num_skipped:
            everything = self.num_batches + self.num_skipped
            self.maker.reason += f"; {self.num_skipped} of {everything} batches left out, for which there is no loss"
        if not self.weight:
            msg = "there are no batches to analyse: `batches` is empty."
            if self.num_skipped:
                msg = (
                    f"there is no loss to analyse: the loss function skipped all {self.num_skipped} batches, as a "
                    "`training_step` that returns None does. Pass a `loss_fn` that returns the loss of every batch."
                )
            raise ValueError(msg)
        self.loss = weighted_loss / self.weight
        return True

    def _make_products(self) -> list[float]:
        """Make the products of this process, and return the sums of its weights and weighted losses, and its batches.

        Raises:
            ArithmeticError: If the loss of a batch is NaN or infinite.
            SkippedBatchError: If a batch is skipped that all processes must evaluate together.
        """
        self._products, self._losses = [], []
        try:
            for batch, (loss, product) in self.maker.make_all(self.batches):
                value = loss.item()
                if not math.isfinite(value):
                    msg = f"the loss of {batch.label} is {value}; the Hessian is undefined there."
                    raise ArithmeticError(msg)
                self._products.append(product)
                self._losses.append(value)
        except SkippedBatchError:
            # Processes that work on one batch together could not tell each other.
            if self.layout.all_reduce is not None or not self._leave_out_skipped():
                raise
            return self._make_products()
        weights = [batch.weight for batch in self.batches]
        weighted = [weight * loss for weight, loss in zip(weights, self._losses, strict=True)]
        return [math.fsum(weights), math.fsum(weighted), float(len(weights))]

    def _leave_out_skipped(self) -> int:
        """Leave out the batches that the loss function skips, and return how many these are."""
        kept = [batch for batch in self.batches if not self._is_skipped(batch)]
        skipped = len(self.batches) - len(kept)
        self.batches, self._skipped = kept, self._skipped + skipped
        return skipped

    def _is_skipped(self, batch: WeightedBatch) -> bool:
        try:
            self.matrix.loss(batch)
        except SkippedBatchError:
            return True
        return False

    # Verification ---------------------------------------------------------------------------------------------------

    def verify(self, in_finest: InFinest | None) -> None:
        """Compare the loss with its derivatives, once for each kind of graph that it has.

        Where only the products by differentiating twice are wrong, central differences take their place, if the choice
        is free.

        Args:
            in_finest: Makes a context in which module and batches are in the finest precision of the device; None:
                there is none.

        Raises:
            WrongDerivativeError: If there are no products that can be right.
        """
        cache, kinds = self.cache, frozenset(self.matrix.facts.kinds)
        is_new = cache.verification is None or not kinds <= cache.kinds
        is_new_anywhere, *counts = self._anywhere([is_new, *(self.matrix.facts.epsilon >= e for e in EPSILONS)])
        self.epsilon = max(epsilon for epsilon, is_there in zip(EPSILONS, counts, strict=True) if is_there)
        if self.layout.all_reduce is not None and isinstance(self.matrix, OutputMatrix):
            cache.verification = SHARDED_PART
        elif is_new_anywhere:
            cache.verification = self._compared(in_finest)
            cache.kinds = kinds | frozenset(self.matrix.facts.kinds)
        if self.verification.verdict(exact=self.is_exact) == "no":
            self._give_up_exact_products()

    def refute(self, words: str) -> None:
        """Take central differences from now on, because products turned out not to be those of a symmetric matrix.

        Raises:
            WrongDerivativeError: If that will not do.
        """
        self.cache.verification = replace(self.verification, products="differs", words=words)
        self._give_up_exact_products()

    @property
    def verification(self) -> Verification:
        """What comparing the loss with its derivatives has shown."""
        assert self.cache.verification is not None  # noqa: S101 - `verify` comes first
        return self.cache.verification

    @property
    def is_exact(self) -> bool:
        """Whether products come from differentiating twice, not from differences."""
        return self.maker.differences is None

    def _compared(self, in_finest: InFinest | None) -> Verification:
        """Compare in every process that has a batch, and join what they find."""
        together = self.layout.all_reduce is not None
        own = Verification("cannot be told", "cannot be told", "this process has no batch to compare with differences")
        if self.batches:
            smallest = min(self.batches, key=lambda batch: batch.num_samples)
            batch = self.batches[0] if together else smallest
            own = verify(
                self.matrix, batch, self.space, exact=self.is_exact, in_finest=in_finest, may_fail=not together
            )
        of_gradient, of_products = (joint_outcome(self.sum_of_numbers(codes).tolist()) for codes in own.codes())
        return Verification(of_gradient, of_products, own.words)

    def _give_up_exact_products(self) -> None:
        if not self.maker.is_free or self.verification.gradient == "differs":
            raise WrongDerivativeError(self.verification.words, self.loss)
        self._products = []
        self.maker.fall_back(self.verification.words)
        self._prepare()

    def _anywhere(self, facts: Sequence[bool]) -> list[bool]:
        """Return which of these holds in any process."""
        counts = self.sum_of_numbers(torch.tensor(facts, dtype=torch.float64)).tolist()
        return [self.layout.largest(count) > 0 for count in counts]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.matrix.parameters[0].device

    @property
    def is_distributed(self) -> bool:
        """Whether other processes take part."""
        return self._all_reduce is not None

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor if self._all_reduce is None else self._all_reduce(tensor)

    def sum_of_numbers(self, numbers: Tensor) -> Tensor:
        """Return the sum of numbers on the CPU over all processes, float64, on the CPU."""
        if self._all_reduce is None:
            return numbers
        return self._all_reduce(to_device(numbers, self.device)).cpu().double()

    def product(self, vector: Vector) -> Tensor:
        """Return the product with a vector, flat, shape (n,), summed over batches and processes."""
        started = time.perf_counter()
        result = torch.zeros(sum(self._sizes), dtype=self.dtype, device=self.device)
        try:
            if self.failure is None:
                for batch, product in zip(self.batches, self._products, strict=True):
                    self._add(product(vector), batch.weight / self.weight, result)
        except Exception as error:
            if self._all_reduce is None:
                raise
            self.failure = error
        if self.failure is not None:
            result.fill_(math.nan)
        result = self.sum_over_processes(result)
        self.passes += 1
        self.seconds_per_product += (time.perf_counter() - started - self.seconds_per_product) / self.passes
        return result

    def group_products(self, vectors: Sequence[Vector], parts: int) -> Iterator[tuple[WeightedBatch, int, Tensor]]:
        """Yield the products of groups of samples, each batch of this process cut into at most `parts` of them.

        Args:
            vectors: The vectors.
            parts: Groups per batch.

        Yields:
            The group, its position among those of its batch, and its products, flat, shape (vectors, n).
        """
        for batch, loss, whole in zip(self.batches, self._losses, self._products, strict=True):
            groups = self._groups(batch, loss, parts)
            for position, group in enumerate(groups):
                product = whole if len(groups) == 1 else self.maker.make(group, "graph")[1]
                result = torch.zeros(len(vectors), sum(self._sizes), dtype=self.dtype, device=self.device)
                for row, vector in zip(result, vectors, strict=True):
                    self._add(product(vector), 1.0, row)
                yield group, position, result

    def _groups(self, batch: WeightedBatch, loss: float, parts: int) -> Sequence[WeightedBatch]:
        """Return the groups of samples of a batch whose loss is known; the batch itself where it cannot be cut."""
        if parts == 1:
            return [batch]
        try:
            groups = batch.split(parts)
            if len(groups) > 1:
                check_groups(groups, [self.matrix.loss(group) for group in groups], loss)
        except UnsplittableBatchError as error:
            self.uncut = str(error)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.uncut = f"a part of {batch.label} has no loss ({type(error).__name__}: {one_line(error)})"
        else:
            return groups
        return [batch]

    def _add(self, product: Vector, weight: float, result: Tensor) -> None:
        for target, part in zip(torch.split(result, self._sizes), product, strict=True):
            if part is not None:
                target.view_as(part).add_(part, alpha=weight)

    def explain_non_finite(self, vector: Vector | None) -> Exception:
        """Return the error for a product with `vector` that came out NaN or infinite, naming the batch."""
        if vector is None:
            msg = "a Hessian-vector product is NaN or infinite; which batch it comes from was not kept."
            return self.failure or ArithmeticError(msg)
        total = self.product(vector)  # before anybody returns: the other processes take part in it
        if self.failure is not None:
            return self.failure
        for batch, product in zip(self.batches, self._products, strict=True):
            if not self._is_finite(product(vector)):
                msg = (
                    f"the Hessian-vector product of {batch.label} is NaN or infinite, though its loss is finite; look "
                    "for operations with undefined second derivatives (a square root or norm at zero, for example)."
                )
                return ArithmeticError(msg)
        if self._is_finite([total]):
            msg = f"the Hessian-vector products are too large for the arithmetic of {self.dtype}: scale the loss down."
            return ArithmeticError(msg)
        return AnotherProcessFailedError()

    def _is_finite(self, vector: Vector) -> bool:
        return not self.layout.largest(float(any(part is not None and not part.isfinite().all() for part in vector)))

    def gradient_equivalents(self) -> float | None:
        """Return seconds per product over seconds per gradient, on the CPU; calls on other devices return early."""
        if self.device.type != "cpu" or not self.batches:
            return None
        # The last thing measured, so that the caches are as warm as they were for the products.
        started = time.perf_counter()
        for batch in self.batches:
            self.maker.gradient(batch)
        seconds = time.perf_counter() - started
        return self.seconds_per_product / seconds if seconds > 0 else None
