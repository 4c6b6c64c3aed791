"""`hessian_spectrum` and `layer_spectra`: what users call, and its options."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch  # noqa: TC002 - the examples in docstrings need them
from torch import Tensor, nn  # noqa: TC002 - the examples in docstrings need them

from lightning_hesd.numerics.analysis.engine import analyze, analyze_layers
from lightning_hesd.numerics.analysis.retry import retry_on_oom
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import OPTION_NAMES, AnalysisOptions
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.numerics.inputs.options import Probe
    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.spectra.spectrum import Spectrum


def hessian_spectrum(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    batch_weight: Literal["tokens"] | Callable[[Any], float] | None = None,
    steps: int = 100,
    probes: int = 1,
    seed: int = 0,
    tolerance: float | Literal["type", "auto"] | None = None,
    confidence: float = 0.95,
    matrix: Literal["hessian", "ggn", "residual"] = "hessian",
    output_fn: Callable[[Any, Any], Any] | None = None,
    output_loss: Callable[[Any, Any], Any] | None = None,
    parameters: Callable[[str, nn.Parameter], bool] | None = None,
    include_frozen: bool = False,
    strategy: Literal["auto", "graph", "recompute", "finite_difference"] = "auto",
    mode: Mode = "eval",
    probe: Probe = "gaussian",
    dtype: torch.dtype | None = None,
    basis: Literal["auto", "device", "cpu", "none"] = "auto",
    memory_budget: int | None = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    sampling_error: bool = False,
) -> Spectrum:
    """Estimate the eigenvalue spectral density of the Hessian of the mean loss by stochastic Lanczos quadrature.

    The Hessian is taken with respect to all parameters that require grad, tied ones once; the mean is over all
    samples of all batches, each batch counting by its weight. The module, its buffers, modes and gradients, and all
    random number generators are afterwards as they were.

    Args:
        module: The module, on the device of the batches.
        batches: Batches as `loss_fn` takes them; read once and kept for the analysis.
        loss_fn: `loss_fn(module, batch)` -> mean loss over the batch, a scalar tensor that can be differentiated
            twice.
        batch_weight: `batch_weight(batch)` -> weight of the batch, positive; default: its number of samples, the
            first dimension of its tensors; a warning says where these disagree. "tokens": the number of its `labels`
            other than -100 (without the first of each row if the loss does not depend on it), or without `labels` of
            the nonzero values of its `attention_mask`. The default turns to "tokens", with a warning, where the losses
            of two parts of a batch show that its loss is the mean over tokens and not over samples.
        steps: Lanczos steps per probe, hence Hessian-vector products; never more than there are parameters. With
            `tolerance` the most there can be. Default from Gabdullin (2025) and Yao et al. (2020).
        probes: Number of independent start vectors.
        seed: Seed of the start vectors and of whatever is random in the forward pass.
        tolerance: Stop as soon as the interval of C_t is narrow enough: a number for the relative accuracy (0.05:
            within 5 % of C_t, or of 0.001 where C_t is closer to zero); "type" for MP or MN to be certain; "auto" for
            a quarter of the sampling error of C_t, which is estimated on the way. None: take all steps.
        confidence: Probability, over the start vectors, with which the interval of C_t holds at least.
        matrix: "hessian", or one of the two parts that it is the sum of: "ggn", the generalised Gauss-Newton matrix
            Jᵀ (∂²L/∂o²) J of outputs o with Jacobian J, and "residual", the rest (the G-term and H-term of Kiselev &
            Grabovoy 2024, section 3.4).
        output_fn: `output_fn(module, batch)` -> outputs o: a tensor, or tensors in lists, tuples and dicts; for "ggn"
            and "residual".
        output_loss: `output_loss(outputs, batch)` -> mean loss L, the same as that of `loss_fn`, and of nothing but the
            outputs.
        parameters: `parameters(name, parameter)` -> whether to include it.
        include_frozen: Include parameters that do not require grad, as the loss depends on them: the spectrum of all
            weights of a network of which a part is fine-tuned.
        strategy: "graph" keeps the gradient's graph (fast), "recompute" builds it anew for each product (lean),
            "finite_difference" takes central differences of the gradient (works without a second derivative; the
            error is part of the record's `rounding`). "auto" keeps the graphs of as many batches as fit into the
            memory and recomputes the rest; it takes differences only where there is no exact product. An analysis that
            runs out of memory is repeated with "recompute", and if need be without a basis; `strategy_reason` says so.
        mode: Module mode during the analysis: "eval", "train", or "keep" for no change.
        probe: "gaussian" (start vectors uniform on the sphere) or "rademacher" (random signs, as the papers use).
        dtype: Floating-point type of the Lanczos vectors; default: the parameters', at least float32.
        basis: Where the Krylov basis is kept, `steps` vectors: "device", "cpu", or "none", which does without
            reorthogonalisation. "auto": the first of these that fits.
        memory_budget: Bytes the analysis may take, beyond module and batches; default: half of what is free.
        preconditioner: Parameter name -> positive diagonal D in the shape of the parameter, for all analysed ones: take
            D^(-1/2) H D^(-1/2) for H, the curvature in the coordinates of an optimizer that steps along -D⁻¹g.
        sampling_error: Also estimate how much of C_t is due to the finite sample, in one more pass over it.

    Returns:
        The spectrum, with its error bounds.

    Raises:
        ValueError: If an argument is out of range or not available in this version, if no parameter is left to
            analyse, if there is no batch, if the samples cannot be cut into groups for the sampling error, or if
            `output_loss` is another loss than `loss_fn`.
        TypeError: If the loss is not a scalar tensor.
        ArithmeticError: If the loss or a Hessian-vector product is NaN or infinite; the message names the batch.
        RuntimeError: If the loss cannot be differentiated twice, and `strategy` is "graph" or "recompute".

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> spectrum = hessian_spectrum(model, [data], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
        >>> spectrum.nodes.round(4).tolist(), spectrum.c_t, spectrum.hesd_type
        ([[1.0, 4.0]], 0.0, 'MP')
    """
    arguments = locals()  # before any other name: exactly the arguments
    options = AnalysisOptions(**{name: arguments[name] for name in OPTION_NAMES})
    weighted = _weighted(batches, options)
    cache = AnalysisCache()

    def attempt(options: AnalysisOptions, reason: str | None) -> Spectrum:
        return analyze(module, weighted, loss_fn, options, cache=cache, reason=reason)

    return retry_on_oom(attempt, options, cache)


def layer_spectra(
    module: nn.Module, batches: Iterable[Any], loss_fn: LossFunction, layers: Layers | None = None, **options: Any
) -> dict[str, Spectrum]:
    """Estimate the spectra of layer-wise (local) Hessians: of the diagonal blocks that belong to parts of a network.

    The Hessian of a block holds the second derivatives of the mean loss with respect to the parameters of that block
    only (Bolshim & Kugaevskikh 2025). All blocks take their Lanczos steps together: each step takes one gradient
    graph, and differentiates it once more for each block.

    Args:
        module: As for `hessian_spectrum`.
        batches: As for `hessian_spectrum`.
        loss_fn: As for `hessian_spectrum`.
        layers: What the blocks are. "auto" (default): every module that owns parameters, a norm together with the
            convolution or linear layer before it, and modules of a class called attention, MLP or feed-forward as one.
            Or names of modules, patterns of such ("encoder.*"), and classes of modules, one or several; of a module
            and one inside of it that match, the outer one counts. Or a function: `layers(name, parameter)` -> name of
            the parameter's block, or None. Shared parameters belong to the first block that has them.
        **options: Those of `hessian_spectrum`.

    Returns:
        The spectrum of each block, by the name of its module (of its parameter, where the network itself owns it).

    Raises:
        ValueError: As `hessian_spectrum` does, and if `layers` names no module, or blocks that overlap.
        TypeError: As `hessian_spectrum` does, and if `layers` or an option is of a kind that it does not take.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> spectra = layer_spectra(model, [data], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
        >>> {name: spectrum.dimension for name, spectrum in spectra.items()}
        {'0': 9, '2': 4}
    """
    checked = analysis_options(**options)
    weighted = _weighted(batches, checked)
    cache = AnalysisCache()

    def attempt(options: AnalysisOptions, reason: str | None) -> dict[str, Spectrum]:
        return analyze_layers(module, weighted, loss_fn, options, layers, cache=cache, reason=reason)

    return retry_on_oom(attempt, checked, cache)


def _weighted(batches: Iterable[Any], options: AnalysisOptions) -> list[WeightedBatch]:
    with restore_state():  # a data loader draws random numbers
        return weighted_batches(batches, options.batch_weight)


def analysis_options(**given: Any) -> AnalysisOptions:
    """Check keyword arguments meant for `hessian_spectrum`, and fill in its defaults.

    Raises:
        TypeError: If a keyword is not one of its options.
    """
    unknown = sorted(set(given) - set(OPTION_NAMES))
    if unknown:
        msg = f"unexpected keyword argument {unknown[0]!r}; the analysis takes {', '.join(OPTION_NAMES)}."
        raise TypeError(msg)
    defaults = inspect.signature(hessian_spectrum).parameters
    return AnalysisOptions(**{name: given.get(name, defaults[name].default) for name in OPTION_NAMES})


def _show_options_in_signature() -> None:
    """Let `analysis_options` show what its keywords are: names, types, defaults, and what `hessian_spectrum` says.

    LightningCLI reads this where the callback hands its `**analysis` on.
    """
    signature = inspect.signature(hessian_spectrum)
    options = [parameter for name, parameter in signature.parameters.items() if name in OPTION_NAMES]
    functools.update_wrapper(analysis_options, hessian_spectrum, assigned=("__doc__", "__annotations__"))
    analysis_options.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]


_show_options_in_signature()
