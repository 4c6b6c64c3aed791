"""`hessian_spectrum`: from a module, batches and a loss to a `Spectrum`."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hesd import criteria, quadrature
from lightning_hesd.guards import analysis_state
from lightning_hesd.lanczos import NonFiniteProductError, Tridiagonal, lanczos
from lightning_hesd.operators import HessianOperator, WeightedBatch
from lightning_hesd.options import OPTION_NAMES, AnalysisOptions
from lightning_hesd.snapshot import preserved, seed_everything
from lightning_hesd.spectrum import Spectrum

if TYPE_CHECKING:
    from lightning_hesd.guards import Mode
    from lightning_hesd.operators import AllReduce
    from lightning_hesd.options import Probe

LossFunction = Callable[[Any, Any], Tensor]
"""loss_fn(module, batch) -> mean loss over the batch, a scalar tensor."""

Report = Callable[[int, int], None]
"""Takes the steps done and the most there can be."""


def hessian_spectrum(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    batch_weight: Callable[[Any], float] | None = None,
    steps: int = 100,
    probes: int = 1,
    seed: int = 0,
    tolerance: float | str | None = None,
    confidence: float = 0.95,
    matrix: Literal["hessian"] = "hessian",
    output_fn: Callable[[Any, Any], Any] | None = None,
    output_loss: Callable[[Any, Any], Tensor] | None = None,
    parameters: Callable[[str, nn.Parameter], bool] | None = None,
    strategy: Literal["auto", "graph", "recompute"] = "auto",
    mode: Mode = "eval",
    probe: Probe = "gaussian",
    dtype: torch.dtype | None = None,
    basis: Literal["auto", "device"] = "auto",
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
            first dimension of its first tensor.
        steps: Lanczos steps per probe, hence Hessian-vector products; never more than there are parameters. Default
            from Gabdullin (2025) and Yao et al. (2020).
        probes: Number of independent start vectors.
        seed: Seed of the start vectors and of whatever is random in the forward pass.
        tolerance: Stop early; not available in this version.
        confidence: Kept in the record; the intervals of this version are residual bounds, which do not depend on it.
        matrix: "hessian"; others are not available in this version.
        output_fn: For other matrices; not available in this version.
        output_loss: For other matrices; not available in this version.
        parameters: `parameters(name, parameter)` -> whether to include it.
        strategy: "graph" keeps the gradient's graph (fast), "recompute" builds it anew for each product (lean),
            "auto" keeps the graphs if they are small enough.
        mode: Module mode during the analysis: "eval", "train", or "keep" for no change.
        probe: "gaussian" (start vectors uniform on the sphere) or "rademacher" (random signs, as the papers use).
        dtype: Floating-point type of the Lanczos vectors; default: the parameters', at least float32.
        basis: "auto" or "device"; others are not available in this version.
        memory_budget: Not available in this version.
        preconditioner: Not available in this version.
        sampling_error: Not available in this version.

    Returns:
        The spectrum, with its error bounds.

    Raises:
        ValueError: If an argument is out of range or not available in this version, if no parameter is left to
            analyse, or if there is no batch.
        TypeError: If the loss is not a scalar tensor.
        ArithmeticError: If the loss or a Hessian-vector product is NaN or infinite; the message names the batch.
        RuntimeError: If the loss cannot be differentiated twice.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> spectrum = hessian_spectrum(model, [data], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
        >>> spectrum.nodes.round(4).tolist(), spectrum.c_t, spectrum.hesd_type
        ([[1.0, 4.0]], 0.0, 'MP')
    """
    arguments = locals()  # before any other name: exactly the arguments
    options = AnalysisOptions(**{name: arguments[name] for name in OPTION_NAMES})
    weigh = batch_weight or batch_size
    with preserved():  # a data loader draws random numbers
        weighted = [WeightedBatch(batch, weigh(batch), index) for index, batch in enumerate(batches)]
    return analyze(module, weighted, loss_fn, options)


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


def analyze(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    *,
    all_reduce: AllReduce | None = None,
    report: Report | None = None,
) -> Spectrum:
    """Do the work of `hessian_spectrum`, possibly as one of several processes.

    Args:
        module: The module, with equal parameters in every process.
        batches: This process's share of the batches.
        loss_fn: As for `hessian_spectrum`.
        options: As for `hessian_spectrum`, equal in every process.
        all_reduce: Sums a tensor over the processes; None for a single process.
        report: Called after every Lanczos step with the steps done and the most there can be.

    Returns:
        The spectrum, equal in every process.
    """
    started = time.perf_counter()
    parameters = _select_parameters(module, options.parameters)
    dtype = options.dtype or _vector_dtype(parameters)

    def loss(batch: WeightedBatch) -> Tensor:
        # The same dropout mask at every evaluation of this batch, and not the random numbers of the start vectors.
        seed_everything(options.seed + 1 + batch.index)
        return _checked_loss(loss_fn(module, batch.copy().data))

    with analysis_state(module, options.mode):
        operator = HessianOperator(
            loss,
            batches,
            parameters,
            strategy=options.strategy,
            dtype=dtype,
            all_reduce=all_reduce,
        )
        try:
            tick = None if report is None else _counting(report, options.probes * options.steps)
            runs = [
                lanczos(operator.matvec, start, options.steps, tick)
                for start in _start_vectors(parameters, dtype, options)
            ]
        except NonFiniteProductError as error:
            raise operator.explain_non_finite(error.vector) from None
        matvecs = sum(run.matvecs for run in runs)
        cost = _gradient_equivalents(operator, parameters[0].device, matvecs)

    return _spectrum(runs, operator, parameters, options, matvecs=matvecs, cost=cost, started=started)


