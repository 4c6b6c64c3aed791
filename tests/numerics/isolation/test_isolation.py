"""What one evaluation leaves behind does not reach the next: every strategy finds the spectrum of the first one."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.sample_size.sample_losses import per_sample_losses
from tests import cases
from tests.numerics.isolation.test_snapshot import after

STRATEGIES = ("graph", "recompute", "finite_difference")


def make_batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    numbers = torch.randn(count, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [tuple(batch.split([3, 2], 1)) for batch in numbers]


class Stateful(nn.Module):
    """A network with a penalty whose weight follows from its state, which goes on with every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cases.seeded(lambda: nn.Linear(3, 2)).double()

    def loss(self, batch: tuple[Tensor, Tensor], weight: Any) -> Tensor:
        outputs = torch.tanh(self.net(batch[0]))
        return F.mse_loss(outputs, batch[1]) + (weight * outputs.square().mean()) / 8


def buffer(module: Stateful, **others: Any) -> None:
    module.register_buffer("thing", torch.zeros((), dtype=torch.float64))
    vars(module).update(others)


def views(module: Stateful) -> None:
    module.register_buffer("base", torch.zeros(4, dtype=torch.float64))
    module.part, module.parts = module.base[1:3], [module.base[2:]]


def shared_with_numpy(module: Stateful) -> None:
    module.array = np.zeros(1)
    module.thing = torch.from_numpy(module.array)


def frozen(module: Stateful) -> None:
    module.teacher = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)


def attribute(make: Callable[[], Any]) -> Callable[[Stateful], None]:
    return lambda module: setattr(module, "thing", make())


# How the state is made, how it goes on and gives the weight, and what this is at the first evaluation. Objects of more
# types are in `test_snapshot.py`, restored several times in the same way.
STATES: dict[str, tuple[Callable[[Stateful], Any], Callable[[Stateful], Any], float]] = {
    "attribute": (attribute(int), lambda m: after(setattr(m, "thing", m.thing + 1), m.thing), 1),
    "new attribute": (lambda m: None, lambda m: after(setattr(m, "new", getattr(m, "new", 0) + 1), m.new), 1),
    "count": (attribute(lambda: itertools.count(1)), lambda m: next(m.thing), 1),
    "buffer": (buffer, lambda m: m.thing.add_(1).clone(), 1),
    "buffer that the graph and a tuple hold": (
        lambda m: after(buffer(m), setattr(m, "pair", (m.thing, 0))),
        lambda m: m.thing.add_(1).clone(),
        1,
    ),
    "buffer through .data": (buffer, lambda m: after(m.thing.data.add_(1), m.thing), 1),
    "buffer of new memory": (buffer, lambda m: after(setattr(m.thing, "data", m.thing + 1), m.thing), 1),
    "buffer bound anew": (buffer, lambda m: after(setattr(m, "thing", m.thing + 1), m.thing), 1),
    "views": (views, lambda m: after(m.base.add_(1), m.part[0] * m.parts[0][0]), 1),
    "shared with NumPy": (shared_with_numpy, lambda m: after(m.array.__iadd__(1), m.thing.clone()), 1),
    "frozen parameter": (frozen, lambda m: after(m.teacher.data.mul_(0.9).add_(1), m.teacher.sum()), 2),
    "large tensor through .data": (
        attribute(lambda: torch.zeros(2**15, dtype=torch.float64)),
        lambda m: after(m.thing.data.add_(1), m.thing[-1].clone()),
        1,
    ),
}


def assert_same(found: Spectrum, expected: Spectrum) -> None:
    slack = 2 * (expected.rounding + found.rounding)  # Ritz values of products that are each as accurate as stated
    np.testing.assert_allclose(found.nodes, expected.nodes, rtol=0, atol=slack)
    assert found.verified == "yes", found.verification


@pytest.mark.parametrize("kind", STATES)
def test_every_strategy_finds_the_loss_of_the_first_evaluation(kind):
    make, step, weight = STATES[kind]
    batches = make_batches()
    expected = hessian_spectrum(Stateful(), batches, lambda m, b: m.loss(b, weight), steps=4, strategy="graph")
    module = Stateful()
    make(module)
    thing, before = getattr(module, "thing", None), repr(vars(module))
    for strategy in STRATEGIES:
        found = hessian_spectrum(module, batches, lambda m, b: m.loss(b, step(m)), steps=4, strategy=strategy)
        assert_same(found, expected)
        assert repr(vars(module)) == before
        assert kind == "count" or getattr(module, "thing", None) is thing


# Training mode --------------------------------------------------------------------------------------------------------


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    return cases.seeded(make).double()


def on_two_batches_at_once(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """As adversarial losses evaluate a critic."""
    return cases.squared_error(module, batch) + module(2 * batch[0]).square().mean()


def batch_norm(**options: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 2))


