"""The cost model of `lightning-hesd estimate` compared with measurements, on one to four ranks.

python -m benchmarks.cost            # a few minutes on two quiet cores
python -m benchmarks.cost --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import itertools
import math
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import networks
from benchmarks.isolation import PeakMemory
from lightning_hesd.numerics.analysis.cost_model import Machine, Workload, analysis_cost, measured_bandwidth
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.collectives import DistributedCollectives
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

EXPLANATION = """\
Predictions of `lightning-hesd estimate` and measurements: seconds of a whole analysis, its peak
memory besides network and samples (the maximum over ranks), and bytes that a rank passes to reductions, counted for a
ring as in the model. Each rank has one thread on a machine of two cores, which more than two ranks share. The times of
a gradient per sample, of reading a basis and of a reduction were measured on the same ranks at the same time, as were
the bytes of a graph per sample, which are part of the memory. Ratios are model over measurement, and medians of
{rounds} rounds.

The model overestimates the time of the perceptron on one rank, where batches are merged: the gradient was measured in
batches of 32. It underestimates analyses of 10 steps, where the comparison of loss and derivatives in float64 counts
most.
"""
HEADER = (
    *("network", "processes", "strategy", "time: ratio", "memory: ratio", "sent: ratio", "samples", "steps", "basis"),
    *("parameters", "time: model, s", "measured, s", "memory: model, MiB", "measured, MiB"),
)

BATCH = 32


@dataclass(frozen=True)
class Case:
    """One analysis."""

    network: Literal["narrow MLP", "wide MLP", "ResNet20", "GPT"]
    samples: int
    steps: int
    processes: int = 1
    strategy: Literal["graph", "recompute", "finite_difference"] = "graph"
    basis: Literal["device", "none"] = "device"


CASES = [
    Case("wide MLP", 512, 30),
    Case("wide MLP", 512, 100),
    Case("wide MLP", 512, 30, basis="none"),
    Case("wide MLP", 512, 30, strategy="recompute"),
    Case("wide MLP", 512, 30, strategy="finite_difference"),
    Case("ResNet20", 128, 10),
    Case("ResNet20", 64, 10, strategy="recompute"),
    Case("GPT", 32, 10),
    Case("wide MLP", 512, 30, processes=2),
    Case("wide MLP", 512, 30, processes=3),
    Case("wide MLP", 512, 30, processes=4),
    Case("ResNet20", 128, 10, processes=2),
    Case("ResNet20", 128, 10, processes=4),
    Case("GPT", 128, 10, processes=4),
]
QUICK = [Case("narrow MLP", 64, 5), Case("narrow MLP", 64, 5, processes=2)]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    for case in QUICK if args.quick else CASES:
        rows.append(row(case, [measured(case) for _ in range(args.rounds)]))
        print(*rows[-1], sep=", ", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cost.md").write_text(
        f"# Cost model\n\n{EXPLANATION.format(rounds=args.rounds)}\n{table}\n", encoding="utf-8"
    )


def row(case: Case, rounds: list[dict[str, float]]) -> list[str]:
    """Return the row of a case: the medians of the ratios, model over measurement, and of both."""
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}

    def ratio(key: str) -> str:
        return f"{statistics.median(each[f'model_{key}'] / each[key] for each in rounds):.2f}"

    return [
        *(case.network, str(case.processes), case.strategy),
        *(ratio("seconds"), ratio("memory"), ratio("sent") if found["sent"] else ""),
        *(str(case.samples), str(case.steps), case.basis, f"{found['parameters']:,.0f}"),
        *(f"{found[key]:.2f}" for key in ("model_seconds", "seconds")),
        *(f"{found[key] / 2**20:.0f}" for key in ("model_memory", "memory")),
    ]


def measured(case: Case) -> dict[str, float]:
    """Run a case on new ranks, and return the largest time, memory and traffic."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (case, port, Path(folder)), nprocs=case.processes)  # type: ignore[no-untyped-call]
        found = [torch.load(path) for path in sorted(Path(folder).iterdir())]
    return {key: max(each[key] for each in found) for key in found[0]}


