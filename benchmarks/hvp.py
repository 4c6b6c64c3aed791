"""The cost of one Hessian-vector product, and of a whole spectrum, in plain gradients of the same loss.

    python -m benchmarks.hvp

For each network the candidates are timed one after the other, several times over, and medians are reported: whatever
disturbs the machine then disturbs all of them.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import NETWORKS, digits
from lightning_hesd import hessian_spectrum
from lightning_hesd.guards import analysis_state
from lightning_hesd.operators import HessianOperator, WeightedBatch

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7
SAMPLES = 512
STEPS = 100


def mlp() -> nn.Module:
    """A perceptron of the digits, 26,000 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss."""
    return F.cross_entropy(module(batch[0]), batch[1])


def seconds(work: Callable[[], Any]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(name: str, network: nn.Module) -> str:
    """Return a row of the table."""
    data, _ = digits()
    batch: tuple[Tensor, Tensor] = data[:SAMPLES]
    parameters = list(network.parameters())
    size = sum(p.numel() for p in parameters)
    with analysis_state(network):
        operators = {
            strategy: HessianOperator(
                lambda item: cross_entropy(network, item.data),
                [WeightedBatch(batch, SAMPLES, 0)],
                parameters,
                strategy=strategy,
                dtype=torch.float32,
            )
            for strategy in ("graph", "recompute")
        }
        vector = torch.randn(size)
        work: dict[str, Callable[[], Any]] = {
            "gradient": operators["graph"].time_gradient,
            **{strategy: partial(operator.matvec, vector) for strategy, operator in operators.items()},
        }
        for candidate in work.values():
            candidate()  # the first call allocates
        times: dict[str, list[float]] = {key: [] for key in work}
        for _ in range(ROUNDS):
            for key, candidate in work.items():
                times[key].append(seconds(candidate))
    medians = {key: statistics.median(values) for key, values in times.items()}
    whole = hessian_spectrum(network, [batch], cross_entropy, steps=STEPS)
    ratios = [medians["graph"], medians["recompute"], whole.seconds]
    cells = " | ".join(f"{value / medians['gradient']:.2f}" for value in ratios)
    return f"| {name} | {size:,} | {cells} |"


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    networks: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, **NETWORKS}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {SAMPLES} digits in one batch, evaluation mode;"
    )
    print("costs in gradients of the same loss, medians of interleaved rounds\n")
    print(f"| network | parameters | product, graph | product, recompute | spectrum of {STEPS} steps |")
    print("|---|---|---|---|---|")
    for name, build in networks.items():
        print(measure(name, build()), flush=True)


if __name__ == "__main__":
    main()
