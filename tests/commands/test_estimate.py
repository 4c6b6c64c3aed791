"""The cost model beside what the engine counts; times are compared by `python -m benchmarks.cost`."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hesd.commands.estimate import WIDTH, cost_lines, parameter_count
from lightning_hesd.numerics.analysis.cost_model import Machine, Workload, analysis_cost, measured_bandwidth
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from tests.cases import cross_entropy
from tests.ranks import StandIn

MACHINE = Machine(gradient_seconds=1e-3, memory_bandwidth=1e10, network_bandwidth=1e9)


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
    spectrum = analyze(module, batches, cross_entropy, options, collectives=StandIn(sum_of))
    workload = Workload(n, samples=64, batch_size=16, steps=12, probes=2, processes=4)
    assert workload.products == spectrum.matvecs
    assert Workload(7, steps=100, probes=2).products == 14  # no more steps than parameters
    ring = 2 * 3 / 4
    assert analysis_cost(workload, MACHINE).sent == pytest.approx(ring * reduced, rel=0.01)


@pytest.mark.parametrize("basis", ["device", "none"])
def test_memory_is_what_the_engine_plans(basis: Any) -> None:
    module, batches, n = problem()
    cache = AnalysisCache()
    options = analysis_options(steps=12, basis=basis, batch_size=None)
    spectrum = analyze(module, batches, cross_entropy, options, cache=cache)
    assert cache.graph_bytes
    workload = Workload(n, samples=64, batch_size=16, steps=12, basis=basis == "device", graph_bytes=cache.graph_bytes)
    # What a product takes beside the graphs is at least what a graph holds.
    assert analysis_cost(workload, MACHINE).memory == pytest.approx(spectrum.predicted_memory, rel=0.25)
    fixed = analysis_cost(Workload(n, steps=12, basis=basis == "device"), MACHINE).memory
    # Beside a copy of the module ten vectors and the basis, or eight in float64 for the comparison.
    assert fixed == (1 + 10 + 12 if basis == "device" else 1 + 2 * 8) * 4 * n


def test_memory_of_the_comparison_is_what_the_engine_plans() -> None:
    """With few samples and no basis it is the most; a later analysis of the same loss does not compare again."""
    module, batches, n = problem()
    few = [WeightedBatch(tuple(part[:2] for part in batches[0].data), 2, 0)]
    cache = AnalysisCache()
    options = analysis_options(steps=2, basis="none")
    first, later = (analyze(module, few, cross_entropy, options, cache=cache).predicted_memory for _ in range(2))
    workload = Workload(n, samples=2, batch_size=2, steps=2, basis=False, graph_bytes=cache.graph_bytes or 0.0)
    cost = analysis_cost(workload, MACHINE)
    assert first is not None
    assert cost.memory == cost.comparison_memory == pytest.approx(first, rel=0.1)
    assert later is not None
    assert later < first


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
    parts = (sharded.product_seconds, sharded.recurrence_seconds, sharded.communication_seconds)
    assert sharded.seconds == math.fsum(parts)
    # Whole batches are dealt: of five batches the busier of two processes has three.
    three, five = (analysis_cost(Workload(100, samples=s, processes=p), MACHINE) for s, p in ((96, 1), (160, 2)))
    assert five.product_seconds == three.product_seconds


def said_of(workload: Workload, device_memory: float | None = None) -> str:
    """The words of an estimate, in one line."""
    lines = cost_lines(workload, MACHINE, device_memory)
    assert max(map(len, lines)) <= WIDTH
    return " ".join(" ".join(lines).split())


def test_the_words_have_units() -> None:
    said = said_of(Workload(10**9, steps=10**4))
    assert re.search(r"time [\d.]+ d 22003 gradients of 512 samples, and vectors", said)
    assert re.search(r"products [\d.]+ h a gradient of a sample takes 1 ms", said)
    assert "memory 36.4 TiB beyond the network's 3.7 GiB" in said
    assert "basis 36.4 TiB the Krylov basis: 10000 vectors of 3.7 GiB" in said
    assert "graphs not counted: pass --graph_bytes" in said
    assert "reductions" not in said
    assert "by each process" in said_of(Workload(10**9, processes=2))


def test_evaluations_along_eigenvectors_count() -> None:
    """42 of them, at a third of a gradient each; there are no eigenvectors without a basis."""
    plain, along = Workload(10**6), Workload(10**6, loss_along_eigenvectors=True)
    assert along.gradients - plain.gradients == pytest.approx(14)
    assert replace(along, basis=False).gradients == plain.gradients
    assert "42 evaluations of the loss along eigenvectors, without derivatives, cost 14" in said_of(along)


def test_the_comparison_in_float64_may_take_most() -> None:
    """Of few samples, without a basis; sharded parameters are compared in their own precision."""
    n, graph = 10**6, 10**7
    lean = Workload(n, samples=8, batch_size=4, steps=8, strategy="recompute", basis=False, graph_bytes=graph)
    in_float64 = 2 * (4 * 4 * n + 2 * 4 * graph)
    assert analysis_cost(lean, MACHINE).memory == 4 * n + in_float64
    assert analysis_cost(replace(lean, batch_size=8), MACHINE).memory == 11 * 4 * n + 16 * graph
    assert "comparison" in said_of(lean)
    sharded = replace(lean, processes=2, sharded=True)
    assert analysis_cost(sharded, MACHINE).memory == 11 * 2 * n + 8 * graph


SEVEN_BILLION = Workload(7 * 10**9, processes=8, sharded=True)
GRAPHS = Workload(10**8, graph_bytes=1e8)


@pytest.mark.parametrize(
    ("workload", "gigabytes", "expected"),
    [
        (Workload(10**9), 480, "It fits in 480 GB: it takes 417.2 GiB with the network."),
        (SEVEN_BILLION, 80, "it takes 39.1 GiB, and fits. It also fits with `basis='cpu'`, which takes 326.0 GiB"),
        (replace(SEVEN_BILLION, basis=False), 40, "With parameters sharded over 16 processes it takes 19.6 GiB, and"),
        (GRAPHS, 80, "it takes 92.4 GiB with the network. With `strategy='recompute'` it takes 47.7"),
        (GRAPHS, 20, "With `basis='none'` and `strategy='recompute'` it takes 10.4 GiB"),
        (Workload(7 * 10**9), 0.1, "With `basis='none'` and parameters sharded over 1024 processes it takes"),
    ],
)
def test_what_fits_and_what_makes_it_fit(workload: Workload, gigabytes: float, expected: str) -> None:
    assert expected in said_of(workload, gigabytes * 1e9)


def test_numbers_of_parameters() -> None:
    numbers = {"7B": 7e9, "125m": 125e6, " 1.5e9 ": 15e8, "350K": 350_000, 10**6: 10**6, 2e6: 2e6}
    assert {text: parameter_count(text) for text in numbers} == numbers
    for text in ("7q", "", "B", "7BB", "inf"):
        with pytest.raises(ValueError, match=r"`params` must be a number of parameters, such as 7B, 125M or 2\.5e6"):
            parameter_count(text)


def test_bandwidth_is_measured() -> None:
    assert 1e8 < measured_bandwidth(rows=4, columns=2**18) < 1e13


def test_refusals() -> None:
    for made, wrong, trouble in (
        (Workload, {"parameters": 0}, "`parameters` must be a positive integer, got 0"),
        (Workload, {"parameters": 10, "strategy": "guess"}, "`strategy` must be one of graph, recompute, finite_"),
        (Workload, {"parameters": 1, "graph_bytes": math.inf}, "`graph_bytes` must be at least 0 and finite, got inf"),
        (Machine, {"gradient_seconds": 1.0, "memory_bandwidth": math.nan}, "`memory_bandwidth` must be positive"),
    ):
        with pytest.raises(ValueError, match=trouble):
            made(**wrong)
