"""The cost model: time, memory and communication of an analysis before it is run.

The model describes the engine by four numbers of the machine; `python -m benchmarks.cost` compares it with
measurements. Work that does not grow with the network is left out: eigenvalues of T, the overhead of small operations.
"""

from __future__ import annotations

import math
import timeit
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_hesd.numerics.analysis.ritz_vectors import POINTS
from lightning_hesd.numerics.operators.memory import COMPARED_SAMPLES, COMPARISON_VECTORS, DIFFERENCE_VECTORS, VECTORS
from lightning_hesd.spectra.validation import check_count

Strategy = Literal["graph", "recompute", "finite_difference"]

GRADIENTS_PER_PRODUCT: dict[Strategy, float] = {"graph": 2.2, "recompute": 3.3, "finite_difference": 2.0}
"""In whole analyses, where graphs of several batches compete for the caches. By themselves products with a graph were
measured as 1.5 (MLP), 2.1 (ResNet20) and 1.8 (ViT), see the benchmark."""

PREPARATION: dict[Strategy, float] = {"graph": 3.0, "recompute": 3.0, "finite_difference": 26.0}
"""Gradients beside the products: the loss and its graph, the choice of a difference's step, and the gradient at the end
with which products are compared."""

EVALUATION = 1 / 3
"""An evaluation of the loss without derivatives, in gradients: the forward pass alone."""

EVALUATIONS_ALONG = 2 * POINTS
"""Evaluations of the loss along two eigenvectors."""

DOUBLE = 8
"""Bytes of a number in float64."""

COPIES = 1
"""Copies of the module's parameters that an analysis makes."""

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
        loss_along_eigenvectors: Whether the loss is evaluated along the extreme eigenvectors, too: 42 evaluations.
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
    loss_along_eigenvectors: bool = False
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
    def local_samples(self) -> int:
        """The number of samples of the busiest rank."""
        return min(self.batches * self.batch_size, self.samples)

    @property
    def products(self) -> int:
        """The number of Hessian-vector products."""
        return self.probes * min(self.steps, self.parameters)

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the loss along eigenvectors, which need the basis."""
        return EVALUATIONS_ALONG if self.loss_along_eigenvectors and self.basis else 0

    @property
    def gradients(self) -> float:
        """The work of the HVPs, their preparation and further evaluations, in gradients of the same samples."""
        products = self.products * GRADIENTS_PER_PRODUCT[self.strategy]
        return products + PREPARATION[self.strategy] + self.evaluations * EVALUATION

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
        gradients: Time of the HVPs, their preparation and further evaluations, in gradients of all samples of the
            rank.
        product_seconds: The same in seconds.
        recurrence_seconds: Time of the Lanczos recurrence: vectors and reorthogonalization.
        communication_seconds: Time of reductions.
        basis_memory: Bytes of the Krylov basis.
        vector_memory: Bytes of other vectors, and of the copy of the module's tensors.
        graph_memory: Bytes of graphs, and of a product beside them.
        comparison_memory: Bytes while the loss is compared with its derivatives in float64, before there is a basis.
        sent: Bytes that go over the network.
    """

    gradients: float
    product_seconds: float
    recurrence_seconds: float
    communication_seconds: float
    basis_memory: float
    vector_memory: float
    graph_memory: float
    comparison_memory: float
    sent: float

    @property
    def memory(self) -> float:
        """Bytes beyond the module and the samples."""
        return max(self.basis_memory + self.vector_memory + self.graph_memory, self.comparison_memory)

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
    gradients, samples = workload.gradients, workload.local_samples
    sent = _sent(workload)
    return Cost(
        gradients=gradients,
        product_seconds=gradients * samples * machine.gradient_seconds,
        recurrence_seconds=_touched(workload, machine.orthogonalizations) / machine.memory_bandwidth,
        communication_seconds=sent / machine.network_bandwidth,
        basis_memory=workload.products * workload.vector_bytes if workload.basis else 0.0,  # those of all probes
        vector_memory=(COPIES + VECTORS) * workload.vector_bytes,
        graph_memory=(_kept_samples(workload) + workload.batch_size) * workload.graph_bytes,
        comparison_memory=_comparison_memory(workload),
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


def _kept_samples(workload: Workload) -> int:
    """Return the samples whose graphs exist at the same time; an HVP takes about as much for one batch beside them."""
    return {"graph": workload.local_samples, "recompute": workload.batch_size, "finite_difference": 0}[
        workload.strategy
    ]


def _comparison_memory(workload: Workload) -> float:
    kept = workload.local_samples if workload.strategy == "graph" else 0
    fine = 1 if workload.sharded else DOUBLE / workload.value_bytes  # sharded parameters stay in their precision
    few = 2 * min(COMPARED_SAMPLES, workload.batch_size) * workload.graph_bytes  # a graph, and a product
    vector = workload.vector_bytes
    compared = max(COMPARISON_VECTORS * vector + few, DIFFERENCE_VECTORS * vector)
    return COPIES * vector + kept * workload.graph_bytes + fine * compared


def measured_bandwidth(rows: int = 32, columns: int = 2**21) -> float:
    """Return the bytes per second at which this CPU reads a Krylov basis, by the best of a few products with one.

    The basis, of shape (rows, columns), must not fit into a cache.
    """
    basis, vector = torch.ones(rows, columns), torch.ones(columns)
    best = min(timeit.repeat(lambda: torch.mv(basis, vector), number=1, repeat=4))
    return basis.numel() * basis.element_size() / best
