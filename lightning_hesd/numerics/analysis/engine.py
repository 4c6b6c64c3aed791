"""The engine of an analysis: parameters -> memory plan -> risk operator -> Lanczos runs -> spectra.

`opened_operators` (in `preparation`) does the first three, `run_lanczos` (in `estimation`) the fourth, and
`Estimation.spectrum` the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np
from typing_extensions import Unpack

from lightning_hesd.numerics.analysis.estimation import Estimation, run_lanczos
from lightning_hesd.numerics.analysis.preparation import opened_operators
from lightning_hesd.numerics.inputs.architecture import architecture_of
from lightning_hesd.numerics.inputs.blocks import Layers, blocks
from lightning_hesd.numerics.inputs.parameters import select_parameters
from lightning_hesd.numerics.isolation.modes import mode_name
from lightning_hesd.numerics.operators.self_checks import refute
from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.spectra.layer_spectra import LayerSpectra
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.collectives import Collectives
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
    from lightning_hesd.numerics.operators.strategies import AnalysisCache

Result = TypeVar("Result")

Report = Callable[[int, int], None]
"""Function of the number of Lanczos steps taken and of the largest possible number."""


class Circumstances(TypedDict, total=False):
    """Where products are computed, and what earlier analyses have measured.

    Attributes:
        collectives: Communication between the ranks that the batches are divided among.
        sharding: How the parameters are distributed over ranks; None: every rank holds all of them.
        local_ranks: Number of ranks that share this computer's memory.
        cache: What earlier analyses of the same loss have measured; brought up to date.
        reason: Why the options are not those of the user; None if they are.
        state: Objects beside the module that evaluations may change.
    """

    collectives: Collectives
    sharding: ParameterSharding | None
    local_ranks: int
    cache: AnalysisCache | None
    reason: str | None
    state: Sequence[object]


class Context(Circumstances, total=False):
    """The circumstances of an analysis, and a function to be called after every Lanczos step."""

    report: Report | None


def analyze(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    **context: Unpack[Context],
) -> Spectrum:
    """Return the spectrum of the curvature matrix over all analyzed parameters: `hessian_spectrum` on one rank or many.

    The module has equal parameters on every rank, or shards of the same parameters; `batches` are this rank's share.
    The options must be, and the spectrum is, equal on every rank.
    """
    selected = select_parameters(module, options)
    parameters = list(selected.values())
    positions = {parameter: position for position, parameter in enumerate(parameters)}
    layers = {
        name: ([positions[p] for p in own], sum(p.numel() for p in own))
        for name, own in blocks(module, None, selected).items()
    }

    architecture = architecture_of(module, parameters)

    def result(estimation: Estimation) -> Spectrum:
        return replace(estimation.spectrum_and_vectors(layers), architecture=architecture)

    try:
        [spectrum] = estimate(module, batches, loss_fn, options, [parameters], result=result, **context)
    except WrongDerivativeError as error:
        return _undefined_spectrum(error, parameters, batches, options)
    return spectrum


def analyze_layers(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    layers: Layers | None,
    **context: Unpack[Context],
) -> LayerSpectra:
    """Return the spectrum of the diagonal block of each layer; other arguments as for `analyze`."""
    parameters = blocks(module, layers, select_parameters(module, options))

    def result(estimation: Estimation) -> Spectrum:
        return replace(estimation.spectrum(), architecture="part")

    try:
        spectra = estimate(module, batches, loss_fn, options, list(parameters.values()), result=result, **context)
    except WrongDerivativeError as error:
        spectra = [_undefined_spectrum(error, block, batches, options) for block in parameters.values()]
    return LayerSpectra(zip(parameters, spectra, strict=True))


def estimate(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    parameters: Sequence[Sequence[nn.Parameter]],
    *,
    result: Callable[[Estimation], Result],
    report: Report | None = None,
    **circumstances: Unpack[Circumstances],
) -> list[Result]:
    """Run Lanczos on diagonal blocks of a curvature matrix, and return a result for each block.

    `parameters` has those of each diagonal block; one block for the whole matrix. `result` is a function of the
    finished Lanczos runs on a block; it may take further products. Other arguments as for `analyze`.

    Raises:
        WrongDerivativeError: If neither second derivatives nor differences of the gradient give the right products.
    """
    started = time.perf_counter()
    prepared = opened_operators(module, batches, loss_fn, options, parameters, **circumstances)
    with prepared as (operators, plan):
        estimations = run_lanczos(operators, options, plan, started, report)
        risk = operators[0].risk
        if risk.is_exact and (words := _asymmetry(estimations)) is not None:
            refute(risk, words)  # products are central differences from now on
            estimations = run_lanczos(operators, options, plan, started, report)
        return [result(estimation) for estimation in estimations]


def _asymmetry(estimations: Sequence[Estimation]) -> str | None:
    """Describe the asymmetry of the products if it is larger than rounding explains; None otherwise."""
    worst = max(estimations, key=lambda estimation: estimation.asymmetry)
    limit = math.sqrt(worst.epsilon)
    if worst.asymmetry <= limit:
        return None
    return (
        f"products by differentiating twice are not those of a symmetric matrix: {worst.asymmetry:.2g} of their size "
        f"is asymmetric, and rounding explains {limit:.1g} at most: a second derivative is wrong"
    )


def _undefined_spectrum(
    error: WrongDerivativeError,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[WeightedBatch],
    options: AnalysisOptions,
) -> Spectrum:
    """Return the record of an analysis without eigenvalues, because no product can be relied on."""
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
