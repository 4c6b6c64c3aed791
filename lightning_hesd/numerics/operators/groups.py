"""Products of groups of samples, and the batch behind a product that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.collectives import AnotherRankFailedError
from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError
from lightning_hesd.numerics.inputs.groups import check_groups
from lightning_hesd.numerics.krylov.vectors import add_in_shape
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.numerics.operators.strategies import graph
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.curvature import Vector
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator


def group_products(
    risk: RiskOperator, vectors: Sequence[Vector], parts: int
) -> Iterator[tuple[WeightedBatch, int, Tensor]]:
    """Yield the products of groups of samples: each batch of this rank is cut into at most `parts` groups.

    Args:
        risk: The risk operator; its `uncut_reason` says why a batch could not be cut.
        vectors: Vectors in the shapes of the parameters.
        parts: Groups per batch.

    Yields:
        The group, its position among those of its batch, and its products, shape (vectors, n).
    """
    for batch, loss, whole in zip(risk.batches, risk.losses, risk.matvecs, strict=True):
        groups = _groups(risk, batch, loss, parts)
        for position, group in enumerate(groups):
            matvec = whole
            if len(groups) > 1:
                _, matvec = graph(risk.matrix, group) if risk.is_exact else risk.make_matvec(group)
            result = torch.zeros(len(vectors), risk.size, dtype=risk.dtype, device=risk.device)
            for row, vector in zip(result, vectors, strict=True):
                add_in_shape(row, matvec(vector), [p.numel() for p in risk.matrix.parameters])
            yield group, position, result


def _groups(risk: RiskOperator, batch: WeightedBatch, loss: float, parts: int) -> Sequence[WeightedBatch]:
    """Return the groups of samples of a batch whose loss is known; the batch itself where it cannot be cut."""
    if parts == 1:
        return [batch]
    try:
        groups = batch.split(parts)
        if len(groups) > 1:
            check_groups(groups, [risk.matrix.loss(group) for group in groups], loss)
    except UnsplittableBatchError as error:
        risk.uncut_reason = str(error)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        risk.uncut_reason = f"a part of {batch.label} has no loss ({type(error).__name__}: {one_line(error)})"
    else:
        return groups
    return [batch]


def explain_non_finite(risk: RiskOperator, vector: Vector | None) -> Exception:
    """Return the error for a NaN or infinite product with a vector in the shapes of the parameters.

    Args:
        risk: The risk operator.
        vector: The vector, finite; None if it was not kept.
    """
    if vector is None:
        msg = "a Hessian-vector product is NaN or infinite; which batch it comes from was not kept."
        return risk.failure or ArithmeticError(msg)
    total = risk.product(vector)  # before any rank returns: all ranks take part in it
    if risk.failure is not None:
        return risk.failure
    for batch, matvec in zip(risk.batches, risk.matvecs, strict=True):
        if not _is_finite(risk, matvec(vector)):
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
    infinite = any(part is not None and not part.isfinite().all() for part in vector)
    return not risk.sharding.collectives.any(infinite)