class CountingCollectives(DistributedCollectives):
    """Collectives that count the bytes they add up, in `reduced`."""

    reduced = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""
        self.reduced += tensor.numel() * tensor.element_size()
        return super().sum(tensor)


def _measure(rank: int, case: Case, port: int, folder: Path) -> None:
    """Run one rank of a case."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=case.processes)
    module, batches, loss = _problem(case)
    own = batches[rank :: case.processes]
    options = analysis_options(steps=case.steps, strategy=case.strategy, basis=case.basis, memory_budget=2**40)
    collectives = CountingCollectives(torch.device("cpu"))
    graph_bytes = _graph_bytes(module, own, loss) if case.strategy != "finite_difference" else 0.0
    machine = _machine(module, own, loss, case.processes)
    collectives.reduced = 0
    distributed.barrier()
    memory = PeakMemory()
    started = time.perf_counter()
    analyze(module, own, loss, options, collectives=collectives, local_ranks=case.processes)
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in module.parameters())
    workload = Workload(parameters, case.samples, BATCH, case.steps, processes=case.processes, strategy=case.strategy,
                        basis=case.basis != "none", graph_bytes=graph_bytes)  # fmt: skip
    cost = analysis_cost(workload, machine)
    share = 2 * (case.processes - 1) / case.processes
    torch.save(
        {
            "parameters": float(parameters),
            "seconds": seconds,
            "model_seconds": cost.seconds,
            "memory": float(memory.growth() or math.nan),
            "model_memory": cost.memory,
            "sent": share * collectives.reduced,
            "model_sent": cost.sent,
        },
        folder / str(rank),
    )
    distributed.destroy_process_group()


def _problem(case: Case) -> tuple[nn.Module, list[WeightedBatch], Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)
    module, inputs, labels = _ingredients(case)
    data = TensorDataset(inputs, labels)
    loader: Iterable[Any] = DataLoader(data, batch_size=BATCH)
    batches = [WeightedBatch(batch, len(batch[0]), index) for index, batch in enumerate(loader)]
    return module.eval(), batches, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1].flatten())


def _ingredients(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, inputs and labels."""
    if case.network == "GPT":
        inputs, labels = torch.randint(32, (2, case.samples, 64))
        return networks.GPT(32, 64), inputs, labels
    labels = torch.randint(10, (case.samples,))
    if case.network == "ResNet20":
        return networks.resnet20(), torch.randn(case.samples, 3, 32, 32), labels
    width = 1024 if case.network == "wide MLP" else 32
    sizes = [256, width, width, width]
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 10)), torch.randn(case.samples, 256), labels


def _machine(module: nn.Module, batches: list[WeightedBatch], loss: Callable[..., Tensor], processes: int) -> Machine:
    """Measure the parameters of the model, on all ranks at the same time."""
    gradient = math.inf
    for _ in range(3):
        distributed.barrier()
        started = time.perf_counter()
        for batch in batches:
            torch.autograd.grad(loss(module, batch.data), list(module.parameters()))
        gradient = min(gradient, time.perf_counter() - started)
    distributed.barrier()
    memory = measured_bandwidth()
    network = math.inf
    if processes > 1:
        tensor = torch.zeros(sum(p.numel() for p in module.parameters()))
        times = []
        for _ in range(5):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(tensor)
            times.append(time.perf_counter() - started)
        sent = 2 * (processes - 1) / processes * tensor.numel() * tensor.element_size()
        network = sent / statistics.median(times)
    return Machine(gradient / sum(batch.weight for batch in batches), memory, network, orthogonalizations=1)


def _graph_bytes(module: nn.Module, batches: list[WeightedBatch], loss: Callable[..., Tensor]) -> float:
    """Return the bytes of graphs per sample, from an analysis of one batch."""
    cache = AnalysisCache()
    analyze(module, batches[:1], loss, analysis_options(steps=1, memory_budget=2**40), cache=cache)
    return cache.graph_bytes or math.nan  # "auto" measures it


if __name__ == "__main__":
    main()
