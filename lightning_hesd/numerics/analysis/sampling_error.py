"""Sampling error of C_t: standard errors and biases of the extreme eigenvalues, from groups of samples.

H is the mean of the Hessians H_g of groups of samples, and λ = uᵀHu at an extreme eigenvector u. To first order another
sample changes λ as it changes uᵀHu: the spread of uᵀH_g u over groups gives the standard error. To second order the
extremes lie outside those of the whole population, because an eigenvector adapts to its sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_hesd.numerics.analysis.group_statistics import (
    Extreme,
    covariance_of_mean,
    outward_bias,
    resampled_extreme,
)
from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError
from lightning_hesd.numerics.krylov.ritz import tridiagonal_eigh
from lightning_hesd.numerics.krylov.vectors import add_in_shape, inner_product, normalized
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.numerics.operators.strategies import graph
from lightning_hesd.spectra.validation import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.krylov.lanczos import Lanczos
    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator

    Array = NDArray[np.float64]

GROUPS = 16
"""As many groups as there can be, or more: a standard error from 16 is itself good to about a fifth."""
MIN_GROUPS = 8

ROUNDING = 64.0
"""Units of rounding by which curvatures of groups may differ if the groups are the same."""

SHARE_OF_SCATTER = 0.1
"""Largest difference between the mean loss of the groups and the loss of their batch, in standard errors."""


@dataclass(frozen=True)
class SamplingError:
    """Errors of the extremes and of C_t due to the finite sample: fields of `Spectrum`, which explains them."""

    c_t_sampling_error: float
    c_t_sampling_bias: float
    lambda_min_sampling_error: float
    lambda_max_sampling_error: float
    lambda_min_sampling_bias: float
    lambda_max_sampling_bias: float
    sampling_groups: int
    group_curvatures: Array
    resampled_extremes: Array


@dataclass(frozen=True)
class _End:
    """One end of the spectrum: an extreme Ritz vector among those of its Lanczos run."""

    run: Lanczos
    nodes: Array
    vectors: Array
    position: int


def sampling_error(operator: DiagonalBlock, runs: Sequence[Lanczos]) -> SamplingError:
    """Estimate the errors of the extreme eigenvalues due to the finite sample, in one pass over the samples.

    Of all Ritz vectors of the Lanczos runs the lowest and the highest are taken.

    Raises:
        UnsplittableBatchError: If there are fewer than 8 groups, their mean is not the Hessian, or they do not differ.
        AnotherRankFailedError: If it failed on another rank.
    """
    ends = _ends(runs)
    unit = [normalized(e.run.ritz_vectors(e.vectors[:, [e.position]]))[0] for e in ends]
    weights, squares, coordinates = _group_curvatures(operator, ends, torch.stack(unit))
    groups = len(weights)
    if groups < MIN_GROUPS:
        msg = f"at least {MIN_GROUPS} groups of samples are needed, and the batches can be cut into {groups} only: "
        if operator.risk.uncut_reason is not None:
            msg += (
                f"{operator.risk.uncut_reason}. Pass at least {MIN_GROUPS} batches, so that none needs to be cut "
                "(smaller ones, or more samples), or leave the sampling error out."
            )
        else:
            msg += "analyze more samples, or more batches."
        raise UnsplittableBatchError(msg)

    own = np.stack([along[:, end.position] for along, end in zip(coordinates, ends, strict=True)], axis=1)
    covariance = covariance_of_mean(own, weights)
    extremes = np.array([end.nodes[end.position] for end in ends])
    errors = np.sqrt(np.diag(covariance))
    rounding = ROUNDING * torch.finfo(operator.risk.dtype).eps * float(np.abs(extremes).max())
    if (np.abs(weights @ own - extremes) > errors + 0.01 * np.abs(extremes) + rounding).any():
        msg = (
            f"the curvatures of groups of samples have means {weights @ own}, those of whole batches are {extremes}: "
            "the loss is not a mean over samples (it may use statistics of the batch), so that batches cannot be cut "
            f"into groups. Pass at least {GROUPS} batches, or leave the sampling error out."
        )
        raise UnsplittableBatchError(msg)
    if groups > _num_batches(operator.risk) and (errors <= rounding).all():
        msg = (
            "the curvature is the same in all groups of samples, to rounding: the loss may not depend on what was cut. "
            f"Pass at least {GROUPS} batches, so that none needs to be cut, or leave the sampling error out."
        )
        raise UnsplittableBatchError(msg)
    lambda_min, lambda_max = (float(value) for value in extremes)
    mean = float(np.mean([run.alphas[0] for run in runs]))
    of_ends = [
        Extreme(end.nodes, end.position, along, of_end)
        for end, along, of_end in zip(ends, coordinates, squares.T, strict=True)
    ]
    shifts = [outward_bias(weights, extreme, mean) for extreme in of_ends]
    biases = np.array([-shifts[0], shifts[1]])
    # C_t = λ_min/λ_max to first order (the delta method), its mean to second.
    derivative = np.array([1 / lambda_max, -lambda_min / lambda_max**2])
    curvature = (covariance[1, 1] * lambda_min / lambda_max - covariance[0, 1]) / lambda_max**2
    return SamplingError(
        c_t_sampling_error=math.sqrt(max(float(derivative @ covariance @ derivative), 0.0)),
        c_t_sampling_bias=float(derivative @ biases + curvature),
        lambda_min_sampling_error=float(errors[0]),
        lambda_max_sampling_error=float(errors[1]),
        lambda_min_sampling_bias=float(biases[0]),
        lambda_max_sampling_bias=float(biases[1]),
        sampling_groups=groups,
        group_curvatures=np.vstack([weights, own.T]),
        resampled_extremes=np.array([resampled_extreme(weights, extreme) for extreme in of_ends]),
    )


def _ends(runs: Sequence[Lanczos]) -> tuple[_End, _End]:
    pairs = [(run, *tridiagonal_eigh(run.alphas, run.betas)) for run in runs]
    lowest = min(pairs, key=lambda pair: float(pair[1][0]))
    highest = max(pairs, key=lambda pair: float(pair[1][-1]))
    return _End(*lowest, position=0), _End(*highest, position=len(highest[1]) - 1)


def _group_curvatures(operator: DiagonalBlock, ends: Sequence[_End], unit: Tensor) -> tuple[Array, Array, list[Array]]:
    """Apply the groups' Hessians H_g to the Ritz vectors u of the ends.

    Returns:
        weights: Share of each group in the mean, shape (groups,), sum 1.
        squares: ‖H_g u‖², shape (groups, 2).
        coordinates: For each end y_kᵀH_g u with the Ritz vectors y_k of its run, shape (groups, steps); without a
            Krylov basis uᵀH_g u only, and 0 for other Ritz vectors.
    """
    risk = operator.risk
    num_batches = _num_batches(risk)
    max_groups = max(1, math.ceil(GROUPS / num_batches))
    lengths = [len(end.nodes) for end in ends]
    # One row for each group of all ranks; every rank fills in its own.
    rows = (num_batches + risk.num_skipped) * max_groups
    table = torch.zeros(rows, 3 + sum(lengths), dtype=torch.float64, device="cpu")

    def fill() -> None:
        for group, position, products in _group_products(operator, unit, max_groups):
            row = table[group.index * max_groups + position]
            row[0] = group.weight / risk.weight
            row[1:3] = torch.linalg.vector_norm(products, dim=1, dtype=finest_dtype(products.device)).square()
            for end, product, u, target in zip(ends, products, unit, torch.split(row[3:], lengths), strict=True):
                along = end.run.project(product)
                if along is None:
                    target[end.position] = inner_product(u, product)
                else:
                    target.copy_(torch.from_numpy(end.vectors).T @ along.cpu().double())

    risk.collectives.run_together(fill)
    table = risk.collectives.sum(table)
    table = table[table[:, 0] > 0]
    first, second = (columns.numpy() for columns in torch.split(table[:, 3:], lengths, dim=1))
    return table[:, 0].numpy(), table[:, 1:3].numpy(), [first, second]


def _group_products(
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
    matvecs = dict(zip(map(id, risk.batches), risk.matvecs, strict=True))
    for batch, loss in _unmerged(risk):
        for position, group in enumerate(_groups(risk, batch, loss, max_groups)):
            matvec = matvecs.get(id(group))
            if matvec is None:
                _, matvec = graph(risk.matrix, group) if risk.is_exact else risk.make_matvec(group)
            products = torch.zeros(len(vectors), risk.size, dtype=risk.dtype, device=risk.device)
            for row, vector in zip(products, expanded, strict=True):
                add_in_shape(row, matvec(vector), [p.numel() for p in risk.matrix.parameters])
            yield group, position, block.restrict(products)
    block.matvecs += len(vectors)


def _num_batches(risk: RiskOperator) -> int:
    """Return the number of batches of all ranks, as they were before merging."""
    return risk.num_batches + sum(len(batch.merged_from) - 1 for batch in risk.batches if batch.merged_from)


def _unmerged(risk: RiskOperator) -> Iterator[tuple[WeightedBatch, float]]:
    """Yield the batches of this rank, as they were before merging, with their losses."""
    for batch, loss in zip(risk.batches, risk.losses, strict=True):
        if batch.merged_from:
            yield from ((part, risk.matrix.loss(part).item()) for part in batch.merged_from)
        else:
            yield batch, loss


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
        UnsplittableBatchError: If it is not, a group has no finite loss, or all groups have the same loss.
    """
    values = np.array([loss.item() for loss in losses])
    if not np.isfinite(values).all():
        msg = f"a group of {groups[0].label} has no finite loss"
        raise UnsplittableBatchError(msg)
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
