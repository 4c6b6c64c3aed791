"""From a module, batches and a loss to spectra: parameters, memory, matrix, operators and Lanczos processes in turn."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from typing_extensions import Unpack

from lightning_hesd.numerics.analysis.estimation import Estimation, run_together
from lightning_hesd.numerics.analysis.evaluation import Evaluator
from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.inputs.blocks import Layers, blocks
from lightning_hesd.numerics.inputs.parameter_sharding import Layout
from lightning_hesd.numerics.inputs.parameters import inverse_root, select_parameters, vector_dtype
from lightning_hesd.numerics.inputs.token_weights import Weighing
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.numerics.isolation.modes import mode_name
from lightning_hesd.numerics.operators.memory import MemoryPlan, plan_memory
from lightning_hesd.numerics.operators.operator import CurvatureOperator, prepare_differences
from lightning_hesd.numerics.operators.risk_operator import SampleMean
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.inputs.parameter_sharding import AllReduce
    from lightning_hesd.numerics.krylov.lanczos import Storage

Report = Callable[[int, int], None]
"""Takes the steps done and the most there can be."""

SCALING_VECTORS = 3
"""What a preconditioner adds to the vectors: the scale, and what is scaled before and after a product."""


class Context(TypedDict, total=False):
    """Where an analysis runs, and what is known beforehand.

    Attributes:
        all_reduce: Sums a tensor over the processes; None for a single process.
        layout: How the parameters lie in the processes; None: each holds all of them.
        processes: How many of the processes share this computer's memory.
        report: Called after every Lanczos step with the steps done and the most there can be.
        cache: What earlier analyses of the same loss found out; brought up to date.
        reason: Why the options are not those of the user; None if they are.
        state: Objects beside the module that evaluations may change.
    """

    all_reduce: AllReduce | None
    layout: Layout | None
    processes: int
    report: Report | None
    cache: AnalysisCache | None
    reason: str | None
    state: Sequence[object]


def analyze(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    **context: Unpack[Context],
) -> Spectrum:
    """Do the work of `hessian_spectrum`, possibly as one of several processes.

    Args:
        module: The module, with equal parameters in every process, or parts of the same ones.
        batches: This process's share of the batches.
        loss_fn: As for `hessian_spectrum`.
        options: As for `hessian_spectrum`, equal in every process.
        **context: Where it runs.

    Returns:
        The spectrum, equal in every process.
    """
    everything = list(select_parameters(module, options).values())
    try:
        with estimated(module, batches, loss_fn, options, [everything], **context) as [estimation]:
            return estimation.spectrum()
    except WrongDerivativeError as error:
        return _refused(error, everything, batches, options)


def analyze_layers(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    layers: Layers | None,
    **context: Unpack[Context],
) -> dict[str, Spectrum]:
    """Do the work of `layer_spectra`, possibly as one of several processes; arguments as for `analyze`."""
    found = blocks(module, layers, select_parameters(module, options))
    try:
        with estimated(module, batches, loss_fn, options, list(found.values()), **context) as estimations:
            return {name: estimation.spectrum() for name, estimation in zip(found, estimations, strict=True)}
    except WrongDerivativeError as error:
        return {name: _refused(error, block, batches, options) for name, block in found.items()}


def _refused(
    error: WrongDerivativeError,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[WeightedBatch],
    options: AnalysisOptions,
) -> Spectrum:
    """Return the record of an analysis that found no products to rely on."""
    return Spectrum(
        nodes=np.full((1, 1), math.nan),
        weights=np.zeros((1, 1)),
        residuals=np.zeros((1, 1)),
        steps_per_probe=(0,),
        dimension=sum(p.numel() for p in parameters),
        num_samples=round(sum(batch.num_samples for batch in batches)),
        loss=error.loss,
        rounding=0.0,
        matvecs=0,
        seconds=0.0,
        matrix=options.matrix,
        probe=options.probe,
        seed=options.seed,
        mode=mode_name(options.mode),
        confidence=options.confidence,
        tolerance=options.tolerance,
        reason=str(error),
        verified="no",
        verification=str(error),
    )


@contextlib.contextmanager
def estimated(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    parts: Sequence[Sequence[nn.Parameter]],
    *,
    all_reduce: AllReduce | None = None,
    layout: Layout | None = None,
    processes: int = 1,
    report: Report | None = None,
    cache: AnalysisCache | None = None,
    reason: str | None = None,
    state: Sequence[object] = (),
) -> Iterator[list[Estimation]]:
    """Run the Lanczos processes of the diagonal blocks that belong to these parts of the parameters.

    Yields:
        The processes of each block, in the state in which products are possible.
    """
    started = time.perf_counter()
    layout = layout or Layout()
    layout.check(
        groups=options.wants_sampling_error,
        scaled=options.preconditioner is not None,
        weighed=options.batch_weight == "tokens",
    )
    analysed = [p for part in parts for p in part]
    parameters = layout.parts(analysed)
    ends = list(itertools.accumulate(len(part) for part in parts))
    ranges = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
    dtype = options.dtype or vector_dtype(parameters)
    device = parameters[0].device
    _check_dtype(dtype, device)
    plan = _plan(module, parameters, dtype, options=options, layout=layout, all_reduce=all_reduce, processes=processes)

    with exact_mode(module, options.mode, analysed, state) as isolation, layout.opened(module):
        joint = layout.joint(batches)
        is_alone = all_reduce is None and layout.all_reduce is None
        evaluator = Evaluator(module, loss_fn, options, layout, isolation, batches=joint if is_alone else None)
        if layout.all_reduce is None:
            cache = cache or AnalysisCache()
            joint = _weighed(Weighing(options.batch_weight, joint, evaluator.loss, all_reduce, device), cache)
        mean = SampleMean(
            evaluator.matrix(parameters, ranges),
            joint,
            strategy=options.strategy,
            dtype=dtype,
            all_reduce=all_reduce,
            graph_memory=plan.graphs,
            cache=cache,
            layout=layout,
        )
        if reason is not None:
            mean.maker.reason = reason if options.strategy != "auto" else f"{mean.maker.reason}; {reason}"
        mean.verify(evaluator.in_finest if layout.all_reduce is None else None)
        operators = [
            CurvatureOperator(mean, block, inverse_root(module, part, options.preconditioner, dtype))
            for block, part in zip(ranges, parts, strict=True)
        ]
        tick = None if report is None else _counting(report, options.probes * options.steps)
        estimations = _estimate(operators, options, plan, started, tick)
        if mean.is_exact and (words := _asymmetric(estimations)) is not None:
            mean.refute(words)
            estimations = _estimate(operators, options, plan, started, tick)
        yield estimations


def _weighed(weighing: Weighing, cache: AnalysisCache) -> list[WeightedBatch]:
    """Weigh the batches, as in earlier analyses if there were any."""
    count = cache.count if cache.is_weighed else weighing.decide()
    cache.count, cache.is_weighed = count, cache.is_weighed or weighing.is_settled
    return weighing.apply(count)


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse vectors in a type that the device does not have.

    Raises:
        ValueError: If these are such.
    """
    if dtype is torch.float64 and finest_dtype(device) is not torch.float64:
        msg = f"`dtype=torch.float64` is not available on the device of the parameters, {device}: leave it None."
        raise ValueError(msg)


