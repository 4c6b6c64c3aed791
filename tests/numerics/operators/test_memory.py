"""What an analysis spends its memory on, and that it keeps to what it was given."""

import functools
import gc
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators.memory import VECTORS, MemoryMeter, free_system_memory, plan_memory
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from tests import cases
from tests.programs import run_python

GIB = 2**30
CPU = torch.device("cpu")
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    4000000 kB\n"


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "expected"),
    [
        (MEMINFO, None, None, 4_096_000_000),
        (MEMINFO, "3000000000\n", "1000000000\n", 2_000_000_000),
        (MEMINFO, "9000000000\n", "1000000000\n", 4_096_000_000),
        (MEMINFO, "max\n", "1000000000\n", 4_096_000_000),
        (MEMINFO, "3000000000\n", None, 4_096_000_000),
        (MEMINFO, "1000\n", "2000\n", 0),
        (None, None, None, 4 * GIB),
        ("MemTotal: 16000000 kB\n", None, None, 4 * GIB),
        ("MemAvailable: unknown\n", None, None, 4 * GIB),
    ],
)
def test_free_memory_is_the_least_that_the_system_and_the_container_leave(meminfo, limit, used, expected, tmp_path):
    places = {"proc/meminfo": meminfo, "sys/fs/cgroup/memory.max": limit, "sys/fs/cgroup/memory.current": used}
    for place, text in places.items():
        if text is not None:
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(text)
    assert free_system_memory(tmp_path) == expected


class TestPlan:
    TENSORS = (torch.zeros(1000), torch.zeros(50))
    FIXED = 4 * 1050 + VECTORS * 4000

    def plan(self, budget: int, steps: int = 100, basis: Any = "auto") -> Any:
        return plan_memory(self.TENSORS, 4000, steps, basis=basis, device=CPU, budget=budget)

    def test_the_basis_takes_at_most_half_of_what_the_vectors_leave(self):
        exact = self.FIXED + 2 * 100 * 4000
        assert self.plan(exact).basis == "device"
        assert self.plan(exact - 2).basis == "none"

    @pytest.mark.parametrize(("basis", "share"), [("device", 400_000), ("cpu", 400_000), ("none", 0)])
    def test_graphs_get_the_rest(self, basis, share):
        plan = self.plan(10**6, basis=basis)
        assert plan.fixed == self.FIXED + share
        assert plan.graphs == 10**6 - plan.fixed
        assert plan.predicted(5000.0) == plan.fixed + 5000
        assert plan.predicted(None) is None

    def test_views_of_one_storage_are_not_small(self):
        # A copy of a view keeps what lies behind it.
        plan = plan_memory([torch.zeros(1000)[:1]], 4, 1, basis="none", device=CPU, budget=10**6)
        assert plan.fixed == 4000 + 4 * VECTORS


class TestMeter:
    def test_counts_what_is_alive_and_the_most_there_was(self):
        x = torch.zeros(1000)
        with MemoryMeter(CPU) as meter:
            y = x + 1
            z = y.mul(y)
            del y
        assert (meter.live, meter.peak) == (4000, 8000)
        del z

    def test_views_and_operations_in_place_are_free(self):
        x = torch.zeros(10, 100)
        with MemoryMeter(CPU) as meter:
            kept = [x[1:], x.T, x.view(-1), x.mul_(x)]
        assert (meter.live, meter.peak) == (0, 0)
        with MemoryMeter(CPU) as meter:
            y = x.clone()
            kept += [y[:5], y.view(-1)]
            del y
        assert meter.live == 4000  # its views still hold it

    def test_a_graph_holds_what_backward_needs(self):
        weight = torch.zeros(100, 100, requires_grad=True)
        with MemoryMeter(CPU) as meter:
            loss = (torch.ones(50, 100) @ weight).tanh().sum()
        held = meter.live
        with MemoryMeter(CPU) as meter:
            torch.autograd.grad(loss, weight)
        assert held == 2 * 50 * 100 * 4 + 4  # the input of the product, the result of tanh, and the sum
        assert meter.peak >= 2 * 50 * 100 * 4

    def test_what_was_there_before_counts_for_nothing_when_garbage_is_collected(self):
        class Ring:
            def __init__(self) -> None:
                self.itself, self.tensor = self, torch.zeros(1000)

        Ring()
        with MemoryMeter(CPU) as meter:
            kept = [Ring.__new__(Ring) for _ in range(2000)]  # enough for a collection
        assert (meter.live, gc.isenabled()) == (0, True)
        del kept

    def test_says_so_where_it_cannot_measure(self):
        with MemoryMeter(torch.device("meta")) as meter:
            torch.zeros(10)
        assert (meter.live, meter.peak) == (None, 0)
        with torch.profiler.profile(), MemoryMeter(CPU) as meter:
            torch.zeros(10)
        assert (meter.live, meter.peak) == (None, 0)


