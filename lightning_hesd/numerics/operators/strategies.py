"""HVP strategies: functions from a curvature matrix and a batch to the loss and the product v -> Hv.

A product from a kept graph costs about two gradients. A recomputed product takes one more, which builds the graph, and
memory for one graph at a time. So there is nothing to time: "auto" keeps the graphs of as many batches as fit into the
memory, and recomputes the products of the others. Central differences of the gradient are in `finite_differences`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lightning_hesd.numerics.operators.curvature import gradient
from lightning_hesd.numerics.operators.memory import MemoryMeter, is_out_of_memory
from lightning_hesd.spectra.validation import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.tokens import TokenCount
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix, Matvec, Vector
    from lightning_hesd.numerics.operators.verification import Verification

Strategy = Literal["graph", "recompute", "finite_difference"]


@dataclass
class AnalysisCache:
    """What earlier analyses of the same loss have measured; it holds as long as the analyzed parameters stay the same.

    Attributes:
        graph_bytes: Memory of the gradient's graph, in bytes per sample; None: not measured.
        product_bytes: Memory of a product beside the graphs, in bytes per sample.
        inexact_reason: Why there are no exact products; None if there are.
        step: Step of central differences; None: not chosen.
        verification: Comparison of the loss with its derivatives; None: not compared.
        needs_hooks: Whether the gradient is that of the loss only if hooks act.
        kinds: Names of the operations in the graphs that were compared.
        dimension: Number of parameters of those analyses; None: there were none.
        is_weighed: Whether the weights of batches are decided.
        count: Token count by which batches are weighed; None: they are not weighed by tokens.
        eigenvectors: Leading eigenvectors of the last analysis, shape (count, n), on the CPU; None: not tracked.
    """

    graph_bytes: float | None = None
    product_bytes: float = 0.0
    inexact_reason: str | None = None
    step: float | None = None
    verification: Verification | None = None
    needs_hooks: bool = False
    kinds: frozenset[str] = frozenset()
    dimension: int | None = None
    is_weighed: bool = False
    count: TokenCount | None = None
    eigenvectors: Tensor | None = None

    def invalidate(self, dimension: int) -> None:
        """Forget the measurements if they belong to another number of parameters."""
        if self.dimension != dimension:
            self.graph_bytes = self.inexact_reason = self.step = self.verification = self.eigenvectors = None
            self.needs_hooks = False
            self.dimension = dimension


class NoExactProductError(RuntimeError):
    """There is a gradient, but no exact product; the message says why."""


def graph(matrix: CurvatureMatrix, batch: WeightedBatch) -> tuple[Tensor, Matvec]:
    """Return the loss of a batch and a product that keeps the gradient's graph."""
    return matrix.make_matvec(batch, retain=True)


def recompute(matrix: CurvatureMatrix, batch: WeightedBatch) -> tuple[Tensor, Matvec]:
    """Return the loss of a batch and a product that builds the gradient's graph anew."""

    def matvec(vector: Vector) -> Vector:
        _, once = matrix.make_matvec(batch, retain=False)
        return once(vector)

    loss, _ = matrix.make_matvec(batch, retain=False)  # raises now if there is none
    return loss, matvec


STRATEGIES: dict[str, Callable[[CurvatureMatrix, WeightedBatch], tuple[Tensor, Matvec]]] = {
    "graph": graph,
    "recompute": recompute,
}
"""The exact HVP strategies by the name of the option `strategy`."""


def measured_graph(
    matrix: CurvatureMatrix, batch: WeightedBatch, cache: AnalysisCache, largest: Callable[[float], float]
) -> tuple[Tensor, Matvec]:
    """Apply the strategy "graph", multiply once, and enter the memory into the cache; some losses fail only there.

    The cache's `graph_bytes` stay None where they cannot be measured. `largest` returns the largest of the values of
    the ranks that evaluate the batch together, so that they keep the same graphs.

    Raises:
        NoExactProductError: If there is no product, though there is a gradient.
        RuntimeError: If memory runs out.
        Warning: If the gradient raises one, too, where warnings are errors.
    """
    try:
        made, held, peak = _metered(matrix, batch)
    except (RuntimeError, Warning) as error:  # a kernel without a formula warns, which may be an error
        if is_out_of_memory(error):
            raise
        gradient(matrix.loss(batch), matrix.parameters)  # if this fails, too, the loss is at fault
        msg = f"the loss cannot be differentiated twice ({first_line(str(error))})"
        raise NoExactProductError(msg) from error
    if held is not None:
        cache.graph_bytes = largest(held / batch.num_samples)
        cache.product_bytes = largest(max(peak - held, held) / batch.num_samples)
    return made


def _metered(matrix: CurvatureMatrix, batch: WeightedBatch) -> tuple[tuple[Tensor, Matvec], int | None, int]:
    """Apply the strategy "graph", multiply once, and measure the memory.

    Returns:
        The loss and the product; the bytes of the graph, None if they could not be measured; most bytes in use.

    Raises:
        RuntimeError: If there is no product, or memory runs out.
    """
    device = matrix.parameters[0].device
    ones = [torch.ones_like(p) for p in matrix.parameters]
    try:
        with MemoryMeter(device) as building:
            made = graph(matrix, batch)
        with MemoryMeter(device) as multiplying:
            made[1](ones)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        made = graph(matrix, batch)  # once more, in case that the loss uses the profiler itself
        made[1](ones)
        return made, None, 0
    held = building.live if multiplying.live is not None else None
    return made, held, max(building.peak, (held or 0) + multiplying.peak)


def plan_graphs(
    num_samples: Sequence[float], cache: AnalysisCache, memory: float
) -> tuple[Sequence[bool], float | None, str]:
    """Decide which graphs are kept, given the samples of each batch and the bytes for graphs, temporary ones included.

    Returns:
        For each batch, whether its graph is kept; the bytes of the kept graphs and of a product, None if they are not
        measured; the reason in words.

    Raises:
        NoExactProductError: If there is not even memory for the graph of one batch.
    """
    if cache.graph_bytes is None:
        return [False] * len(num_samples), None, "auto: the memory of graphs cannot be measured here"
    per_sample, largest = cache.graph_bytes, max(num_samples)
    # A product takes some memory beside the kept graphs, and a recomputed one a graph of its own.
    needed = cache.product_bytes * largest
    if per_sample * sum(num_samples) + needed > memory:
        needed += per_sample * largest
    room = f"there is room for {memory / 2**20:.1f} MiB"
    if needed > memory:
        msg = f"the gradient graph of one batch and a product take {needed / 2**20:.1f} MiB, and {room}"
        raise NoExactProductError(msg)
    keeps: list[bool] = []
    held = 0.0
    for count in num_samples:
        keeps.append(held + per_sample * count + needed <= memory)
        held += per_sample * count if keeps[-1] else 0.0
    reason = f"auto: the gradient graphs of {sum(keeps)} of {len(keeps)} batches hold {held / 2**20:.1f} MiB"
    if not all(keeps):
        reason += f"; {room}, the rest is recomputed"
    return keeps, held + needed, reason
