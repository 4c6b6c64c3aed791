"""Products of groups of samples, and the batch behind a product that is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_hesd.numerics.collectives import AnotherRankFailedError
from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError
from lightning_hesd.numerics.krylov.vectors import add_in_shape
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.numerics.operators.strategies import graph
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.curvature import Vector
    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator

SHARE_OF_SCATTER = 0.1
"""Largest difference between the mean loss of the groups and the loss of their batch, in standard errors."""


def group_products(
    block: DiagonalBlock, vectors: Tensor, max_groups: int
) -> Iterator[tuple[WeightedBatch, int, Tensor]]:
    """Yield the products of groups of samples; the risk operator's `uncut_reason` says why a batch was not cut.

    Args:
        block: The diagonal block.
        vectors: The vectors, shape (count, n).
        max_groups: Largest number of groups into which each batch of this rank is cut.

    Yields:
        The group, its position among those of its batch, and its products with the vectors, shape (count, n).
    """
    risk = block.risk
    expanded = [block.expand(vector) for vector in vectors]
    for batch, loss, whole in zip(risk.batches, risk.losses, risk.matvecs, strict=True):
        groups = _groups(risk, batch, loss, max_groups)
        for position, group in enumerate(groups):
            matvec = whole
            if len(groups) > 1:
                _, matvec = graph(risk.matrix, group) if risk.is_exact else risk.make_matvec(group)
            products = torch.zeros(len(vectors), risk.size, dtype=risk.dtype, device=risk.device)
            for row, vector in zip(products, expanded, strict=True):
                add_in_shape(row, matvec(vector), [p.numel() for p in risk.matrix.parameters])
            yield group, position, block.restrict(products)
    block.matvecs += len(vectors)


def _groups(risk: RiskOperator, batch: WeightedBatch, loss: float, max_groups: int) -> Sequence[WeightedBatch]:
    """Return the groups of samples of a batch whose loss is known; the batch itself where it cannot be cut."""
    if max_groups == 1:
        return [batch]
    try:
        groups = batch.split(max_groups)
        if len(groups) > 1:
            _check_groups(groups, [risk.matrix.loss(group) for group in groups], loss)
    except UnsplittableBatchError as error:
        risk.uncut_reason = str(error)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        risk.uncut_reason = f"a group of {batch.label} has no loss ({type(error).__name__}: {one_line(error)})"
    else:
        return groups
    return [batch]


def _check_groups(groups: Sequence[WeightedBatch], losses: Sequence[Tensor], whole: float) -> None:
    """Check that the mean loss of two or more groups of samples is the loss of their whole batch.

    Raises:
        UnsplittableBatchError: If it is not, or all groups have the same loss.
    """
    values = np.array([loss.item() for loss in losses])
    weights = np.array([group.weight for group in groups])
    rounding = 64 * torch.finfo(losses[0].dtype).eps * float(np.abs(values).max())
    scatter = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if abs(np.average(values, weights=weights) - whole) > SHARE_OF_SCATTER * scatter + rounding:
        msg = (
            f"the losses of groups of samples have the mean {np.average(values, weights=weights):.6g}, that of the "
            f"whole {groups[0].label} is {whole:.6g}: the loss is not a mean over samples (it may use statistics of "
            "the batch)"
        )
        raise UnsplittableBatchError(msg)
    if (values == values[0]).all():
        msg = (
            f"the loss of {groups[0].label} is the same for all of its groups of samples: it does not depend on the "
            "values that were cut"
        )
        raise UnsplittableBatchError(msg)


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
