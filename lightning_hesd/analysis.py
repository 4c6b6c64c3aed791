"""`hessian_spectrum`: from a module, batches and a loss to a `Spectrum`."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hesd import criteria, quadrature
from lightning_hesd.batches import WeightedBatch, batch_size
from lightning_hesd.fast_derivatives import FastDerivatives
from lightning_hesd.guards import analysis_state
from lightning_hesd.lanczos import Lanczos, NonFiniteProductError
from lightning_hesd.memory import MemoryPlan, plan_memory
from lightning_hesd.operators import HessianOperator
from lightning_hesd.options import OPTION_NAMES, AnalysisOptions
from lightning_hesd.sampling import SamplingError, sampling_error
from lightning_hesd.snapshot import preserved, seed_everything
from lightning_hesd.spectrum import SMALLEST_SCALE, Spectrum

if TYPE_CHECKING:
    from lightning_hesd.guards import Mode
    from lightning_hesd.lanczos import Storage
    from lightning_hesd.operators import AllReduce, Calibration
    from lightning_hesd.options import Probe

LossFunction = Callable[[Any, Any], Tensor]
"""loss_fn(module, batch) -> mean loss over the batch, a scalar tensor."""

COARSE = 0.2
"""Relative accuracy of C_t at which the extreme Ritz vectors are good enough for the sampling error."""

SHARE_OF_FORECAST = 0.7
"""Of the steps that the error is forecast to need, so many are taken before looking again."""

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
        preconditioner: Not available in this version.
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
    parameters = _select_parameters(module, options.parameters)
    dtype = options.dtype or _vector_dtype(parameters)
    plan = _plan(module, parameters, dtype, options, all_reduce=all_reduce, processes=processes)

    def loss(batch: WeightedBatch) -> Tensor:
        # The same dropout mask at every evaluation of this batch, and not the random numbers of the start vectors.
        seed_everything(options.seed + 1 + batch.index)
        with FastDerivatives():
            return _checked_loss(loss_fn(module, batch.copy().data))

    with analysis_state(module, options.mode):
        operator = HessianOperator(
            loss,
            batches,
            parameters,
            strategy=options.strategy,
            dtype=dtype,
            all_reduce=all_reduce,
            graph_memory=plan.graphs,
            calibration=calibration,
        )
        analysis = _Analysis(operator, parameters, options, plan)
        try:
            analysis.run(None if report is None else _counting(report, options.probes * options.steps))
        except NonFiniteProductError as error:
            raise operator.explain_non_finite(error.vector) from None
        return replace(analysis.spectrum(), seconds=time.perf_counter() - started)


class _Analysis:
    """Lanczos processes on an operator, and what they have found so far."""

    def __init__(
        self, operator: HessianOperator, parameters: Sequence[Tensor], options: AnalysisOptions, plan: MemoryPlan
    ) -> None:
        self._operator = operator
        self._parameters = parameters
        self._options = options
        self._plan = plan
        self._runs: list[Lanczos] = []
        self._sampling: SamplingError | None = None
        self._cost: float | None = None
        self._next_look = 0
        self._last_look = (0, math.inf)  # steps, and the log of how many times too large the error was
        self._squared_weight_norm = sum(float(p.detach().double().square().sum()) for p in parameters)

    def run(self, tick: Callable[[], None] | None) -> None:
        options, operator = self._options, self._operator
        stop = None if options.tolerance is None else self._is_accurate
        generator = torch.Generator().manual_seed(options.seed)
        n, device = sum(p.numel() for p in self._parameters), self._parameters[0].device
        for _ in range(options.probes):
            process = Lanczos(
                operator.matvec,
                _start_vector(n, generator, options.probe, device, operator.dtype),  # unnamed: nobody else keeps it
                options.steps,
                storage=self._plan.storage,
            )
            self._runs.append(process)
            self._next_look, self._last_look = 0, (0, math.inf)
            process.run(stop, report=tick)
        self._cost = _gradient_equivalents(operator, device)
        if options.wants_sampling_error:
            self._sample(self._runs)

    def _is_accurate(self) -> bool:
        """Whether the process that is running has found C_t as accurately as asked."""
        running = self._runs[-1:]
        steps = len(running[0].alphas)
        if steps < self._next_look:
            return False
        spectrum = self.spectrum(running)
        if self._options.tolerance == "auto" and spectrum.c_t_error <= COARSE * max(abs(spectrum.c_t), SMALLEST_SCALE):
            self._sample(running)
            spectrum = self.spectrum(running)
        if spectrum.converged:
            return True
        self._schedule_look(steps, spectrum)
        return False

    def _schedule_look(self, steps: int, spectrum: Spectrum) -> None:
        """Look again when the error, which falls geometrically on the whole, may have come most of the way.

        A look takes an eigendecomposition and two bounds: a millisecond, but tens of them on a busy machine.
        """
        excess = math.log(spectrum.c_t_error / spectrum.allowed_error) if spectrum.allowed_error else math.inf
        before, self._last_look = self._last_look, (steps, excess)
        pause = 0.0
        if self._options.tolerance != "type" and before[0] < steps and math.inf > before[1] > excess > 0:
            pause = min(SHARE_OF_FORECAST * excess * (steps - before[0]) / (before[1] - excess), steps / 2)
        self._next_look = steps + int(pause)

    def _sample(self, runs: Sequence[Lanczos]) -> None:
        spectrum = self.spectrum(runs)
        if self._sampling is None and spectrum.reason is None and spectrum.lambda_max > spectrum.rounding:
            self._sampling = sampling_error(self._operator, runs)

    def spectrum(self, runs: Sequence[Lanczos] | None = None) -> Spectrum:
        """Return the record of these processes, by default of all."""
        runs = runs or self._runs
        operator, options, plan = self._operator, self._options, self._plan
        nodes, weights, residuals = quadrature.stack_rules(
            [quadrature.gauss_quadrature(run.alphas, run.betas) for run in runs]
        )
        norm = float(np.nanmax(np.abs(nodes)))
        # The result is no more accurate than the coarser of the parameters' and the vectors' arithmetic.
        epsilon = max(torch.finfo(dtype).eps for dtype in [operator.dtype, *(p.dtype for p in self._parameters)])
        dimension = sum(p.numel() for p in self._parameters)
        return Spectrum(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            steps_per_probe=tuple(len(run.alphas) for run in runs),
            dimension=dimension,
            num_samples=round(operator.weight),
            loss=operator.loss,
            rounding=max(criteria.rounding_threshold(norm, epsilon, dimension), operator.product_error),
            matvecs=operator.matvecs,
            seconds=0.0,
            gradient_equivalents=self._cost,
            probe=options.probe,
            seed=options.seed,
            mode=options.mode,
            strategy=operator.strategy,
            strategy_reason=operator.strategy_reason,
            basis=plan.storage,
            predicted_memory=plan.predicted(operator.graph_bytes),
            confidence=options.confidence,
            tolerance=options.tolerance,
            reason=criteria.undefined_reason(norm, operator.loss, self._squared_weight_norm, epsilon),
            **({} if self._sampling is None else asdict(self._sampling)),
        )


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


def _start_vector(n: int, generator: torch.Generator, probe: Probe, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw a start vector, shape (n,): the same on every device and in every process."""
    if probe == "gaussian":
        vector = torch.randn(n, generator=generator, dtype=torch.float64)
    else:
        vector = torch.randint(0, 2, (n,), generator=generator).double().mul_(2).sub_(1)
    return vector.to(device=device, dtype=dtype)


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        msg = f"`loss_fn` must return a scalar tensor, got {type(loss).__name__}."
        raise TypeError(msg)
    if loss.numel() != 1:
        msg = f"`loss_fn` must return a scalar tensor, the mean over the batch; got shape {tuple(loss.shape)}."
        raise TypeError(msg)
    return loss.reshape(())


def _gradient_equivalents(operator: HessianOperator, device: torch.device) -> float | None:
    """Return seconds per product over seconds per gradient, on the CPU; calls on other devices return early."""
    if device.type != "cpu" or not operator.batches:
        return None
    # The last thing measured, so that the caches are as warm as they were for the products.
    seconds = operator.time_gradient()
    return operator.seconds_per_product / seconds if seconds > 0 else None
