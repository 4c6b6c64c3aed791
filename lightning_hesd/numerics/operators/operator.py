"""A matrix of second derivatives as a product v -> Hv on flat vectors, without ever forming H."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.krylov.vectors import in_shape, norm_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.risk_operator import SampleMean


class CurvatureOperator:
    """A diagonal block of a mean matrix: all of it, or the part of some parameters.

    Attributes:
        mean: The matrix.
        block: The range of its parameters.
        parameters: These.
        space: The space of vectors over them.
        size: Number of elements of a vector in this process: n, unless others hold parts of it.
        matvecs: Products so far.
    """

    def __init__(self, mean: SampleMean, block: slice = slice(None), scale: Tensor | None = None) -> None:
        """Take a block.

        Args:
            mean: The matrix.
            block: A range of its parameters that is among its blocks.
            scale: Diagonal of S, shape (n,), to take S H S for H.
        """
        everything = mean.matrix.parameters
        self.mean = mean
        self.block = block
        self.parameters = everything[block]
        self._sizes = [p.numel() for p in self.parameters]
        self.size = sum(self._sizes)
        self.space = mean.sharding.space(self.parameters)
        self.matvecs = 0
        self._scale = scale
        self._offset = sum(p.numel() for p in everything[: block.start or 0])

    @property
    def dimension(self) -> int:
        """Order n of the block."""
        return self.space.dimension

    def squared_weight_norm(self) -> float:
        """Return the squared length of the parameters, in the coordinates of the vectors."""
        scales: Sequence[Tensor | float] = [1.0] * len(self._sizes)
        if self._scale is not None:
            scales = torch.split(self._scale, self._sizes)
        pairs = zip(self.parameters, scales, strict=True)
        norms = torch.stack([norm_of(p.detach().flatten() / scale) for p, scale in pairs]).tolist()
        return self.space.total(math.fsum(norm**2 for norm in norms))

    def matvec(self, vector: Tensor) -> Tensor:
        """Return Hv, shape (n,), summed over batches and processes; v has shape (n,)."""
        [product] = joint_products([self], [vector])
        return product

    def group_products(self, vectors: Tensor, parts: int) -> Iterator[tuple[WeightedBatch, int, Tensor]]:
        """Yield the products of groups of samples, each batch of this process cut into at most `parts` of them.

        Args:
            vectors: The vectors, shape (count, n).
            parts: Groups per batch.

        Yields:
            The group, its position among those of its batch, and its products with the vectors, shape (count, n).
        """
        for group, position, products in self.mean.group_products([self.expand(v) for v in vectors], parts):
            yield group, position, self._own(products)
        self.matvecs += len(vectors)

    def explain_non_finite(self, vector: Tensor | None) -> Exception:
        """Return the error for a product with `vector` that came out NaN or infinite, naming the batch."""
        return self.mean.explain_non_finite(None if vector is None else self.expand(vector))

    def expand(self, vector: Tensor) -> list[Tensor | None]:
        """Return a vector, scaled, as one of all parameters, in their shapes and dtypes."""
        return _joint([self], [vector])

    def _own(self, products: Tensor) -> Tensor:
        return self._scaled(products[..., self._offset : self._offset + self.size])

    def _scaled(self, vector: Tensor) -> Tensor:
        return vector if self._scale is None else vector * self._scale


def joint_products(operators: Sequence[CurvatureOperator], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the product of each operator with its vector, from one pass over the samples.

    Args:
        operators: Different blocks of one matrix.
        vectors: A vector for each, shape (n,).
    """
    for operator in operators:
        operator.matvecs += 1
    product = operators[0].mean.product(_joint(operators, vectors))
    return [operator._own(product) for operator in operators]  # noqa: SLF001 - of this module


def _joint(operators: Sequence[CurvatureOperator], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the vectors, scaled, as one of all parameters, in their shapes and dtypes."""
    joint: list[Tensor | None] = [None] * len(operators[0].mean.matrix.parameters)
    for operator, vector in zip(operators, vectors, strict=True):
        joint[operator.block] = in_shape(operator._scaled(vector), operator.parameters)  # noqa: SLF001 - of this module
    return joint


def prepare_differences(operators: Sequence[CurvatureOperator]) -> None:
    """Choose the step of central differences, if they are in use, and state the error of products.

    Args:
        operators: All blocks, in the coordinates in which the error counts.
    """
    mean = operators[0].mean
    differences = mean.maker.differences
    if differences is None:
        return
    sizes = [operator.size for operator in operators]

    def matvec(vector: Tensor) -> Tensor:
        return torch.cat(joint_products(operators, torch.split(vector, sizes)))

    vector = mean.space.gaussian(torch.Generator().manual_seed(0))
    start = vector.to(device=mean.device, dtype=mean.dtype)
    mean.product_error = differences.choose_step(matvec, start, mean.cache.step)
    mean.cache.step = differences.step
