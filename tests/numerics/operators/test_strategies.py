"""How products are computed: every strategy against dense Hessians, and what "auto" does with losses that resist."""

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from tests import cases, oracles

DTYPES = (torch.float64, torch.float32)


def assert_within_stated_errors(spectrum: Spectrum, true: np.ndarray) -> None:
    """The run went on until the extremes had converged: nothing but rounding and product errors is left."""
    oracle = 16 * np.finfo(np.float64).eps * np.abs(true).max()  # the dense Hessian is rounded as well
    assert true[0] < -100 * spectrum.rounding
    assert abs(spectrum.lambda_min - true[0]) <= spectrum.lambda_min_error + oracle
    assert abs(spectrum.lambda_max - true[-1]) <= spectrum.lambda_max_error + oracle
    low, high = spectrum.c_t_interval
    assert low - 2 * oracle / true[-1] <= true[0] / true[-1] <= high + 2 * oracle / true[-1]
    # And these errors are small enough to mean something.
    assert max(spectrum.lambda_min_error, spectrum.lambda_max_error) <= 2e-2 * np.abs(true).max()


# Graphs of all problems are in `analysis/test_exactness.py`.
CASES = [
    *((name, {"strategy": "finite_difference"}, dtype) for name in cases.NAMES for dtype in DTYPES),
    *((name, {"strategy": "recompute"}, torch.float32) for name in cases.NAMES),
    *((name, {"basis": basis}, dtype) for basis in ("cpu", "none") for name in ("mlp", "tied") for dtype in DTYPES),
]


@pytest.mark.parametrize(
    ("name", "options", "dtype"), CASES, ids=lambda v: "-".join(*v.items()) if isinstance(v, dict) else str(v)
)
def test_every_strategy_and_basis_is_within_its_stated_errors(name, options, dtype):
    spectrum = hessian_spectrum(*cases.make(name, dtype), steps=36, **options)
    strategy, basis = (options.get(key, "auto") for key in ("strategy", "basis"))
    assert spectrum.strategy == ("graph" if strategy == "auto" else strategy)
    assert spectrum.basis == ("device" if basis == "auto" else basis)
    assert spectrum.reorthogonalized == (basis != "none")
    assert_within_stated_errors(spectrum, oracles.case_eigenvalues(name))


class TestFiniteDifferences:
    def test_state_their_own_error(self):
        exact, differences = (
            hessian_spectrum(*cases.make("mlp"), strategy=strategy) for strategy in ("graph", "finite_difference")
        )
        # Gradients of 16 digits leave about 10 in their difference, where no more than 5 would be a bad step.
        assert exact.rounding < differences.rounding < 1e-5 * exact.lambda_max
        assert differences.matvecs > exact.matvecs  # those that found the step count

    def test_a_known_step_is_not_searched_again_from_scratch(self):
        module, batches, loss_fn = cases.make("mlp")
        weighted = weighted_batches(batches)
        cache, options = AnalysisCache(), analysis_options(strategy="finite_difference", steps=20)
        first = analyze(module, weighted, loss_fn, options, cache=cache)
        assert cache.step is not None
        again = analyze(module, weighted, loss_fn, options, cache=cache)
        assert again.matvecs < first.matvecs
        assert again.rounding <= 10 * first.rounding

    @pytest.mark.parametrize("failing_call", [None, 2, 5, 25])
    def test_parameters_are_put_back_bit_by_bit(self, failing_call):
        module, batches, loss_fn = cases.make("mlp", torch.float32)
        before = [p.detach().clone() for p in module.parameters()]
        calls = 0

        def loss(module: nn.Module, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if failing_call is not None and calls >= failing_call:
                raise KeyError("label")
            return loss_fn(module, batch)

        with contextlib.nullcontext() if failing_call is None else pytest.raises(KeyError, match="label"):
            hessian_spectrum(module, batches, loss, steps=8, strategy="finite_difference", batch_size=None)
        assert calls >= (failing_call or 50)
        for p, original in zip(module.parameters(), before, strict=True):
            assert torch.equal(p, original)
            assert p.grad is None


# Losses that "auto" must find a way with ------------------------------------------------------------------------------


def data(*shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    shapes = [((size, *shape), (size, 2)) for size in (5, 3)]
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in pair) for pair in shapes]


