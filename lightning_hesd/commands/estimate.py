"""`lightning-hesd estimate`: time, memory and communication of an analysis before it is run, by a cost model.

The model describes the engine by four numbers of the machine; `python -m benchmarks.cost` compares it with
measurements. Work that does not grow with the network is left out: eigenvalues of T, the overhead of small operations.
"""

from __future__ import annotations

import math
import timeit
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch

from lightning_hesd.numerics.operators.memory import VECTORS
from lightning_hesd.spectra.validation import check_count

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Strategy = Literal["graph", "recompute", "finite_difference"]

GRADIENTS_PER_PRODUCT: dict[Strategy, float] = {"graph": 2.2, "recompute": 3.3, "finite_difference": 2.0}
"""In whole analyses, where graphs of several batches compete for the caches. By themselves products with a graph were
measured as 1.5 (MLP), 2.1 (ResNet20) and 1.8 (ViT), see the benchmark."""

PREPARATION: dict[Strategy, float] = {"graph": 3.0, "recompute": 3.0, "finite_difference": 26.0}
"""Gradients beside the products: the loss and its graph, the choice of a difference's step, and the gradient at the end
with which products are compared."""

VECTOR_PASSES = 16
"""Reads and writes of vectors in a step, without reorthogonalization and the HVPs of batches."""

BATCH_PASSES: dict[Strategy, float] = {"graph": 3.0, "recompute": 3.0, "finite_difference": 28.0}
"""Reads and writes of vectors in the HVP of a batch: it is added up; a difference also moves the parameters."""

EXCHANGES: dict[Strategy, float] = {"graph": 4.0, "recompute": 7.0, "finite_difference": 6.0}
"""Gathers of all sharded parameters, and scatters of their gradients, in the HVP of a batch; counted: 2.7 to 3.9, 5.4
to 6.8, 5.4 to 5.9 (perceptron, transformer)."""

EXCHANGES_OF_GRADIENT = 3.0
"""The same for a gradient: forward, backward, and the gradient itself."""


@dataclass(frozen=True)
class Workload:
    """The size of an analysis.

    Attributes:
        parameters: Number n of parameters.
        samples: Number of samples.
        batch_size: Samples in a batch; whole batches are dealt to the ranks.
        steps: Lanczos steps per probe.
        probes: Number of probes.
        processes: Number of ranks that share the samples.
        sharded: Whether ranks also share the parameters, and with them all vectors.
        strategy: HVP strategy.
        basis: Whether the Krylov basis is kept, for reorthogonalization.
        value_bytes: Bytes of a parameter and of an entry of a vector.
        graph_bytes: Bytes that the gradient's graph holds per sample; 0: not counted.
    """

    parameters: int
    samples: int = 512
    batch_size: int = 32
    steps: int = 100
    probes: int = 1
    processes: int = 1
    sharded: bool = False
    strategy: Strategy = "graph"
    basis: bool = True
    value_bytes: int = 4
    graph_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("parameters", "samples", "batch_size", "steps", "probes", "processes", "value_bytes"):
            check_count(name, getattr(self, name))
        if self.strategy not in GRADIENTS_PER_PRODUCT:
            msg = f"`strategy` must be one of {', '.join(GRADIENTS_PER_PRODUCT)}, got {self.strategy!r}."
            raise ValueError(msg)
        if not 0 <= self.graph_bytes < math.inf:
            msg = f"`graph_bytes` must be at least 0 and finite, got {self.graph_bytes!r}."
            raise ValueError(msg)

    @property
    def batches(self) -> int:
        """The number of batches of the busiest rank."""
        return math.ceil(math.ceil(self.samples / self.batch_size) / self.processes)

    @property
    def products(self) -> int:
        """The number of Hessian-vector products."""
        return self.probes * min(self.steps, self.parameters)

    @property
    def vector_bytes(self) -> float:
        """The size of one rank's shard of a vector."""
        return self.parameters * self.value_bytes / (self.processes if self.sharded else 1)


@dataclass(frozen=True)
class Machine:
    """The machine of an analysis.

    Attributes:
        gradient_seconds: Seconds that forward and backward pass take per sample, on one process, in batches of the size
            to be analyzed and with all processes at work.
        memory_bandwidth: Bytes per second at which a process reads its vectors.
        network_bandwidth: Bytes per second that a process sends in a reduction over all of them.
        orthogonalizations: Passes of reorthogonalization: two on an accelerator, mostly one on a CPU.
    """

    gradient_seconds: float
    memory_bandwidth: float
    network_bandwidth: float = math.inf
    orthogonalizations: int = 2

    def __post_init__(self) -> None:
        for name in ("gradient_seconds", "memory_bandwidth", "network_bandwidth", "orthogonalizations"):
            value = getattr(self, name)
            if not value > 0:
                msg = f"`{name}` must be positive, got {value!r}."
                raise ValueError(msg)


@dataclass(frozen=True)
class Cost:
    """The cost of an analysis for each rank, or for the busiest one.

    Attributes:
        gradients: Time of the HVPs and their preparation, in gradients of all samples of the rank.
        product_seconds: The same in seconds.
        recurrence_seconds: Time of the Lanczos recurrence: vectors and reorthogonalization.
        communication_seconds: Time of reductions.
        memory: Bytes beyond the module and the samples: vectors, basis, graphs, and the copy of the module's tensors.
        sent: Bytes that go over the network.
    """

    gradients: float
    product_seconds: float
    recurrence_seconds: float
    communication_seconds: float
    memory: float
    sent: float

    @property
    def seconds(self) -> float:
        """Time of the whole analysis."""
        return self.product_seconds + self.recurrence_seconds + self.communication_seconds


