"""`hessian_spectrum` and `layer_spectra`, the functions that users call."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch  # noqa: TC002 - the examples in docstrings need them
from torch import Tensor, nn  # noqa: TC002 - the examples in docstrings need them

from lightning_hesd.numerics.analysis.engine import analyze, analyze_layers
from lightning_hesd.numerics.analysis.retry import retry_on_oom
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import AnalysisOptions, analysis_options
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.numerics.inputs.options import MatrixName, Probe, StrategyName
    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.spectra.layer_spectra import LayerSpectra
    from lightning_hesd.spectra.spectrum import Spectrum


def hessian_spectrum(  # noqa: D417 - `AnalysisOptions` describes the options
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    batch_weight: Literal["tokens"] | Callable[[Any], float] | None = AnalysisOptions.batch_weight,
    batch_size: int | Literal["auto"] | None = AnalysisOptions.batch_size,
    steps: int = AnalysisOptions.steps,
    probes: int = AnalysisOptions.probes,
    seed: int = AnalysisOptions.seed,
    tolerance: float | Literal["type", "auto"] | None = AnalysisOptions.tolerance,
    stop: Literal["c_t", "density"] = AnalysisOptions.stop,
    confidence: float = AnalysisOptions.confidence,
    matrix: MatrixName = AnalysisOptions.matrix,
    output_fn: Callable[[Any, Any], Any] | None = AnalysisOptions.output_fn,
    output_loss: Callable[[Any, Any], Any] | None = AnalysisOptions.output_loss,
    parameters: Callable[[str, nn.Parameter], bool] | None = AnalysisOptions.parameters,
    include_frozen: bool = AnalysisOptions.include_frozen,
    strategy: StrategyName = AnalysisOptions.strategy,
    mode: Mode = "eval",
    probe: Probe = AnalysisOptions.probe,
    dtype: torch.dtype | None = AnalysisOptions.dtype,
    basis: Literal["auto", "device", "cpu", "none"] = AnalysisOptions.basis,
    memory_budget: int | None = AnalysisOptions.memory_budget,
    preconditioner: Mapping[str, Tensor] | None = AnalysisOptions.preconditioner,
    sampling_error: bool = AnalysisOptions.sampling_error,
    layer_probes: int = AnalysisOptions.layer_probes,
    track_eigenvectors: int = AnalysisOptions.track_eigenvectors,
    loss_along_eigenvectors: bool = AnalysisOptions.loss_along_eigenvectors,
) -> Spectrum:
    """Estimate the eigenvalue spectral density of the Hessian of the mean loss by stochastic Lanczos quadrature.

    The Hessian is taken with respect to all parameters that require grad, tied ones once; the mean is over all
    samples of all batches, each batch counting by its weight. The module, its buffers, modes and gradients, and all
    random number generators are afterwards as they were.

    `AnalysisOptions` explains the options: how many products (`steps`, `probes`, `seed`), or how accurate a C_t or
    density (`tolerance`, `stop`, `confidence`); of which curvature matrix (`matrix` with `output_fn` and
    `output_loss`, `parameters`, `include_frozen`, `preconditioner`) of which mean loss (`batch_weight`, `mode`); by
    which products (`strategy`, `batch_size`, `probe`, `dtype`) in which memory (`basis`, `memory_budget`); and whether
    the error due to the finite sample is estimated, too (`sampling_error`), traces of layers more accurately
    (`layer_probes`), and the loss along the extreme eigenvectors (`loss_along_eigenvectors`).

    Args:
        module: The module, on the device of the batches.
        batches: Batches as `loss_fn` takes them; read once and kept for the analysis.
        loss_fn: `loss_fn(module, batch)` -> mean loss over the batch, a scalar tensor that can be differentiated
            twice.

    Returns:
        The spectrum, with its error bounds. Without the sampling error if the samples cannot be cut into groups for
        it: `sampling_reason` and a warning say why.

    Raises:
        ValueError: If an option is out of range, if no parameter is left to analyze, if there is no batch, or if
            `output_loss` is another loss than `loss_fn`.
        TypeError: If the loss is not a scalar tensor.
        ArithmeticError: If the loss or a Hessian-vector product is NaN or infinite; the message names the batch.
        RuntimeError: If the loss cannot be differentiated twice, and `strategy` is "graph" or "recompute".

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> spectrum = hessian_spectrum(model, [data], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
        >>> spectrum.nodes.round(4).tolist(), spectrum.c_t, spectrum.hesd_type
        ([[1.0, 4.0]], 0.0, 'MP')
    """
    options = AnalysisOptions(
        batch_weight=batch_weight,
        batch_size=batch_size,
        steps=steps,
        probes=probes,
        seed=seed,
        tolerance=tolerance,
        stop=stop,
        confidence=confidence,
        matrix=matrix,
        output_fn=output_fn,
        output_loss=output_loss,
        parameters=parameters,
        include_frozen=include_frozen,
        strategy=strategy,
        mode=mode,
        probe=probe,
        dtype=dtype,
        basis=basis,
        memory_budget=memory_budget,
        preconditioner=preconditioner,
        sampling_error=sampling_error,
        layer_probes=layer_probes,
        track_eigenvectors=track_eigenvectors,
        loss_along_eigenvectors=loss_along_eigenvectors,
    )
    weighted, cache = weighted_batches(batches, batch_weight), AnalysisCache()

    def attempt(options: AnalysisOptions, reason: str | None) -> Spectrum:
        return analyze(module, weighted, loss_fn, options, cache=cache, reason=reason)

    spectrum = retry_on_oom(attempt, options, cache)
    _warn_without_sampling_error([spectrum])
    return spectrum


def layer_spectra(
    module: nn.Module, batches: Iterable[Any], loss_fn: LossFunction, layers: Layers | None = None, **options: Any
) -> LayerSpectra:
    """Estimate the spectra of layer-wise (local) Hessians: the diagonal blocks of the layers of a network.

    The Hessian of a block holds the second derivatives of the mean loss with respect to the parameters of that block
    only (Bolshim & Kugaevskikh 2025). All blocks take their Lanczos steps together: each step takes one gradient
    graph, and differentiates it once more for each block.

    Args:
        module: As for `hessian_spectrum`.
        batches: As for `hessian_spectrum`.
        loss_fn: As for `hessian_spectrum`.
        layers: The blocks. "auto" (default): every module that owns parameters, a norm together with the convolution
            or linear layer before it, and a module of a class called attention, MLP or feed-forward as one block. Or
            names of modules, patterns of names ("encoder.*"), and classes of modules, one or several; where a module
            and a module inside of it match, the outer one counts. Or a function: `layers(name, parameter)` -> name of
            the parameter's block, or None. Shared parameters belong to the first block that has them.
        **options: Options of `hessian_spectrum`, which `AnalysisOptions` explains.

    Returns:
        The spectrum of each block, by the name of its module (of its parameter, where the network itself owns it): a
        dictionary that `plot()` draws.

    Raises:
        ValueError: As `hessian_spectrum` does, and if `layers` names no module, or blocks that overlap.
        TypeError: As `hessian_spectrum` does, if `layers` has another type, or if a keyword is not an option.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> spectra = layer_spectra(model, [data], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
        >>> {name: spectrum.dimension for name, spectrum in spectra.items()}
        {'0': 9, '2': 4}
    """
    checked = analysis_options(**options)
    weighted, cache = weighted_batches(batches, checked.batch_weight), AnalysisCache()

    def attempt(options: AnalysisOptions, reason: str | None) -> LayerSpectra:
        return analyze_layers(module, weighted, loss_fn, options, layers, cache=cache, reason=reason)

    spectra = retry_on_oom(attempt, checked, cache)
    _warn_without_sampling_error(spectra.values())
    return spectra


def _warn_without_sampling_error(spectra: Iterable[Spectrum]) -> None:
    """Warn if a spectrum with a C_t lacks the sampling error that was asked for, with the reason of the first one."""
    reason = next((s.sampling_reason for s in spectra if s.reason is None and s.sampling_reason is not None), None)
    if reason is not None:
        warnings.warn(f"lightning_hesd: no sampling error: {reason}", RuntimeWarning, stacklevel=3)