def perceptron(activation: nn.Module) -> nn.Module:
    return cases.seeded(lambda: nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))).double()


class TestFallback:
    def test_goes_on_with_differences_and_says_why(self):
        module, plain = (
            perceptron(cases.Applied(lambda x, f=function: f(x) ** 3))
            for function in (cases.OnceDifferentiable.apply, torch.clone)
        )
        spectrum = hessian_spectrum(module, data(3), cases.squared_error)
        assert spectrum.strategy == "finite_difference"
        assert spectrum.strategy_reason.startswith("auto: ")
        assert "once_differentiable" in spectrum.strategy_reason
        assert_within_stated_errors(spectrum, oracles.eigenvalues(plain, data(3), cases.squared_error))

    @pytest.mark.parametrize("operation", ["cdist", "embedding_bag"])
    def test_goes_on_where_only_the_product_fails(self, operation):
        """The graph of these can be built; differentiating it fails."""
        torch.manual_seed(0)
        module, x = nn.Linear(4, 8), torch.randn(8, 4)

        def loss(module: nn.Module, batch: Tensor) -> Tensor:
            y = torch.tanh(module(batch))
            if operation == "cdist":
                return torch.cdist(y, y + batch.sum(1, keepdim=True)).sum()
            return F.embedding_bag(torch.arange(4).reshape(2, 2), y[:4]).square().sum()

        spectrum = hessian_spectrum(module, [x], loss, steps=5)
        assert spectrum.strategy == "finite_difference"
        assert "not implemented" in spectrum.strategy_reason

    @pytest.mark.parametrize("error", [KeyError, RuntimeError, ValueError, NotImplementedError])
    @pytest.mark.parametrize("failing_call", [1, 2])
    def test_a_loss_that_fails_is_no_reason(self, error, failing_call):
        calls, cache = itertools.count(1), AnalysisCache()

        def loss(module: nn.Module, batch: Any) -> Tensor:
            if next(calls) >= failing_call:
                raise error("the loss's own trouble")
            return cases.squared_error(module, batch)

        with pytest.raises(error, match="the loss's own trouble"):
            analyze(perceptron(nn.Tanh()), weighted_batches(data(3)), loss, analysis_options(steps=5), cache=cache)
        assert cache.inexact_reason is None  # or the next analysis would be by differences


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return nn.Sequential(encoder, cases.Applied(lambda x: x.mean(dim=1)), nn.Linear(4, 2))


def recurrent() -> nn.Module:
    return nn.Sequential(nn.LSTM(4, 3, batch_first=True), cases.Applied(lambda x: x[0][:, -1]), nn.Linear(3, 2))


class TestStaysExact:
    @pytest.mark.parametrize("make", [encoder, recurrent])
    def test_with_modules_that_have_a_second_derivative(self, make):
        module, batches = cases.seeded(make).double(), data(3, 4)
        spectrum = hessian_spectrum(module, batches, cases.squared_error, steps=200)
        assert spectrum.strategy == "graph"
        true = oracles.eigenvalues(module.eval(), batches, cases.squared_error)
        assert spectrum.lambda_min == pytest.approx(true[0], rel=0, abs=1e-9 * true[-1])
        assert spectrum.lambda_max == pytest.approx(true[-1], rel=1e-9)

    def test_with_compiled_modules_which_still_work_afterwards(self):
        module = perceptron(nn.Tanh())
        true = oracles.eigenvalues(module, data(3), cases.squared_error)
        compiled = torch.compile(module, backend="aot_eager")  # whose code has no second derivative
        expected = compiled(data(3)[0][0]).detach()
        spectrum = hessian_spectrum(compiled, data(3), cases.squared_error)
        assert spectrum.strategy == "graph"
        assert_within_stated_errors(spectrum, true)
        torch.testing.assert_close(compiled(data(3)[0][0]), expected, rtol=0, atol=1e-14)
        cases.squared_error(compiled, data(3)[0]).backward()
        assert all(p.grad is not None for p in module.parameters())
