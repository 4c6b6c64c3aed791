import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import HessianOperator, top_eigenpairs
from tests import cases

DTYPES = [torch.float64, torch.float32]


def dense(operator: HessianOperator) -> Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def second_differences(problem: cases.Problem, directions: Tensor, step: float = 3e-4) -> list[float]:
    """Second derivatives of the mean loss over all samples along directions by its values, to O(step⁴), in float64."""
    module, batches = copy.deepcopy(problem.module).double().eval(), problem.batches
    parameters = [p for p in module.parameters() if p.requires_grad]
    start = torch.cat([p.detach().flatten() for p in parameters])

    @torch.no_grad()
    def loss(point: Tensor) -> float:
        torch.nn.utils.vector_to_parameters(point, parameters)
        losses = [problem.loss_fn(module, batch).item() for batch in batches]
        return np.average(losses, weights=[len(batch[0]) for batch in batches])

    distances, factors = (-2, -1, 0, 1, 2), np.array([-1, 16, -30, 16, -1]) / (12 * step**2)  # the five-point formula
    return [factors @ [loss(start + distance * step * v) for distance in distances] for v in directions]


class TestAgainstTheTruth:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("name", "strategy"), [("frozen", "recompute"), ("tied", "auto")])
    def test_second_differences_of_the_loss_along_directions_of_one_and_two_parameters(self, name, strategy, dtype):
        found = dense(HessianOperator(*cases.make(name, dtype), strategy=strategy)).double()
        units = torch.eye(len(found), dtype=torch.float64)
        directions = torch.cat([units, units + units.roll(1, 0), units + units.roll(5, 0)])
        true = second_differences(cases.make(name), directions)
        # Differences: rounding 1e-16·loss/step² = 1e-8 at most; float32: rounding of the products.
        error = 1e-7 if dtype is torch.float64 else 1e-5
        products = ((directions @ found) * directions).sum(1)
        np.testing.assert_allclose(products, true, rtol=0, atol=4 * error * found.abs().max())

    def test_parts_add_up(self):
        """That they are the dense ones is in `operators/test_curvature.py`."""
        problem = cases.make("conv_batchnorm")
        split = {"output_fn": lambda m, b: m(b[0]), "output_loss": lambda o, b: F.mse_loss(o, b[1])}
        ggn, residual = (dense(HessianOperator(*problem, matrix=matrix, **split)) for matrix in ("ggn", "residual"))
        assert torch.linalg.eigvalsh(ggn).min() >= -1e-12 * ggn.abs().max()
        torch.testing.assert_close(ggn + residual, dense(HessianOperator(*problem)), rtol=0, atol=1e-13)

    def test_a_filter_takes_a_block_and_a_preconditioner_scales(self):
        problem = cases.make("mlp")
        whole = dense(HessianOperator(*problem))
        block = dense(HessianOperator(*problem, parameters=lambda name, _: name.startswith("0.")))
        torch.testing.assert_close(block, whole[:25, :25], rtol=0, atol=1e-15)
        diagonals = {name: torch.full_like(p, 4.0) for name, p in problem.module.named_parameters()}
        scaled = dense(HessianOperator(*problem, preconditioner=diagonals))
        torch.testing.assert_close(scaled, whole / 4, rtol=0, atol=1e-15)


def everything(module: nn.Module) -> Any:
    """Parameters, gradients, buffers, modes and random number generators."""
    parameters = list(module.parameters())
    gradients = [None if p.grad is None else p.grad.tolist() for p in parameters]
    modes = [(m.training, len(m._forward_hooks)) for m in module.modules()]
    tensors = [*parameters, *module.buffers(), torch.get_rng_state()]
    around = [p.requires_grad for p in parameters], torch.is_grad_enabled(), torch.get_default_dtype()
    return [tensor.tolist() for tensor in tensors], gradients, modes, around


