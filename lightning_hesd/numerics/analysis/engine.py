"""From a module, batches and a loss to spectra: parameters, memory, matrix, operators and Lanczos processes in turn."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from typing_extensions import Unpack

from lightning_hesd.numerics.analysis.estimation import Estimation, run_together
from lightning_hesd.numerics.analysis.preparation import opened_operators
from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.inputs.blocks import Layers, blocks
from lightning_hesd.numerics.inputs.parameters import select_parameters
from lightning_hesd.numerics.isolation.modes import name_of_mode
from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock, choose_difference_step
from lightning_hesd.numerics.operators.self_checks import refute
from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
    from lightning_hesd.numerics.operators.memory import MemoryPlan
    from lightning_hesd.numerics.operators.strategies import AnalysisCache

Report = Callable[[int, int], None]
"""Takes the steps done and the most there can be."""


class Context(TypedDict, total=False):
    """Where an analysis runs, and what is known beforehand.

    Attributes:
        collectives: Communication between the ranks that the batches are divided among.
        sharding: How the parameters are distributed over ranks; None: every rank holds all of them.
        processes: How many of the processes share this computer's memory.
        report: Called after every Lanczos step with the steps done and the most there can be.
        cache: What earlier analyses of the same loss found out; brought up to date.
        reason: Why the options are not those of the user; None if they are.
        state: Objects beside the module that evaluations may change.
    """

    collectives: Collectives
    sharding: ParameterSharding | None
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
        mode=name_of_mode(options.mode),
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
    collectives: Collectives = LOCAL,
    sharding: ParameterSharding | None = None,
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
    prepared = opened_operators(
        module,
        batches,
        loss_fn,
        options,
        parts,
        collectives=collectives,
        sharding=sharding,
        processes=processes,
        cache=cache,
        reason=reason,
        state=state,
    )
    with prepared as (operators, plan):
        risk = operators[0].risk
        tick = None if report is None else _counting(report, options.probes * options.steps)
        estimations = _estimate(operators, options, plan, started, tick)
        if risk.is_exact and (words := _asymmetric(estimations)) is not None:
            refute(risk, words)
            estimations = _estimate(operators, options, plan, started, tick)
        yield estimations


def _estimate(
    operators: Sequence[DiagonalBlock],
    options: AnalysisOptions,
    plan: MemoryPlan,
    started: float,
    tick: Callable[[], None] | None,
) -> list[Estimation]:
    """Run Lanczos on all blocks."""
    choose_difference_step(operators)
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


def _counting(report: Report, total: int) -> Callable[[], None]:
    done = itertools.count(1)
    return lambda: report(next(done), total)