def analysis_cost(workload: Workload, machine: Machine) -> Cost:
    """Estimate the cost of one analysis: of one spectrum, with all its steps.

    Examples:
        >>> workload = Workload(parameters=25_000_000, samples=512, steps=60)
        >>> cost = analysis_cost(workload, Machine(gradient_seconds=1e-3, memory_bandwidth=1e12))
        >>> round(cost.seconds), round(cost.memory / 2**30, 1)
        (70, 6.6)
    """
    gradients = workload.products * GRADIENTS_PER_PRODUCT[workload.strategy] + PREPARATION[workload.strategy]
    samples = min(workload.batches * workload.batch_size, workload.samples)
    sent = _sent(workload)
    return Cost(
        gradients=gradients,
        product_seconds=gradients * samples * machine.gradient_seconds,
        recurrence_seconds=_touched(workload, machine.orthogonalizations) / machine.memory_bandwidth,
        communication_seconds=sent / machine.network_bandwidth,
        memory=_memory(workload, samples),
        sent=sent,
    )


def _touched(workload: Workload, orthogonalizations: int) -> float:
    """Return the bytes that the recurrence reads and writes."""
    steps = min(workload.steps, workload.parameters)
    # Step j reads the j basis vectors there are twice in each pass: once for the coefficients, once to subtract.
    vectors = orthogonalizations * steps * (steps + 1) if workload.basis else 0
    per_batch = BATCH_PASSES[workload.strategy] * workload.batches
    return workload.probes * (vectors + steps * (VECTOR_PASSES + per_batch)) * workload.vector_bytes


def _sent(workload: Workload) -> float:
    """Return the bytes that a rank sends: in reductions of HVPs, or in exchanges of sharded parameters."""
    share = (workload.processes - 1) / workload.processes
    whole = workload.parameters * workload.value_bytes
    if not workload.sharded:
        return workload.products * 2 * share * whole  # around a ring and back
    exchanges = workload.products * EXCHANGES[workload.strategy]
    exchanges += PREPARATION[workload.strategy] * EXCHANGES_OF_GRADIENT
    return workload.batches * exchanges * share * whole


def _memory(workload: Workload, samples: int) -> float:
    basis = workload.products if workload.basis else 0  # those of all probes
    copies = 1  # of the module's parameters
    kept = {"graph": samples, "recompute": workload.batch_size, "finite_difference": 0}[workload.strategy]
    passing = workload.batch_size  # an HVP takes about as much for one batch, beside its graph
    return (copies + VECTORS + basis) * workload.vector_bytes + (kept + passing) * workload.graph_bytes


def measured_bandwidth(rows: int = 32, columns: int = 2**21) -> float:
    """Return the bytes per second at which this CPU reads a Krylov basis, by the best of a few products with one.

    The basis, of shape (rows, columns), must not fit into a cache.
    """
    basis, vector = torch.ones(rows, columns), torch.ones(columns)
    best = min(timeit.repeat(lambda: torch.mv(basis, vector), number=1, repeat=4))
    return basis.numel() * basis.element_size() / best


def cost_lines(workload: Workload, machine: Machine) -> list[str]:
    """Return the estimate in words, a line for each quantity."""
    cost = analysis_cost(workload, machine)
    lines = [
        f"{workload.products} products, in all {cost.gradients:.0f} gradients of the samples of a process",
        f"time           {_duration(cost.seconds)}",
        f"  products     {_duration(cost.product_seconds)}",
        f"  recurrence   {_duration(cost.recurrence_seconds)} at {machine.memory_bandwidth / 1e9:.0f} GB/s",
        f"  reductions   {_duration(cost.communication_seconds)}",
        f"memory         {_size(cost.memory)} a process, beyond the module"
        + ("" if workload.graph_bytes else " and the graphs"),
        f"sent           {_size(cost.sent)} a process",
    ]
    if workload.basis:
        without = analysis_cost(replace(workload, basis=False), machine).memory
        lines.append(f"without basis  {_size(without)} a process, and no reorthogonalization")
    return lines


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _size(size: float) -> str:
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {name}"
    return f"{size:.0f} B"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--params", type=float, required=True, help="Number of parameters, such as 7e9.")
    parser.add_class_arguments(Workload, skip={"parameters"})
    parser.add_class_arguments(Machine, skip={"memory_bandwidth", "network_bandwidth"})
    parser.add_argument(
        "--memory_bandwidth", type=float | None, help="Of a device, in GB/s; default: that of this CPU, measured."
    )
    parser.add_argument("--network_bandwidth", type=float, default=100.0, help="Of a rank, in Gbit/s.")


def run(config: Namespace) -> None:
    """Print what an analysis will cost."""
    sizes = {field.name: config[field.name] for field in fields(Workload) if field.name in config}
    memory_bandwidth = measured_bandwidth() if config.memory_bandwidth is None else config.memory_bandwidth * 1e9
    machine = Machine(
        config.gradient_seconds, memory_bandwidth, config.network_bandwidth * 1e9 / 8, config.orthogonalizations
    )
    for line in cost_lines(Workload(parameters=round(config.params), **sizes), machine):
        print(line)