class TestContext:
    @pytest.fixture
    def problem(self) -> cases.Problem:
        problem = cases.make("conv_batchnorm")
        problem.module.train()
        problem.loss_fn(problem.module, problem.batches[0]).backward()
        return problem

    def test_training_goes_on_as_if_there_had_been_none(self, problem):
        before = everything(problem.module)
        operator = HessianOperator(*problem)
        ones = torch.ones(operator.shape[0], dtype=torch.float64)
        outside = operator @ ones
        assert everything(problem.module) == before
        with operator:
            assert not problem.module.training
            assert torch.equal(operator @ ones, outside)
            with operator:  # `top_eigenpairs` enters it again
                assert torch.equal(operator @ ones, outside)
            assert not problem.module.training
            assert torch.equal(operator @ ones, outside)
        assert everything(problem.module) == before

    def test_also_after_an_exception(self, problem):
        before = everything(problem.module)
        operator = HessianOperator(*problem)
        with pytest.raises(ValueError, match="`vector` must have shape"), operator:
            operator.matvec(torch.ones(3))
        assert everything(problem.module) == before
        failing = HessianOperator(problem.module, problem.batches, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), failing:
            pass
        with pytest.raises(ZeroDivisionError):
            failing.matvec(torch.ones(failing.shape[0]))
        assert everything(problem.module) == before
        torch.testing.assert_close(operator @ torch.ones(operator.shape[0]), operator @ torch.ones(operator.shape[0]))

    def test_outside_a_product_is_of_the_parameters_of_that_moment_and_inside_graphs_are_built_once(self):
        (module, batches, loss_fn), calls = cases.make("mlp"), []
        operator = HessianOperator(module, batches, lambda m, b: calls.append(1) or loss_fn(m, b))
        ones = torch.ones(operator.shape[0], dtype=torch.float64)
        before = operator @ ones
        with torch.no_grad():
            module[0].weight.mul_(2.0)
        after = operator @ ones
        assert not torch.allclose(before, after)
        assert torch.equal(after, HessianOperator(module, batches, loss_fn) @ ones)
        with operator:
            calls.clear()
            operator.matmat(torch.eye(operator.shape[0]))
        assert not calls

    @pytest.mark.parametrize("strategy", ["graph", "finite_difference"])
    def test_random_vectors_drawn_between_products_are_the_users(self, strategy):
        operator = HessianOperator(*cases.make("mlp"), strategy=strategy)
        n = operator.shape[0]
        expected = cases.seeded(lambda: [torch.randn(n).tolist() for _ in range(3)], 5)
        torch.manual_seed(5)
        drawn = []
        with operator:
            for _ in range(2):
                drawn.append(torch.randn(n))
                operator.matvec(drawn[-1])
        drawn.append(torch.randn(n))
        assert [vector.tolist() for vector in drawn] == expected

    @pytest.mark.parametrize(("context", "strategy"), [(torch.no_grad, "graph"), (torch.inference_mode, "recompute")])
    def test_without_gradients_around_it(self, context, strategy):
        operator = HessianOperator(*cases.make("mlp"), strategy=strategy)
        ones = torch.ones(operator.shape[0])
        expected = operator @ ones
        with operator, context():
            assert torch.equal(operator @ ones, expected)

    def test_tells_what_it_found(self):
        problem = cases.make("mlp")
        operator = HessianOperator(*problem)
        assert operator.loss is operator.verified is operator.strategy is None
        operator.matvec(torch.zeros(operator.shape[0]))
        sizes = [len(batch[0]) for batch in problem.batches]
        losses = [problem.loss_fn(problem.module, batch).item() for batch in problem.batches]
        assert operator.loss == pytest.approx(np.average(losses, weights=sizes), rel=1e-12)
        assert (operator.verified, operator.strategy) == ("yes", "graph")
        assert "batches hold" in operator.strategy_reason


class TestProducts:
    def test_of_columns_from_both_sides_in_the_dtype_of_the_operator(self):
        operator = HessianOperator(*cases.make("mlp", torch.float32), dtype=torch.float64)
        vectors = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(0))
        with operator:
            columns = operator.matmat(vectors)
            assert columns.dtype is torch.float64
            assert torch.equal(columns[:, 1], operator.matvec(vectors[:, 1]))
            assert torch.equal(operator @ vectors, columns)
            assert torch.equal(vectors.T @ operator, columns.T)
            assert torch.equal(vectors[:, 1] @ operator, columns[:, 1])

    @pytest.mark.parametrize(
        ("vector", "message"),
        [
            (torch.ones(3), r"`vector` must have shape \(43,\), got \(3,\)"),
            (torch.ones(43, 1), r"`vector` must have shape \(43,\), got \(43, 1\); `matmat` takes columns"),
            (torch.full((43,), torch.nan), "`vector` must be finite"),
        ],
    )
    def test_of_other_vectors_are_refused(self, vector, message):
        operator = HessianOperator(*cases.make("mlp"))
        with pytest.raises(ValueError, match=message):
            operator.matvec(vector)
        with pytest.raises(ValueError, match=message.partition(";")[0]):
            operator.losses_along(vector, [0.0])

    def test_that_are_not_finite_name_the_batch_and_those_of_numpy_arrays_are_a_type_error(self):
        module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(module.weight)
        operator = HessianOperator(module, [torch.ones(1, 1).double()] * 2, lambda m, b: m(b).pow(2).sum().pow(0.75))
        with pytest.raises(ArithmeticError, match="batch 0"):
            operator.matvec(torch.ones(1))
        for product in (lambda: operator @ np.ones(1), lambda: np.ones(1) @ operator):
            with pytest.raises(TypeError, match="HessianOperator"):
                product()


