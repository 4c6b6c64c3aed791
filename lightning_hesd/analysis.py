"""`hessian_spectrum`: from a module, batches and a loss to a `Spectrum`."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_hesd.batches import WeightedBatch, batch_size
from lightning_hesd.estimation import Estimation
from lightning_hesd.fast_derivatives import FastDerivatives
from lightning_hesd.guards import analysis_state
from lightning_hesd.lanczos import NonFiniteProductError
from lightning_hesd.memory import MemoryPlan, plan_memory
from lightning_hesd.operators import HessianOperator
from lightning_hesd.options import OPTION_NAMES, AnalysisOptions
from lightning_hesd.snapshot import preserved, seed_everything

if TYPE_CHECKING:
    from lightning_hesd.guards import Mode
    from lightning_hesd.lanczos import Storage
    from lightning_hesd.operators import AllReduce
    from lightning_hesd.options import Probe
    from lightning_hesd.spectrum import Spectrum
    from lightning_hesd.strategies import Calibration

LossFunction = Callable[[Any, Any], Tensor]
"""loss_fn(module, batch) -> mean loss over the batch, a scalar tensor."""

SCALING_VECTORS = 3
"""What a preconditioner adds to the vectors: the scale, and what is scaled before and after a product."""

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
    tolerance: float | Literal["type", "auto"] | None = None,
    confidence: float = 0.95,
    matrix: Literal["hessian"] = "hessian",
    output_fn: Callable[[Any, Any], Any] | None = None,
    output_loss: Callable[[Any, Any], Tensor] | None = None,
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
            first dimension of its first tensor.
        steps: Lanczos steps per probe, hence Hessian-vector products; never more than there are parameters. With
            `tolerance` the most there can be. Default from Gabdullin (2025) and Yao et al. (2020).
        probes: Number of independent start vectors.
        seed: Seed of the start vectors and of whatever is random in the forward pass.
        tolerance: Stop as soon as the interval of C_t is narrow enough: a number for the relative accuracy (0.05:
            within 5 % of C_t, or of 0.001 where C_t is closer to zero); "type" for MP or MN to be certain; "auto" for
            a quarter of the sampling error of C_t, which is estimated on the way. None: take all steps.
        confidence: Probability, over the start vectors, with which the interval of C_t holds at least.
        matrix: "hessian"; others are not available in this version.
        output_fn: For other matrices; not available in this version.
        output_loss: For other matrices; not available in this version.
        parameters: `parameters(name, parameter)` -> whether to include it.
        include_frozen: Include parameters that do not require grad, as the loss depends on them: the spectrum of all
            weights of a network of which a part is fine-tuned.
        strategy: "graph" keeps the gradient's graph (fast), "recompute" builds it anew for each product (lean),
            "finite_difference" takes central differences of the gradient (works without a second derivative; the
            error is part of the record's `rounding`). "auto" keeps the graphs of as many batches as fit into the
            memory and recomputes the rest; it takes differences only where there is no exact product.
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
            analyse, if there is no batch, or if the samples cannot be cut into groups for the sampling error.
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
    calibration: Calibration | None = None,
    processes: int = 1,
) -> Spectrum:
    """Do the work of `hessian_spectrum`, possibly as one of several processes.

    Args:
        module: The module, with equal parameters in every process.
        batches: This process's share of the batches.
        loss_fn: As for `hessian_spectrum`.
        options: As for `hessian_spectrum`, equal in every process.
        all_reduce: Sums a tensor over the processes; None for a single process.
        report: Called after every Lanczos step with the steps done and the most there can be.
        calibration: What earlier analyses of the same loss found out; brought up to date.
        processes: How many of the processes share this computer's memory.

    Returns:
        The spectrum, equal in every process.
    """
    started = time.perf_counter()
    parameters = _select_parameters(module, options)
    dtype = options.dtype or _vector_dtype(parameters)
    plan = _plan(module, parameters, dtype, options, all_reduce=all_reduce, processes=processes)

    def loss(batch: WeightedBatch) -> Tensor:
        # The same dropout mask at every evaluation of this batch, and not the random numbers of the start vectors.
        seed_everything(options.seed + 1 + batch.index)
        with FastDerivatives():
            return _checked_loss(loss_fn(module, batch.copy().data))

    with analysis_state(module, options.mode, parameters):
        operator = HessianOperator(
            loss,
            batches,
            parameters,
            strategy=options.strategy,
            dtype=dtype,
            all_reduce=all_reduce,
            graph_memory=plan.graphs,
            calibration=calibration,
            scale=_scale(module, parameters, options.preconditioner, dtype),
        )
        estimation = Estimation(operator, parameters, options, plan, started)
        try:
            estimation.run(None if report is None else _counting(report, options.probes * options.steps))
        except NonFiniteProductError as error:
            raise operator.explain_non_finite(error.vector) from None
        return estimation.spectrum()


def _plan(
    module: nn.Module,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    options: AnalysisOptions,
    *,
    all_reduce: AllReduce | None,
    processes: int,
) -> MemoryPlan:
    """Plan the memory, with the same storage in every process: the leanest that one of them needs."""
    n = sum(p.numel() for p in parameters)
    device = parameters[0].device

    def plan(basis: Literal["auto"] | Storage) -> MemoryPlan:
        return plan_memory(
            [*module.parameters(), *module.buffers()],
            n * dtype.itemsize,
            min(options.steps, n),
            basis=basis,
            device=device,
            budget=options.memory_budget,
            processes=processes,
            more_vectors=0 if options.preconditioner is None else SCALING_VECTORS,
        )

    own = plan(options.basis)
    if all_reduce is None:
        return own
    storages: list[Storage] = ["device", "cpu", "none"]
    votes = all_reduce(torch.tensor([float(own.storage == s) for s in storages], device=device)).tolist()
    return plan([storage for storage, vote in zip(storages, votes, strict=True) if vote][-1])


def _counting(report: Report, total: int) -> Callable[[], None]:
    done = itertools.count(1)
    return lambda: report(next(done), total)


def _select_parameters(module: nn.Module, options: AnalysisOptions) -> list[nn.Parameter]:
    wanted = options.parameters
    trainable = {
        name: p
        for name, p in module.named_parameters()
        if p.requires_grad or (options.include_frozen and (p.is_floating_point() or p.is_complex()))
    }
    if not trainable:
        hint = "" if options.include_frozen else " (`include_frozen=True` includes those that do not)"
        msg = f"`module` ({type(module).__name__}) has no parameter that requires grad{hint}: nothing to analyse."
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


def _scale(
    module: nn.Module, parameters: Sequence[Tensor], preconditioner: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> Tensor | None:
    """Return D^(-1/2) as a flat vector, shape (n,).

    Raises:
        ValueError: If D does not fit the parameters.
    """
    if preconditioner is None:
        return None
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    unknown = sorted(set(preconditioner) - set(names.values()))
    missing = [names[p] for p in parameters if names[p] not in preconditioner]
    if unknown or missing:
        trouble = f"names {unknown[0]!r}, which is no parameter" if unknown else f"has no diagonal for {missing[0]!r}"
        msg = f"`preconditioner` {trouble}; it must have one for each analysed parameter of `module`."
        raise ValueError(msg)
    for p in parameters:
        shape = tuple(preconditioner[names[p]].shape)
        if shape != p.shape:
            msg = f"`preconditioner[{names[p]!r}]` must have the shape of the parameter, {tuple(p.shape)}, got {shape}."
            raise ValueError(msg)
    return torch.cat([preconditioner[names[p]].to(p.device).double().rsqrt().to(dtype).flatten() for p in parameters])


def _vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for p in parameters:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        msg = f"`loss_fn` must return a scalar tensor, got {type(loss).__name__}."
        raise TypeError(msg)
    if loss.numel() != 1:
        msg = f"`loss_fn` must return a scalar tensor, the mean over the batch; got shape {tuple(loss.shape)}."
        raise TypeError(msg)
    return loss.reshape(())
