"""Analyses of transformers with 25 and 120 million parameters: time, and peak memory beside what was planned.

python -m benchmarks.scale            # about half an hour on one quiet core, and 12 GiB of memory
python -m benchmarks.scale --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from benchmarks import networks
from benchmarks.isolation import PeakMemory, in_fresh_process
from lightning_hesd import HessianOperator
from lightning_hesd.numerics.analysis.cost_model import Machine, Workload, analysis_cost
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPLANATION = """\
Transformer language models with random weights and random tokens, {steps} Lanczos steps, samples in two batches, one
thread, each analysis in a process of its own. Times are CPU times. "auto" decides by the free memory.

- product: the median over the steps, Lanczos recurrence included, in gradients of the same samples
- plan: `Spectrum.predicted_memory`, the memory beyond the module and the samples
- estimate: what `lightning-hesd estimate` says, given the measured memory of graphs
- measured: growth of the process's resident memory up to its peak
- first step: the peak up to the end of the first step, with the comparison of the loss with its derivatives in float64
- later: the peak of the other steps

The plan errs on the side of too much: it has room for ten vectors beside the Krylov basis, of which exact products take
seven or eight, and counts a recomputed graph as a whole, which is freed while it is differentiated. Both weigh little
beside a basis of 100 vectors. On the CPU the bases "device" and "cpu" are in the same place.
"""
HEADER = (
    *("network", "parameters", "samples × tokens", "strategy", "basis", "product, in gradients", "gradient, s"),
    *("plan, MiB", "estimate, MiB", "measured, MiB", "measured / plan", "first step, MiB", "later, MiB"),
    *("λ_max", "λ_min", "analysis, CPU s"),
)

STEPS = 8
BATCHES = 2
UNLIMITED = 2**40


@dataclass(frozen=True)
class Network:
    """A transformer, and the samples that it is analyzed on.

    Attributes:
        tokens: Size of the vocabulary.
        context: Tokens of a sample.
        width: Features of a token.
        depth: Number of blocks.
        samples: Number of samples.
    """

    tokens: int
    context: int
    width: int
    depth: int
    samples: int

    def build(self) -> tuple[nn.Module, list[WeightedBatch]]:
        """Return the module and its batches, the same at every call."""
        torch.manual_seed(0)
        module = networks.GPT(self.tokens, self.context, self.width, self.depth, heads=self.width // 64)
        inputs, labels = torch.randint(self.tokens, (2, self.samples, self.context))
        pieces = zip(inputs.chunk(BATCHES), labels.chunk(BATCHES), strict=True)
        return module.eval(), [WeightedBatch(piece, len(piece[0]), index) for index, piece in enumerate(pieces)]

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        return self.samples // BATCHES


NETWORKS = {
    "tiny": Network(50, 16, 64, 2, samples=4),
    "25M": Network(6_000, 128, 512, 6, samples=4),
    "120M": Network(23_000, 32, 768, 12, samples=2),
}


@dataclass(frozen=True)
class Case:
    """One analysis; with the basis "auto" the memory plan decides all."""

    network: str
    strategy: Literal["graph", "recompute", "auto"]
    basis: Literal["device", "none", "auto"]


def cases(name: str) -> list[Case]:
    """Return the analyses of a network."""
    return [
        Case(name, "graph", "device"),
        Case(name, "graph", "none"),
        Case(name, "recompute", "device"),
        Case(name, "recompute", "none"),
        Case(name, "auto", "auto"),
    ]


def loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(module(batch[0]), batch[1].flatten())


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["25M", "120M"], choices=NETWORKS)
    parser.add_argument("--quick", action="store_true", help="a tiny network, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows, errors = [], []
    for name in ["tiny"] if args.quick else args.networks:
        graphs = in_fresh_process(memory_of_graphs, name)
        for case in cases(name):
            rows.append(row(case, in_fresh_process(measure, case, graphs)))
            print(*rows[-1], sep=", ", flush=True)
        errors.append(f"- {name}: a product differs from that in float64 by {in_fresh_process(product_error, name):.1g}"
                      " of its norm")  # fmt: skip
        print(errors[-1], flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows))
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["# Scale", "", EXPLANATION.format(steps=STEPS), table, "", *errors, ""])
    (args.out / "scale.md").write_text(text, encoding="utf-8")


def row(case: Case, found: dict[str, Any]) -> list[str]:
    """Return the row of an analysis."""
    network = NETWORKS[case.network]
    strategy, basis = found["strategy"], found["basis"]
    if case.strategy == "auto":
        strategy, basis = f"auto: {strategy}", f"auto: {basis}"
    return [
        *(case.network, f"{found['parameters']:,}", f"{network.samples} × {network.context}", strategy, basis),
        *(f"{found['product'] / found['gradient']:.2f}", f"{found['gradient']:.2f}"),
        *(f"{found[key] / 2**20:.0f}" for key in ("plan", "estimate", "peak")),
        f"{found['peak'] / found['plan']:.2f}",
        *(f"{found[key] / 2**20:.0f}" for key in ("first_peak", "later_peak")),
        *(f"{found['lambda_max']:.6g}", f"{found['lambda_min']:.6g}", f"{found['seconds']:.0f}"),
    ]


def memory_of_graphs(name: str) -> tuple[float, float]:
    """Return the bytes per sample of a gradient's graph, and of a product beside it."""
    module, batches = NETWORKS[name].build()
    cache = AnalysisCache()
    analyze(module, batches[:1], loss, analysis_options(steps=1, memory_budget=UNLIMITED), cache=cache)
    if cache.graph_bytes is None:
        msg = "the memory of graphs could not be measured: another profiler is running."
        raise RuntimeError(msg)
    return cache.graph_bytes, cache.product_bytes


