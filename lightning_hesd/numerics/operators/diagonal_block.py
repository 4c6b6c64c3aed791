"""Diagonal blocks of a risk operator as products v -> Hv on flat vectors: all of the matrix, or one layer's block.

Also the error that names the batch behind a product that is not finite.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.collectives import AnotherRankFailedError
from lightning_hesd.numerics.krylov.vectors import in_shape, norm_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.operators.curvature import Vector
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator


class DiagonalBlock:
    """A diagonal block of a risk operator, in the coordinates of a preconditioner if there is one.

    Attributes:
        risk: The risk operator.
        block: The range of the block among its parameters.
        parameters: The parameters of the block, or this rank's shards of them.
        space: The space of vectors over them.
        size: Number of elements of a vector on this rank: n, unless parameters are sharded.
        matvecs: Number of products so far.
    """

    def __init__(self, risk: RiskOperator, block: slice = slice(None), scale: Tensor | None = None) -> None:
        """Take a block of the curvature matrix, and the diagonal of S, shape (n,), for products with S H S."""
        everything = risk.matrix.parameters
        self.risk = risk
        self.block = block
        self.parameters = everything[block]
        self._sizes = [p.numel() for p in self.parameters]
        self.size = sum(self._sizes)
        self.space = risk.sharding.space(self.parameters)
        self.matvecs = 0
        self._scale = scale
        self._offset = sum(p.numel() for p in everything[: block.start or 0])

    @property
    def dimension(self) -> int:
        """Order n of the block."""
        return self.space.dimension

    def squared_weight_norm(self, positions: Iterable[int] | None = None) -> float:
        """Return the squared norm of the parameters, in the coordinates of the vectors; of some, given by position."""
        scales: Sequence[Tensor | float] = [1.0] * len(self._sizes)
        if self._scale is not None:
            scales = torch.split(self._scale, self._sizes)
        chosen = range(len(self._sizes)) if positions is None else positions
        norms = torch.stack([norm_of(self.parameters[at].detach().flatten() / scales[at]) for at in chosen]).tolist()
        return self.space.total(math.fsum(norm**2 for norm in norms))

    def ranges(self, positions: Sequence[int]) -> list[slice]:
        """Return the ranges of elements, in a vector on this rank, of some of the parameters, given by position."""
        ends = list(itertools.accumulate(self._sizes))
        return [slice(ends[at] - self._sizes[at], ends[at]) for at in positions]

    def matvec(self, vector: Tensor) -> Tensor:
        """Return Hv, shape (n,), summed over batches and ranks; v has shape (n,)."""
        [product] = block_products([self], [vector])
        return product

    def finite_matvec(self, vector: Tensor) -> Tensor:
        """Return Hv as `matvec` does, for a finite v.

        Raises:
            ArithmeticError: If the product is NaN or infinite; the message names the batch.
        """
        product = self.matvec(vector)
        if not self.space.is_finite(product):
            error = explain_non_finite(self, vector)
            raise error
        return product

    def scaled(self, vector: Tensor) -> Tensor:
        """Return Sv, or v itself without a preconditioner."""
        return vector if self._scale is None else vector * self._scale

    def expand(self, vector: Tensor) -> list[Tensor | None]:
        """Return Sv in the shapes and dtypes of all parameters of the risk operator; None outside of the block."""
        return _expand([self], [vector])

    def restrict(self, products: Tensor) -> Tensor:
        """Return S times the elements of the block, shape (..., n), of vectors over all parameters."""
        return self.scaled(products[..., self._offset : self._offset + self.size])


def block_products(blocks: Sequence[DiagonalBlock], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the product of each of a risk operator's blocks with its vector, shape (n,), in one pass over samples."""
    for block in blocks:
        block.matvecs += 1
    product = blocks[0].risk.product(_expand(blocks, vectors))
    return [block.restrict(product) for block in blocks]


def _expand(blocks: Sequence[DiagonalBlock], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    expanded: list[Tensor | None] = [None] * len(blocks[0].risk.matrix.parameters)
    for block, vector in zip(blocks, vectors, strict=True):
        expanded[block.block] = in_shape(block.scaled(vector), block.parameters)
    return expanded


def choose_difference_step(blocks: Sequence[DiagonalBlock]) -> None:
    """Choose the step of central differences, if they are in use, and set the error of products.

    Takes all blocks of a risk operator, in the coordinates in which the error counts.
    """
    risk = blocks[0].risk
    if risk.differences is None:
        return
    sizes = [block.size for block in blocks]

    def matvec(vector: Tensor) -> Tensor:
        return torch.cat(block_products(blocks, torch.split(vector, sizes)))

    vector = risk.space.gaussian(torch.Generator().manual_seed(0))
    start = vector.to(device=risk.device, dtype=risk.dtype)
    risk.product_error = risk.differences.choose_step(matvec, start, risk.cache.step)
    risk.cache.step = risk.differences.step


def explain_non_finite(block: DiagonalBlock, vector: Tensor | None) -> Exception:
    """Return the error for a NaN or infinite product with a vector, shape (n,): finite, or None if it was not kept."""
    risk = block.risk
    if vector is None:
        msg = "a Hessian-vector product is NaN or infinite; which batch it comes from was not kept."
        return risk.failure or ArithmeticError(msg)
    expanded = block.expand(vector)
    total = risk.product(expanded)  # before any rank returns: all ranks take part in it
    if risk.failure is not None:
        return risk.failure
    for batch, matvec in zip(risk.batches, risk.matvecs, strict=True):
        if not _is_finite(risk, matvec(expanded)):
            msg = (
                f"the Hessian-vector product of {batch.label} is NaN or infinite, though its loss is finite; look "
                "for operations with undefined second derivatives (a square root or norm at zero, for example)."
            )
            return ArithmeticError(msg)
    if _is_finite(risk, [total]):
        msg = f"the Hessian-vector products are too large for the arithmetic of {risk.dtype}: scale the loss down."
        return ArithmeticError(msg)
    return AnotherRankFailedError()


def _is_finite(risk: RiskOperator, vector: Vector) -> bool:
    infinite = any(v is not None and not v.isfinite().all() for v in vector)
    return not risk.sharding.collectives.any(infinite)
