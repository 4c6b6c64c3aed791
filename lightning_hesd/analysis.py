"""`hessian_spectrum`: from a module, batches and a loss to a `Spectrum`."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_hesd.batches import WeightedBatch, batch_size
from lightning_hesd.estimation import Estimation, run_together
from lightning_hesd.fast_derivatives import FastDerivatives
from lightning_hesd.guards import analysis_state
from lightning_hesd.layers import Layers, blocks
from lightning_hesd.matrices import GaussNewtonMatrix, HessianMatrix, ResidualMatrix
from lightning_hesd.memory import MemoryPlan, plan_memory
from lightning_hesd.operators import CurvatureOperator, prepare_differences
from lightning_hesd.options import OPTION_NAMES, AnalysisOptions
from lightning_hesd.parameters import inverse_root, select_parameters, vector_dtype
from lightning_hesd.sample_mean import SampleMean
from lightning_hesd.snapshot import preserved, seed_everything

if TYPE_CHECKING:
    from lightning_hesd.guards import Mode
    from lightning_hesd.lanczos import Storage
    from lightning_hesd.matrices import Matrix
    from lightning_hesd.options import Probe
    from lightning_hesd.sample_mean import AllReduce
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
    matrix: Literal["hessian", "ggn", "residual"] = "hessian",
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
    return analyze(module, _weighted(batches, options), loss_fn, options)


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
    return analyze_layers(module, _weighted(batches, checked), loss_fn, checked, layers)


def _weighted(batches: Iterable[Any], options: AnalysisOptions) -> list[WeightedBatch]:
    weigh = options.batch_weight or batch_size
    with preserved():  # a data loader draws random numbers
        return [WeightedBatch(batch, weigh(batch), index) for index, batch in enumerate(batches)]


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


class Context(TypedDict, total=False):
    """Where an analysis runs, and what is known beforehand.

    Attributes:
        all_reduce: Sums a tensor over the processes; None for a single process.
        processes: How many of the processes share this computer's memory.
        report: Called after every Lanczos step with the steps done and the most there can be.
        calibration: What earlier analyses of the same loss found out; brought up to date.
    """

    all_reduce: AllReduce | None
    processes: int
    report: Report | None
    calibration: Calibration | None


def analyze(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    **context: Unpack[Context],
) -> Spectrum:
    """Do the work of `hessian_spectrum`, possibly as one of several processes.

    Args:
        module: The module, with equal parameters in every process.
        batches: This process's share of the batches.
        loss_fn: As for `hessian_spectrum`.
        options: As for `hessian_spectrum`, equal in every process.
        **context: Where it runs.

    Returns:
        The spectrum, equal in every process.
    """
    everything = list(select_parameters(module, options).values())
    with estimated(module, batches, loss_fn, options, [everything], **context) as [estimation]:
        return estimation.spectrum()


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
    with estimated(module, batches, loss_fn, options, list(found.values()), **context) as estimations:
        return {name: estimation.spectrum() for name, estimation in zip(found, estimations, strict=True)}


@contextlib.contextmanager
def estimated(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    parts: Sequence[Sequence[nn.Parameter]],
    *,
    all_reduce: AllReduce | None = None,
    processes: int = 1,
    report: Report | None = None,
    calibration: Calibration | None = None,
) -> Iterator[list[Estimation]]:
    """Run the Lanczos processes of the diagonal blocks that belong to these parts of the parameters.

    Yields:
        The processes of each block, in the state in which products are possible.
    """
    started = time.perf_counter()
    parameters = [p for part in parts for p in part]
    ends = list(itertools.accumulate(len(part) for part in parts))
    ranges = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
    dtype = options.dtype or vector_dtype(parameters)
    plan = _plan(module, parameters, dtype, options, all_reduce=all_reduce, processes=processes)

    with analysis_state(module, options.mode, parameters):
        mean = SampleMean(
            _matrix(module, loss_fn, parameters, ranges, options),
            batches,
            strategy=options.strategy,
            dtype=dtype,
            all_reduce=all_reduce,
            graph_memory=plan.graphs,
            calibration=calibration,
        )
        operators = [
            CurvatureOperator(mean, block, inverse_root(module, part, options.preconditioner, dtype))
            for block, part in zip(ranges, parts, strict=True)
        ]
        prepare_differences(operators)
        tick = None if report is None else _counting(report, options.probes * options.steps)
        estimations = [Estimation(operator, options, plan, started) for operator in operators]
        run_together(estimations, tick)
        yield estimations


def _matrix(
    module: nn.Module,
    loss_fn: LossFunction,
    parameters: Sequence[Tensor],
    ranges: Sequence[slice],
    options: AnalysisOptions,
) -> Matrix:
    """Return the matrix of a batch; it calls the user's functions."""

    @contextlib.contextmanager
    def evaluated(batch: WeightedBatch) -> Iterator[Any]:
        # The same dropout mask at every evaluation of this batch, and not the random numbers of the start vectors.
        seed_everything(options.seed + 1 + batch.index)
        with FastDerivatives():
            yield batch.copy().data

    def loss(batch: WeightedBatch) -> Tensor:
        with evaluated(batch) as data:
            return _checked_loss(loss_fn(module, data), "loss_fn")

    if options.matrix == "hessian":
        return HessianMatrix(loss, parameters, blocks=ranges)
    output_fn = cast("Callable[[Any, Any], Any]", options.output_fn)  # checked with the options
    output_loss = cast("Callable[[Any, Any], Tensor]", options.output_loss)

    def outputs(batch: WeightedBatch) -> Any:
        with evaluated(batch) as data:
            return output_fn(module, data)

    def loss_of_outputs(values: Any, batch: WeightedBatch) -> Tensor:
        with evaluated(batch) as data:
            return _checked_loss(output_loss(values, data), "output_loss")

    kind = GaussNewtonMatrix if options.matrix == "ggn" else ResidualMatrix
    return kind(loss, parameters, outputs, loss_of_outputs, blocks=ranges)


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


def _checked_loss(loss: Any, name: str) -> Tensor:
    if not isinstance(loss, Tensor):
        msg = f"`{name}` must return a scalar tensor, got {type(loss).__name__}."
        raise TypeError(msg)
    if loss.numel() != 1:
        msg = f"`{name}` must return a scalar tensor, the mean over the batch; got shape {tuple(loss.shape)}."
        raise TypeError(msg)
    return loss.reshape(())
