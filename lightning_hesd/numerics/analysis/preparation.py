"""From a module, batches and a loss to curvature operators: parameters, memory, state, weights, HVP strategies."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_hesd.numerics.analysis.batch_size import larger_batches
from lightning_hesd.numerics.analysis.evaluation import Evaluator
from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.derivatives.graphs import graph_nodes
from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.numerics.inputs.parameters import inverse_root, vector_dtype
from lightning_hesd.numerics.inputs.sample_counts import tensors_of
from lightning_hesd.numerics.inputs.token_weights import Weighing
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.numerics.isolation.modes import mode_name
from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
from lightning_hesd.numerics.operators.memory import MemoryPlan, plan_memory
from lightning_hesd.numerics.operators.output_jacobians import use_output_jacobians
from lightning_hesd.numerics.operators.risk_operator import RiskOperator
from lightning_hesd.numerics.operators.self_checks import check_derivatives
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.krylov.lanczos import Basis

INDEPENDENT = {"eval", "deterministic"}
"""Modes in which no layer of PyTorch makes the output for a sample depend on the others in its batch."""

SCALING_VECTORS = 3
"""Additional vectors with a preconditioner: its diagonal, and a vector before and after a product."""


@contextlib.contextmanager
def opened_operators(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    blocks: Sequence[Sequence[nn.Parameter]],
    *,
    collectives: Collectives = LOCAL,
    sharding: ParameterSharding | None = None,
    local_ranks: int = 1,
    cache: AnalysisCache | None = None,
    reason: str | None = None,
    state: Sequence[object] = (),
) -> Iterator[tuple[list[DiagonalBlock], MemoryPlan]]:
    """Bring the module into the analysis state, and make the curvature operators of diagonal blocks there.

    Arguments as for `engine.estimate`; `blocks` has the parameters of each diagonal block.

    Yields:
        The operator of each block, verified, and the memory plan.

    Raises:
        ValueError: If an option does not fit the parameters.
    """
    sharding = sharding or ParameterSharding()
    sharding.check(options)
    cache = cache or AnalysisCache()
    _check_batches(module, batches)
    analyzed = [p for block in blocks for p in block]
    parameters = sharding.local_shards(analyzed)
    ends = list(itertools.accumulate(len(block) for block in blocks))
    ranges = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
    dtype, device = options.dtype or vector_dtype(parameters), parameters[0].device
    if dtype is torch.float64 and finest_dtype(device) is not torch.float64:
        msg = f"`dtype=torch.float64` is not available on the device of the parameters, {device}: leave it None."
        raise ValueError(msg)
    plan = _plan(
        module, parameters, dtype, options=options, sharding=sharding, collectives=collectives, local_ranks=local_ranks
    )

    with exact_mode(module, options.mode, analyzed, state) as isolation, sharding.full_parameters(module):
        joint = sharding.joint_batches(batches)
        is_alone = not collectives.is_distributed and not sharding.is_sharded
        evaluator = Evaluator(module, loss_fn, options, sharding, isolation, batches=joint if is_alone else None)
        if not sharding.is_sharded:
            joint = _weighed(Weighing(options.batch_weight, joint, evaluator.loss, collectives), cache)
        matrix, given = evaluator.matrix(parameters, ranges), len(joint)
        if is_alone and mode_name(options.mode) in INDEPENDENT:
            joint = larger_batches(joint, evaluator, matrix, memory=plan.graphs, cache=cache)
        risk = RiskOperator(
            matrix,
            joint,
            strategy=options.strategy,
            dtype=dtype,
            collectives=collectives,
            graph_memory=plan.graphs,
            cache=cache,
            sharding=sharding,
        )
        if len(joint) < given:
            risk.strategy_reason += f"; {given} batches are merged into {len(joint)}"
        if reason is not None:
            risk.strategy_reason = reason if options.strategy != "auto" else f"{risk.strategy_reason}; {reason}"
        check_derivatives(risk, evaluator.in_finest if not sharding.is_sharded else None, isolation.hooks)
        use_output_jacobians(risk)
        operators = [
            DiagonalBlock(risk, chosen, inverse_root(module, block, options.preconditioner, dtype))
            for chosen, block in zip(ranges, blocks, strict=True)
        ]
        yield operators, plan


def _check_batches(module: nn.Module, batches: Sequence[WeightedBatch]) -> None:
    """Refuse batches that were computed from the parameters, such as the features of a frozen part that is not frozen.

    A change of the weights would not reach them.

    Raises:
        ValueError: If there is one.
    """
    parameters = set(module.parameters())
    for batch in batches:
        graphs = [t for t in tensors_of(batch.data) if isinstance(t, Tensor) and t.grad_fn is not None]
        if any(getattr(node, "variable", None) in parameters for node in graph_nodes(graphs)):
            msg = (
                f"{batch.label} holds a tensor that was computed from parameters of the module: compute it in the loss "
                "function, or `detach` it."
            )
            raise ValueError(msg)


def _weighed(weighing: Weighing, cache: AnalysisCache) -> list[WeightedBatch]:
    """Return the batches with their weights, by the same rule as in earlier analyses of the loss."""
    count = cache.count if cache.is_weighed else weighing.decide()
    cache.count, cache.is_weighed = count, cache.is_weighed or weighing.is_settled
    return weighing.apply(count)


def _plan(
    module: nn.Module,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    options: AnalysisOptions,
    sharding: ParameterSharding,
    collectives: Collectives,
    local_ranks: int,
) -> MemoryPlan:
    """Plan the memory; all ranks keep the Krylov basis at the leanest place that one of them needs."""
    own_elements = sum(p.numel() for p in parameters)
    steps = options.probes * min(options.steps, sharding.space(parameters).dimension)  # the bases of all probes stay
    device = parameters[0].device

    def plan(basis: Literal["auto"] | Basis) -> MemoryPlan:
        return plan_memory(
            [*module.parameters(), *module.buffers()],
            own_elements * dtype.itemsize,
            steps,
            basis=basis,
            device=device,
            budget=options.memory_budget,
            local_ranks=local_ranks,
            more_vectors=0 if options.preconditioner is None else SCALING_VECTORS,
        )

    own = plan(options.basis)
    choices: list[Basis] = ["device", "cpu", "none"]
    leanest = choices[round(sharding.collectives.max(collectives.max(choices.index(own.basis))))]
    agreed = own if leanest == own.basis else plan(leanest)
    # Ranks that evaluate every batch together must keep the graphs of the same batches.
    return replace(agreed, graphs=-int(sharding.collectives.max(-agreed.graphs)))