class TestTrainingMode:
    def check(self, make: Any, make_expected: Any, loss: Any) -> None:
        """Compare two networks, of which the first one may keep statistics."""
        module, batches = seeded(make), make_batches(3)
        expected = hessian_spectrum(seeded(make_expected), batches, loss, steps=12, mode="train")
        before, buffers = copy.deepcopy(module.state_dict()), list(module.buffers())
        for strategy in STRATEGIES:
            assert_same(hessian_spectrum(module, batches, loss, steps=12, strategy=strategy, mode="train"), expected)
            assert all(map(torch.equal, module.state_dict().values(), before.values()))
            assert all(now is then for now, then in zip(module.buffers(), buffers, strict=True))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("scripted", [False, True])
    def test_batch_norm(self, scripted):
        make = (lambda: torch.jit.script(batch_norm())) if scripted else batch_norm
        self.check(make, lambda: batch_norm(track_running_stats=False), on_two_batches_at_once)

    def test_dropout(self):
        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 2))

        self.check(make, make, cases.squared_error)

    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
    @pytest.mark.parametrize("normalize", [parametrizations.spectral_norm, spectral_norm])
    def test_spectral_norm(self, normalize):
        """With the singular vectors that power iterations find at the weights, which count as constants."""
        loss = on_two_batches_at_once
        module = seeded(lambda: normalize(nn.Linear(3, 2)))
        weight = module.parametrizations.weight.original if hasattr(module, "parametrizations") else module.weight_orig
        twin, vectors = copy.deepcopy(module), []
        with torch.no_grad():
            for _ in range(2):
                twin(make_batches()[0][0])
                vectors.append([buffer.clone() for buffer in twin.buffers()])
        plain = nn.Linear(3, 2).double()
        plain.weight.data, plain.bias.data = weight.data.clone(), module.bias.data.clone()

        def written_out(module: nn.Linear, batch: tuple[Tensor, Tensor]) -> Tensor:
            uses = iter(vectors)

            def call(x: Tensor) -> Tensor:
                u, v = next(uses)
                return F.linear(x, module.weight / (u @ module.weight @ v), module.bias)

            return loss(call, batch)

        expected = hessian_spectrum(plain, make_batches(3), written_out, steps=30)
        # Its parameters are in another order.
        for strategy in STRATEGIES:
            found = hessian_spectrum(module, make_batches(3), loss, steps=30, strategy=strategy, mode="train")
            extremes, slack = [expected.lambda_min, expected.lambda_max], expected.rounding + found.rounding
            assert [found.lambda_min, found.lambda_max] == pytest.approx(extremes, abs=slack)
            assert found.verified == "yes", found.verification


# Surroundings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leave",
    [lambda: torch.set_grad_enabled(False), lambda: torch.set_default_dtype(torch.float16)],
    ids=["gradients off", "default type"],
)
def test_what_a_loss_switches_is_switched_back(leave):
    def loss(module: Stateful, batch: tuple[Tensor, Tensor]) -> Tensor:
        result = module.loss(batch, torch.ones(()).double())
        leave()
        return result

    batches = make_batches()
    expected = hessian_spectrum(Stateful(), batches, lambda m, b: m.loss(b, 1.0), steps=4, strategy="recompute")
    assert_same(hessian_spectrum(Stateful(), batches, loss, steps=4, strategy="recompute"), expected)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


class Data(torch.utils.data.Dataset[Any]):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked, self.tensor = 0, torch.zeros(2)

    def ask(self) -> int:
        self.asked += 1
        return self.asked + int(self.tensor.add_(1)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_objects_start_from_the_same_state_too(strategy):
    batches, data = make_batches(), Data()
    weighted = [WeightedBatch(batch, 4.0, index) for index, batch in enumerate(batches)]
    options = analysis_options(steps=4, strategy=strategy)
    expected = hessian_spectrum(Stateful(), batches, lambda m, b: m.loss(b, 2.0), steps=4)
    found = analyze(Stateful(), weighted, lambda m, b: m.loss(b, data.ask()), options, state=[{"data": data}])
    assert_same(found, expected)
    assert (data.asked, data.tensor.tolist()) == (0, [0.0, 0.0])


def test_losses_of_samples_are_those_of_first_evaluations():
    module = Stateful()
    module.calls = 0

    def loss(module: Stateful, batch: tuple[Tensor, Tensor]) -> Tensor:
        module.calls += 1
        return module.loss(batch, module.calls)  # a mean: each sample is evaluated by itself

    expected = per_sample_losses(Stateful(), make_batches(), lambda m, b: m.loss(b, 1.0))
    np.testing.assert_array_equal(per_sample_losses(module, make_batches(), loss), expected)