def _spectrum(
    runs: Sequence[Tridiagonal],
    operator: HessianOperator,
    parameters: Sequence[Tensor],
    options: AnalysisOptions,
    *,
    matvecs: int,
    cost: float | None,
    started: float,
) -> Spectrum:
    rules = [quadrature.gauss_quadrature(run.alphas, run.betas) for run in runs]
    nodes, weights, residuals = quadrature.stack_rules(rules)
    norm = max(float(abs(rule[0]).max()) for rule in rules)
    # The result is no more accurate than the coarser of the parameters' and the vectors' arithmetic.
    epsilon = max(torch.finfo(dtype).eps for dtype in [operator.dtype, *(p.dtype for p in parameters)])
    dimension = sum(p.numel() for p in parameters)
    squared_weight_norm = sum(float(p.detach().double().square().sum()) for p in parameters)
    return Spectrum(
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        steps_per_probe=tuple(len(run.alphas) for run in runs),
        dimension=dimension,
        num_samples=round(operator.weight),
        loss=operator.loss,
        rounding=criteria.rounding_threshold(norm, epsilon, dimension),
        matvecs=matvecs,
        seconds=time.perf_counter() - started,
        gradient_equivalents=cost,
        probe=options.probe,
        seed=options.seed,
        mode=options.mode,
        strategy=operator.strategy,
        strategy_reason=operator.strategy_reason,
        confidence=options.confidence,
        reason=criteria.undefined_reason(norm, operator.loss, squared_weight_norm, epsilon),
    )


def _counting(report: Report, total: int) -> Callable[[], None]:
    done = itertools.count(1)
    return lambda: report(next(done), total)


def _select_parameters(module: nn.Module, wanted: Callable[[str, nn.Parameter], bool] | None) -> list[nn.Parameter]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        msg = f"`module` ({type(module).__name__}) has no parameter that requires grad: there is nothing to analyse."
        raise ValueError(msg)
    selected = [p for name, p in trainable.items() if wanted is None or wanted(name, p)]
    if not selected:
        msg = f"the filter `parameters` leaves none of the {len(trainable)} parameters: {', '.join(trainable)}."
        raise ValueError(msg)
    for name, p in trainable.items():
        if p.is_complex() and any(p is chosen for chosen in selected):
            msg = f"parameter {name!r} is complex ({p.dtype}); only real parameters can be analysed."
            raise ValueError(msg)
    return selected


def _vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for p in parameters:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _start_vectors(parameters: Sequence[Tensor], dtype: torch.dtype, options: AnalysisOptions) -> Iterable[Tensor]:
    """Yield the start vectors, shape (n,): the same on every device and in every process."""
    generator = torch.Generator().manual_seed(options.seed)
    n = sum(p.numel() for p in parameters)
    for _ in range(options.probes):
        if options.probe == "gaussian":
            vector = torch.randn(n, generator=generator, dtype=torch.float64)
        else:
            vector = torch.randint(0, 2, (n,), generator=generator).double().mul_(2).sub_(1)
        yield vector.to(device=parameters[0].device, dtype=dtype)


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        msg = f"`loss_fn` must return a scalar tensor, got {type(loss).__name__}."
        raise TypeError(msg)
    if loss.numel() != 1:
        msg = f"`loss_fn` must return a scalar tensor, the mean over the batch; got shape {tuple(loss.shape)}."
        raise TypeError(msg)
    return loss.reshape(())


def _gradient_equivalents(operator: HessianOperator, device: torch.device, matvecs: int) -> float | None:
    """Return seconds per product over seconds per gradient, on the CPU; calls on other devices return early."""
    if device.type != "cpu" or not operator.batches:
        return None
    # The last thing measured, so that the caches are as warm as they were for the products.
    seconds = operator.time_gradient()
    return operator.seconds / matvecs / seconds if seconds > 0 else None


def batch_size(batch: Any) -> float:
    """Return the number of samples of a batch as Lightning infers it: the length of its first tensor.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    for tensor in _tensors(batch):
        return float(tensor.shape[0]) if tensor.ndim else 1.0
    msg = f"cannot tell the number of samples of a batch of type {type(batch).__name__}: pass `batch_weight`."
    raise ValueError(msg)


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, np.ndarray):
        return
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from _tensors([getattr(batch, field.name) for field in fields(batch)])
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        for part in batch:
            yield from _tensors(part)
