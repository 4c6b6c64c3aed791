"""The cost model beside what the engine counts; times are compared by `python -m benchmarks.cost`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.commands.estimate import Machine, Workload, analysis_cost, cost_lines, measured_bandwidth
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from tests.ranks import StandIn

MACHINE = Machine(gradient_seconds=1e-3, memory_bandwidth=1e10, network_bandwidth=1e9)


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def problem() -> tuple[nn.Module, list[WeightedBatch], int]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))
    batches = [WeightedBatch((torch.randn(16, 32), torch.randint(10, (16,))), 16, i) for i in range(4)]
    return module, batches, sum(p.numel() for p in module.parameters())


def test_traffic_is_what_the_engine_reduces() -> None:
    module, batches, n = problem()
    reduced = 0

    def sum_of(tensor: Tensor) -> Tensor:
        nonlocal reduced
        reduced += tensor.numel() * tensor.element_size()
        return tensor

    options = analysis_options(steps=12, probes=2, strategy="graph")
    spectrum = analyze(module, batches, loss, options, collectives=StandIn(sum_of))
    workload = Workload(n, samples=64, batch_size=16, steps=12, probes=2, processes=4)
    assert workload.products == spectrum.matvecs
    ring = 2 * 3 / 4
    assert analysis_cost(workload, MACHINE).sent == pytest.approx(ring * reduced, rel=0.01)


@pytest.mark.parametrize("basis", ["device", "none"])
def test_memory_is_what_the_engine_plans(basis: Any) -> None:
    module, batches, n = problem()
    cache = AnalysisCache()
    options = analysis_options(steps=12, basis=basis, batch_size=None)
    spectrum = analyze(module, batches, loss, options, cache=cache)
    assert cache.graph_bytes
    workload = Workload(n, samples=64, batch_size=16, steps=12, basis=basis == "device", graph_bytes=cache.graph_bytes)
    # What a product takes beside the graphs is at least what a graph holds.
    assert analysis_cost(workload, MACHINE).memory == pytest.approx(spectrum.predicted_memory, rel=0.25)
    fixed = analysis_cost(Workload(n, steps=12, basis=basis == "device"), MACHINE).memory
    assert fixed == (11 + (12 if basis == "device" else 0)) * 4 * n


def test_what_processes_share() -> None:
    """Half as many samples in each of two processes; sharded, half the vectors, too."""
    alone, two = (analysis_cost(Workload(10**6, processes=processes), MACHINE) for processes in (1, 2))
    assert two.product_seconds == alone.product_seconds / 2
    assert two.memory == alone.memory
    assert alone.sent == alone.communication_seconds == 0
    assert two.communication_seconds == two.sent / 1e9
    sharded = analysis_cost(Workload(10**6, processes=2, sharded=True), MACHINE)
    assert sharded.memory == two.memory / 2
    assert sharded.sent > two.sent
    assert sharded.seconds == math.fsum(
        [sharded.product_seconds, sharded.recurrence_seconds, sharded.communication_seconds]
    )


def test_whole_batches_are_dealt() -> None:
    """Of five batches the busier of two processes has three."""
    three, five = (analysis_cost(Workload(100, samples=s, processes=p), MACHINE) for s, p in ((96, 1), (160, 2)))
    assert five.product_seconds == three.product_seconds


def test_no_more_steps_than_parameters() -> None:
    assert Workload(7, steps=100, probes=2).products == 14


def test_the_words_have_units() -> None:
    said = {line[:15].strip(): line[15:] for line in cost_lines(Workload(10**9, steps=10**4), MACHINE)}
    assert said["time"].endswith(" d")
    assert said["products"].endswith(" h")
    assert said["reductions"] == "0 s"
    assert said["memory"] == "36.4 TiB a process, beyond the module and the graphs"
    assert said["sent"] == "0 B a process"


def test_bandwidth_is_measured() -> None:
    assert 1e8 < measured_bandwidth(rows=4, columns=2**18) < 1e13


@pytest.mark.parametrize(
    ("made", "wrong", "trouble"),
    [
        (Workload, {"parameters": 0}, "`parameters` must be a positive integer, got 0"),
        (Workload, {"parameters": 10, "strategy": "guess"}, "`strategy` must be one of graph, recompute, finite_"),
        (Workload, {"parameters": 10, "graph_bytes": math.inf}, "`graph_bytes` must be at least 0 and finite, got inf"),
        (Machine, {"gradient_seconds": 1.0, "memory_bandwidth": math.nan}, "`memory_bandwidth` must be positive, got"),
    ],
)
def test_refusals(made: Any, wrong: dict[str, Any], trouble: str) -> None:
    with pytest.raises(ValueError, match=trouble):
        made(**wrong)
