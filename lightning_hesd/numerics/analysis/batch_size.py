"""The size of the batches of an analysis: small ones are merged where that leaves the mean loss the same function.

Every batch takes the time of its Python code and of starting its kernels, so a few large batches take less time than
many small ones. Whether a loss is a mean over samples, and does not depend on which samples are in a batch together
(batch statistics, pairs of samples, balanced experts), is tested: the loss of a merged batch is compared with the mean
loss of those that it was made from, in the finest precision of the device, and beside the weights, where no term is
zero by symmetry.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.inputs.merging import in_groups, merged
from lightning_hesd.numerics.inputs.tokens import ROUNDING
from lightning_hesd.numerics.krylov.vectors import VectorSpace
from lightning_hesd.numerics.operators.directional import beside_the_weights
from lightning_hesd.numerics.operators.strategies import AnalysisCache, measured_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.numerics.analysis.evaluation import Evaluator
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix

ENOUGH_ON_CPU = 2**28
"""Bytes of a batch, for its graph and a product, from which on a larger one takes no less time per sample on a CPU."""

SHARE_OF_ONE = 0.25
"""Share of the memory for graphs that one merged batch may take where they do not all fit."""

LEAST_GAIN = 2
"""Factor by which merging must reduce the number of batches: less saves no more time than the comparison takes."""

MOVE = 0.01
"""Distance from the weights at which losses are compared, relative to their size."""


def larger_batches(
    batches: Sequence[WeightedBatch],
    evaluator: Evaluator,
    matrix: CurvatureMatrix,
    *,
    memory: float,
    cache: AnalysisCache,
) -> Sequence[WeightedBatch]:
    """Return merged batches, or the given ones if these are large already, or cannot be merged.

    Args:
        batches: All batches of the analysis.
        evaluator: Evaluates their losses.
        matrix: The curvature matrix of a batch.
        memory: Bytes for graphs, temporary ones included.
        cache: What earlier analyses of the same loss have measured.
    """
    size = evaluator.options.batch_size
    if len(batches) == 1 or size is None:
        return batches
    try:
        groups = in_groups(batches, _most_samples(batches, matrix, memory, cache) if size == "auto" else size)
        if len(groups) == len(batches) or (size == "auto" and len(groups) > len(batches) / LEAST_GAIN):
            return batches
        larger = [merged(group) for group in groups]
        return larger if _have_equal_losses(groups, larger, evaluator, matrix) else batches
    except Exception:  # noqa: BLE001 - without merging, the analysis itself finds what is wrong, and says it
        return batches


def _most_samples(
    batches: Sequence[WeightedBatch], matrix: CurvatureMatrix, memory: float, cache: AnalysisCache
) -> float:
    """Return the largest number of samples in a merged batch that pays and fits into the memory."""
    measured = cache
    if measured.graph_bytes is None:
        measured = AnalysisCache()  # not for later analyses: per sample, the graph of a small batch holds more
        measured_graph(matrix, batches[0], measured, float)
    if measured.graph_bytes is None:
        return 1  # the memory cannot be measured here
    per_sample = measured.graph_bytes + measured.product_bytes
    if per_sample * math.fsum(batch.num_samples for batch in batches) > memory:
        memory *= SHARE_OF_ONE
    if matrix.parameters[0].device.type == "cpu":
        memory = min(memory, ENOUGH_ON_CPU)
    return max(memory / per_sample, 1)


def _have_equal_losses(
    groups: Sequence[Sequence[WeightedBatch]],
    larger: Sequence[WeightedBatch],
    evaluator: Evaluator,
    matrix: CurvatureMatrix,
) -> bool:
    """Return whether the loss of each merged batch is the mean loss of the batches in it, to rounding."""
    with evaluator.in_finest() as counterpart:
        parameters = [counterpart(p) for p in matrix.parameters]
        with beside_the_weights(parameters, VectorSpace(sum(p.numel() for p in parameters)), MOVE):
            return all(_is_mean(one, group, evaluator) for one, group in zip(larger, groups, strict=True))


def _is_mean(one: WeightedBatch, group: Sequence[WeightedBatch], evaluator: Evaluator) -> bool:
    if len(group) == 1:
        return True
    facts = GraphFacts()
    values = []
    for batch in [one, *group]:
        loss = evaluator.loss(batch)
        facts.add([loss])
        values.append(loss.item())
    whole, *losses = values
    mean = math.fsum(batch.weight * loss for batch, loss in zip(group, losses, strict=True)) / one.weight
    rounding = ROUNDING * max(facts.epsilon, torch.finfo(loss.dtype).eps) * max(map(abs, values))
    # A coarser type than float32 would hide too much.
    return facts.epsilon <= torch.finfo(torch.float32).eps and abs(whole - mean) <= rounding < math.inf