def measure(case: Case, graphs: tuple[float, float]) -> dict[str, Any]:
    """Run an analysis in this process, and return its times, its memory and its eigenvalues."""
    torch.set_num_threads(1)
    memory_of_graphs("tiny")  # what code takes when it runs for the first time, about 90 MiB, is no part of the plan
    network = NETWORKS[case.network]
    module, batches = network.build()
    size = sum(p.numel() for p in module.parameters())
    gradient = min(_gradient_seconds(module, batches) for _ in range(3))
    peaks = Peaks()
    started = time.process_time()
    spectrum = analyze(
        module, batches, loss,
        analysis_options(steps=STEPS, basis=case.basis, memory_budget=_budget(case, size, graphs)),
        report=peaks.step,
    )  # fmt: skip
    seconds = time.process_time() - started
    workload = Workload(
        size, network.samples, network.batch_size, STEPS,
        strategy="graph" if spectrum.strategy == "graph" else "recompute",
        basis=spectrum.basis != "none",
        graph_bytes=graphs[0],
    )  # fmt: skip
    later = peaks.memory.growth()
    if peaks.first is None or later is None:
        msg = "the peak of a process's memory is known on Linux only."
        raise RuntimeError(msg)
    return {
        "parameters": size,
        "strategy": spectrum.strategy,
        "basis": spectrum.basis,
        "gradient": gradient,
        "product": statistics.median(peaks.seconds()),
        "plan": spectrum.predicted_memory,
        "estimate": analysis_cost(workload, Machine(1.0, 1.0)).memory,
        "first_peak": peaks.first,
        "later_peak": later,
        "peak": max(peaks.first, later),
        "lambda_max": spectrum.lambda_max,
        "lambda_min": spectrum.lambda_min,
        "seconds": seconds,
    }


def _budget(case: Case, size: int, graphs: tuple[float, float]) -> int | None:
    """Return the memory budget with which the strategy "auto" does what the case asks for."""
    if case.strategy == "auto":
        return None
    if case.strategy == "graph":
        return UNLIMITED
    vectors = analysis_cost(Workload(size, steps=STEPS, basis=case.basis != "none"), Machine(1.0, 1.0))
    fixed = vectors.vector_memory + vectors.basis_memory
    return math.ceil(fixed + NETWORKS[case.network].batch_size * sum(graphs))


class Peaks:
    """CPU times of the Lanczos steps of an analysis, and the memory before and after the first one.

    Attributes:
        memory: Memory since construction.
        first: Peak up to the end of the first step, in bytes.
    """

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.first: int | None = None
        self._times: list[float] = []

    def step(self, _done: int, _total: int) -> None:
        """Note the time after a step, and after the first one the memory."""
        if self.first is None:
            self.first = self.memory.growth()
            self.memory.restart()
        self._times.append(time.process_time())

    def seconds(self) -> list[float]:
        """Return the seconds of all steps but the first."""
        return [after - before for before, after in zip(self._times[:-1], self._times[1:], strict=True)]


def _gradient_seconds(module: nn.Module, batches: list[WeightedBatch]) -> float:
    started = time.process_time()
    for batch in batches:
        torch.autograd.grad(loss(module, batch.data), list(module.parameters()))
    return time.process_time() - started


def product_error(name: str) -> float:
    """Return ‖Hv − H₆₄v‖ / ‖H₆₄v‖ of a product and of one by plain double differentiation in float64."""
    torch.set_num_threads(1)
    module, batches = NETWORKS[name].build()
    batch = batches[0].data
    vector = torch.randn(sum(p.numel() for p in module.parameters()))
    operator = HessianOperator(module, [batch], loss, strategy="recompute")
    product = torch.as_tensor(operator.matvec(vector))
    module.double()
    parameters = list(module.parameters())
    directions = torch.split(vector.double(), [p.numel() for p in parameters])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(module, batch), parameters, create_graph=True)
        slope = sum((g.flatten() @ v for g, v in zip(gradients, directions, strict=True)), torch.zeros(()).double())
        exact = torch.cat([part.flatten() for part in torch.autograd.grad(slope, parameters)])
    return float((product - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