class TestOtherLibraries:
    @pytest.fixture
    def operator(self) -> HessianOperator:
        return HessianOperator(*cases.make("mlp", torch.float32))

    def test_scipy(self, operator):
        linalg = pytest.importorskip("scipy.sparse.linalg")
        true = np.linalg.eigvalsh(dense(operator).double())
        with operator:
            wrapped = operator.to_scipy()
            assert isinstance(wrapped, linalg.LinearOperator)
            values = linalg.eigsh(wrapped, k=3, which="LA", return_eigenvectors=False)
            product = wrapped @ np.eye(operator.shape[0], 2)
        tolerance = 32 * torch.finfo(operator.dtype).eps * np.abs(true).max()
        np.testing.assert_allclose(np.sort(values), true[-3:], rtol=0, atol=tolerance)
        np.testing.assert_allclose(product, dense(operator)[:, :2], rtol=0, atol=tolerance)
        assert product.dtype == values.dtype == np.float32

    def test_without_scipy(self, operator, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
        with pytest.raises(ImportError, match="`to_scipy` needs SciPy, which is not installed: pip install scipy"):
            operator.to_scipy()

    def test_top_eigenpairs(self, operator):
        true = np.linalg.eigvalsh(dense(operator).double())
        values, vectors, residuals = top_eigenpairs(operator, 2, which="both")
        tolerance = 32 * torch.finfo(operator.dtype).eps * np.abs(true).max()
        np.testing.assert_allclose(values, true[[0, 1, -2, -1]], rtol=0, atol=tolerance)
        remainders = operator @ vectors - vectors * values
        np.testing.assert_allclose(torch.linalg.vector_norm(remainders, dim=0), residuals, rtol=1e-2, atol=tolerance)

    def test_curvlinops(self, operator):
        curvlinops = pytest.importorskip("curvlinops")
        torch.manual_seed(0)
        with operator:
            found = curvlinops.hutchinson_trace(operator, num_matvecs=40)
        true = dense(operator).double()
        deviation = float((2 * true.square().sum()).sqrt()) / 40**0.5
        assert abs(float(found) - float(true.trace())) < 5 * deviation

    def test_skerch(self, operator):
        algorithms = pytest.importorskip("skerch.algorithms")
        with operator:
            values, _ = algorithms.seigh(operator, torch.device("cpu"), operator.dtype, operator.shape[0], seed=1)
        true = np.linalg.eigvalsh(dense(operator).double())
        assert np.abs(np.asarray(values)).max() == pytest.approx(np.abs(true).max(), rel=1e-3)


def test_steps_of_an_optimizer_inside_the_context_are_refused():
    module, data = nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))
    optimizer, operator = torch.optim.SGD(module.parameters(), lr=0.1), HessianOperator(module, [data], quartic)
    vector = torch.ones(3)
    with operator:
        before = operator @ vector
        F.mse_loss(module(data[0]), data[1]).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"changed inside the context .*: leave the context, which puts"):
            operator @ vector
    assert torch.equal(operator @ vector, before)


def quartic(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module(batch[0]).pow(4).mean()


def test_losses_along_a_direction_are_those_of_moved_weights():
    problem = cases.make("conv_batchnorm")
    operator = HessianOperator(*problem)
    direction = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(problem.module.state_dict())
    moved = copy.deepcopy(problem.module).eval()
    start = torch.nn.utils.parameters_to_vector(moved.parameters()).detach()
    expected = []
    for distance in (-0.3, 0.0, 1.0):
        torch.nn.utils.vector_to_parameters(start + distance * direction, moved.parameters())
        losses = [problem.loss_fn(moved, batch).item() for batch in problem.batches]
        expected.append(np.average(losses, weights=[len(batch[0]) for batch in problem.batches]))
    assert operator.losses_along(direction, [-0.3, 0.0, 1.0]) == pytest.approx(expected, rel=1e-12)
    assert all(map(torch.equal, before.values(), problem.module.state_dict().values()))