def _estimate(
    operators: Sequence[CurvatureOperator],
    options: AnalysisOptions,
    plan: MemoryPlan,
    started: float,
    tick: Callable[[], None] | None,
) -> list[Estimation]:
    """Run the Lanczos processes of all blocks."""
    prepare_differences(operators)
    estimations = [Estimation(operator, options, plan, started) for operator in operators]
    run_together(estimations, tick)
    return estimations


def _asymmetric(estimations: Sequence[Estimation]) -> str | None:
    """Say how asymmetric the products are, if more so than rounding can make them."""
    worst = max(estimations, key=lambda estimation: estimation.asymmetry)
    limit = math.sqrt(worst.epsilon)
    if worst.asymmetry <= limit:
        return None
    return (
        f"products by differentiating twice are not those of a symmetric matrix: {worst.asymmetry:.2g} of their size "
        f"is asymmetric, and rounding explains {limit:.1g} at most: a second derivative is wrong"
    )


def _plan(
    module: nn.Module,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    options: AnalysisOptions,
    layout: Layout,
    all_reduce: AllReduce | None,
    processes: int,
) -> MemoryPlan:
    """Plan the memory, with the same storage in every process: the leanest that one of them needs."""
    own_elements = sum(p.numel() for p in parameters)
    steps = min(options.steps, layout.space(parameters).dimension)
    device = parameters[0].device

    def plan(basis: Literal["auto"] | Storage) -> MemoryPlan:
        return plan_memory(
            [*module.parameters(), *module.buffers()],
            own_elements * dtype.itemsize,
            steps,
            basis=basis,
            device=device,
            budget=options.memory_budget,
            processes=processes,
            more_vectors=0 if options.preconditioner is None else SCALING_VECTORS,
        )

    own = plan(options.basis)
    add = all_reduce or layout.all_reduce
    if add is None:
        return own
    storages: list[Storage] = ["device", "cpu", "none"]
    votes = add(torch.tensor([float(own.storage == s) for s in storages], device=device)).tolist()
    agreed = plan([storage for storage, vote in zip(storages, votes, strict=True) if vote][-1])
    # Processes that work together must keep the graphs of the same batches.
    return replace(agreed, graphs=-int(layout.largest(-agreed.graphs)))


def _counting(report: Report, total: int) -> Callable[[], None]:
    done = itertools.count(1)
    return lambda: report(next(done), total)