def test_a_measurement_takes_no_memory_for_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event of the profiler holds kilobytes, which would add up where an operation works in many blocks."""
    events: list[str] = []
    disable = torch.autograd._disable_profiler_legacy

    def spy() -> Any:
        found = disable()
        events.extend(event.kind() for thread in found for event in thread)
        return found

    monkeypatch.setattr(torch.autograd, "_disable_profiler_legacy", spy)
    x = torch.zeros(8)
    with MemoryMeter(CPU) as meter:
        x.add_(1)
    assert meter.live == 0
    assert {*events} <= {"mark", "memory_alloc"}
    with torch.profiler.profile() as after:
        x.add_(1)
    assert "aten::add_" in [event.key for event in after.key_averages()]  # others see them again


def test_where_a_user_or_the_loss_profiles_the_strategy_is_the_lean_one_and_never_differences():
    module, batches, loss = problem("MLP")
    with torch.profiler.profile():
        spectrum = hessian_spectrum(module, batches, loss, steps=4)
    assert spectrum.strategy == "recompute"
    assert "cannot be measured" in spectrum.strategy_reason
    assert spectrum.c_t == pytest.approx(hessian_spectrum(module, batches, loss, steps=4).c_t, rel=1e-5)

    def profiled(module: nn.Module, batch: Any) -> Tensor:
        with torch.autograd.profiler.profile():
            return loss(module, batch)

    assert hessian_spectrum(module, batches, profiled, steps=4).strategy == "recompute"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, at the first dual tensor
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.Sigmoid()])
def test_a_loss_through_function_transforms_survives(activation):
    """A dispatch mode over it has ended the process by SIGSEGV."""

    def laplacian(module: nn.Module, points: Tensor) -> Tensor:
        h = torch.func.vmap(torch.func.hessian(lambda z: module(z).sum()))(points)
        return h.diagonal(dim1=-2, dim2=-1).sum(-1).square().mean()

    net = nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 1))
    assert hessian_spectrum(net, [torch.rand(8, 2)], laplacian, steps=5).strategy == "graph"


# Budgets --------------------------------------------------------------------------------------------------------------


def attention() -> nn.Module:
    encoder = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, activation=torch.tanh, batch_first=True)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(192, 2))


def convolutions() -> nn.Module:
    blocks = [(nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()) for n in (2, 8)]
    return nn.Sequential(*itertools.chain(*blocks), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 2))


# How the module is made, and the shape of its samples.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2)), (20,)),
    "convolutions": (convolutions, (2, 8, 8)),
    "attention": (attention, (12, 16)),
}


def problem(name: str, dtype: torch.dtype = torch.float32) -> cases.Problem:
    """Return 64 samples in eight batches."""
    make, shape = MODULES[name]
    module = cases.seeded(make)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, *shape, generator=generator), torch.randn(64, 2, generator=generator)
    parts = zip(x.to(dtype).chunk(8), y.to(dtype).chunk(8), strict=True)
    return cases.Problem(module.to(dtype), list(parts), cases.squared_error)


@functools.cache
def vectors_alone(name: str, dtype: torch.dtype = torch.float32) -> int:
    with pytest.raises(ValueError, match="`memory_budget` must be at least") as caught:
        hessian_spectrum(*problem(name, dtype=dtype), memory_budget=1)
    return int(str(caught.value).split("at least ")[1].split()[0])


def test_too_little_is_refused_with_what_is_needed():
    fixed = vectors_alone("MLP")
    with pytest.raises(ValueError, match=rf"must be at least {fixed} bytes"):
        hessian_spectrum(*problem("MLP"), memory_budget=fixed - 1)
    spectrum = hessian_spectrum(*problem("MLP"), memory_budget=fixed, steps=2)
    assert (spectrum.basis, spectrum.strategy) == ("none", "finite_difference")


STEPS = 5


@pytest.mark.parametrize("name", MODULES)
class TestBudget:
    @staticmethod
    @functools.cache
    def analyze(name: str, budget: int, **options: Any) -> Spectrum:
        options = {"basis": "none", "steps": STEPS, "batch_size": None, **options}
        return hessian_spectrum(*problem(name, dtype=torch.float64), memory_budget=budget, **options)

    def test_decides_how_many_graphs_are_kept_and_no_number_depends_on_it(self, name):
        fixed = vectors_alone(name, torch.float64)
        ample = self.analyze(name, GIB)
        assert ample.strategy == "graph"
        assert "8 of 8 batches" in ample.strategy_reason
        graphs = ample.predicted_memory - fixed  # of eight batches, and a product's room
        some = self.analyze(name, fixed + graphs // 2)
        assert some.strategy == "graph"
        assert "the rest is recomputed" in some.strategy_reason
        kept = int(some.strategy_reason.split("graphs of ")[1].split()[0])
        assert 2 <= kept <= 5
        none = self.analyze(name, fixed + graphs // 9)
        assert none.strategy == "finite_difference"
        assert "there is room for" in none.strategy_reason
        for other in (some, none):
            slack = 1e-12 * ample.lambda_max + other.rounding
            np.testing.assert_allclose(other.nodes, ample.nodes, rtol=0, atol=10 * slack)
            assert other.c_t == pytest.approx(ample.c_t, rel=1e-5)

    @pytest.mark.parametrize(("share", "basis", "probes"), [(0.4, "none", 1), (0.6, "device", 3), (2.0, "device", 1)])
    def test_is_kept(self, name, share, basis, probes):
        # Of what all graphs would need: with some of them recomputed, and with none.
        ample = self.analyze(name, GIB, basis=basis, probes=probes)
        basis_vectors = 0 if basis == "none" else probes * STEPS
        vectors = vectors_alone(name, torch.float64) + basis_vectors * 8 * ample.dimension
        budget = int(vectors + share * (ample.predicted_memory - vectors))
        module, batches, loss = problem(name, dtype=torch.float64)
        options = analysis_options(memory_budget=budget, basis=basis, steps=STEPS, probes=probes, batch_size=None)
        cache = AnalysisCache()  # what is measured is known the second time
        analyze(module, weighted_batches(batches), loss, options, cache=cache)
        with MemoryMeter(CPU) as meter:
            spectrum = analyze(module, weighted_batches(batches), loss, options, cache=cache)
        assert spectrum.strategy == "graph"
        # And it is made use of.
        assert 0.2 * spectrum.predicted_memory < meter.peak <= spectrum.predicted_memory <= budget


PROGRAM = """
import sys, torch
from torch import nn
from lightning_hesd import hessian_spectrum
def peak():  # not ru_maxrss, which starts at the size of the process that started this one
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(500, 400), nn.Tanh(), nn.Linear(400, 900), nn.Tanh(), nn.Linear(900, 10))
batches = [(torch.randn(8, 500), torch.randn(8, 10)) for _ in range(2)]
loss = lambda module, batch: nn.functional.mse_loss(module(batch[0]), batch[1])
# Code is loaded and threads are started once.
hessian_spectrum(nn.Linear(500, 10), batches, loss, steps=5)
loss(module, batches[0]).backward()
module.zero_grad()
before = peak()
spectrum = hessian_spectrum(module, batches, loss, steps=20, memory_budget=int(sys.argv[1]))
print(spectrum.dimension, spectrum.predicted_memory, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_no_more_than_the_budget(tmp_path):
    budget = 150_000_000
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    dimension, predicted, grown = map(int, run_python(str(script), str(budget)).split())
    assert dimension > 550_000
    assert predicted <= budget
    assert 20 * 4 * dimension < grown <= budget  # with the basis, and so not by chance
