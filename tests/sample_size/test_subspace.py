"""Stabilization in the dominant subspace: by definition, in closed form, and where the quadratic model ends."""

import contextlib
import copy
import functools
import io
import itertools
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.sample_size.directions import dominant_directions
from lightning_hesd.sample_size.increments import increments
from lightning_hesd.sample_size.sample_losses import per_sample_losses
from lightning_hesd.sample_size.subspace import SubspaceStabilization, subspace_stabilization
from tests import cases, oracles
from tests.sample_size.test_sample_losses import each

Batch = tuple[Tensor, ...]


def orthonormal(n: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    normal = torch.randn(n, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(normal)[0].to(dtype)


class Quadratic:
    """ℓ_i(w) = c_i + g_iᵀ(w − w_0) + ½(w − w_0)ᵀH_i(w − w_0), of which everything is known."""

    def __init__(self, samples: int, n: int = 5, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        c, g, h = (torch.randn(samples, *shape, generator=generator).to(dtype) for shape in ((), (n,), (n, n)))
        self.batch = (c, g, h + h.mT)
        self.module = nn.Module()
        self.module.register_parameter("w", nn.Parameter(torch.randn(n, generator=generator).to(dtype)))
        self.origin = self.module.w.detach().clone()

    def loss_fn(self, module: nn.Module, batch: Batch) -> Tensor:
        c, g, h = batch
        step = module.w - self.origin
        return c + g @ step + h @ step @ step / 2

    def batches(self, size: int) -> list[Batch]:
        return list(zip(*(part.split(size) for part in self.batch), strict=True))

    def increments(self, directions: Tensor, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a (), b (D,) and A (D, D) of the subspace for every k, by differences of means in this order."""
        found = []
        c, g, h = (part.double() for part in self.batch)
        u = directions.double()
        for values in (c, g @ u, u.T @ h @ u):
            means = [values[order[:k]].mean(dim=0) for k in range(1, len(order) + 1)]
            found.append(np.diff(torch.stack(means).numpy(), axis=0))
        return tuple(found)


def formula(a: np.ndarray, b: np.ndarray, curvature: np.ndarray, sigma: float) -> np.ndarray:
    """As the paper has it, before any square is completed."""
    trace = np.trace(curvature, axis1=1, axis2=2)
    frobenius = (curvature**2).sum(axis=(1, 2))
    return a**2 + sigma**2 * (b**2).sum(axis=1) + a * sigma**2 * trace + sigma**4 / 4 * (2 * frobenius + trace**2)


def orders_of(samples: int, orders: int, seed: int) -> list[np.ndarray]:
    """The random orders behind increments, read off those of unit vectors: sample v is new where they are positive."""
    found = []
    for change in increments(np.eye(samples), orders, seed):
        newest = change.argmax(axis=1)
        first = np.setdiff1d(np.arange(samples), newest)
        found.append(np.concatenate([first, newest]))
    return found


class TestQuadraticLoss:
    @pytest.mark.parametrize(
        ("sigma", "dtype", "tolerance"),
        [(0.01, torch.float64, 1e-11), (3.0, torch.float64, 1e-11), (0.5, torch.float32, 1e-4)],
    )
    def test_the_closed_form_is_the_formula_in_the_same_orders(
        self, sigma: float, dtype: torch.dtype, tolerance: float
    ) -> None:
        problem = Quadratic(12, dtype=dtype)
        u = orthonormal(5, 3, dtype)
        found = subspace_stabilization(
            problem.module, problem.batches(5), problem.loss_fn, u, sigma=sigma, draws=2, orders=6, seed=4
        )
        by_order = [formula(*problem.increments(u, order), sigma) for order in orders_of(12, 6, 4)]
        np.testing.assert_allclose(found.closed_form, np.mean(by_order, axis=0), rtol=tolerance)

    def test_its_average_over_all_orders_is_exact(self) -> None:
        problem, u = Quadratic(5), orthonormal(5, 2)
        arguments = problem.module, [problem.batch], problem.loss_fn, u
        found = subspace_stabilization(*arguments, sigma=0.7, draws=2, orders=2)
        orders = itertools.permutations(range(5))
        by_order = [formula(*problem.increments(u, np.array(order)), 0.7) for order in orders]
        np.testing.assert_allclose(found.expected, np.mean(by_order, axis=0), rtol=1e-12)

    def test_the_stated_error_is_the_standard_deviation_over_seeds(self) -> None:
        problem = Quadratic(10)
        arguments = (problem.module, [problem.batch], problem.loss_fn, orthonormal(5, 2))
        found = [subspace_stabilization(*arguments, sigma=0.5, draws=12, orders=2, seed=s) for s in range(40)]
        constants = np.array([each.monte_carlo_constant for each in found])
        stated = np.mean([each.monte_carlo_constant_error for each in found])
        assert constants.std(ddof=1) == pytest.approx(stated, rel=0.35)  # forty of them are good to 11 %
        assert constants.mean() == pytest.approx(found[0].constant, abs=4 * stated / math.sqrt(40))

    def test_monte_carlo_is_the_definition_in_the_same_orders(self) -> None:
        problem = Quadratic(9)
        u = orthonormal(5, 2)
        found = subspace_stabilization(
            problem.module, problem.batches(4), problem.loss_fn, u, sigma=0.5, draws=3, orders=4, seed=1
        )
        normal = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        squares = []
        for epsilon in 0.5 * normal:
            with torch.no_grad():
                problem.module.w.copy_(problem.origin + u @ epsilon)
                losses = problem.loss_fn(problem.module, problem.batch).numpy()
            means = [np.cumsum(losses[order]) / np.arange(1, 10) for order in orders_of(9, 4, 1)]
            squares.append((np.diff(means, axis=1) ** 2).mean(axis=0))
        np.testing.assert_allclose(found.monte_carlo, np.mean(squares, axis=0), rtol=1e-11)
        np.testing.assert_allclose(found.monte_carlo_error, np.std(squares, axis=0, ddof=1) / math.sqrt(3), rtol=1e-9)

    def test_batches_whose_losses_do_not_depend_on_the_weights_or_linearly_only(self) -> None:
        problem = Quadratic(12)
        _, g, h = problem.batch
        g[:4], h[:8] = 0.0, 0.0
        outside = nn.Parameter(torch.ones(()))  # whose graph does not lead to the weights

        def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
            c, g, h = batch
            if not g.any():
                return c * outside
            return problem.loss_fn(module, batch) if h.any() else c + g @ (module.w - problem.origin)

        u = orthonormal(5, 2)
        plain, other = (
            subspace_stabilization(problem.module, problem.batches(4), each, u, sigma=1.0, draws=2, orders=2)
            for each in (problem.loss_fn, loss_fn)
        )
        assert other.constant == pytest.approx(plain.constant, rel=1e-12)
        np.testing.assert_allclose(other.monte_carlo, plain.monte_carlo, rtol=1e-12)


@functools.cache
def trained() -> tuple[nn.Module, list[Batch]]:
    module = cases.seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).double()
    x, noise = cases.seeded(lambda: (torch.randn(120, 4, dtype=torch.float64), torch.randn(120)), 1)
    y = (x[:, 0] + 0.3 * noise > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    module.zero_grad()
    return module, list(zip(x.split(50), y.split(50), strict=True))


@functools.cache
def of_trained(sigma: float) -> SubspaceStabilization:
    module, batches = trained()
    directions = dominant_directions(module, batches, each, 3).directions
    return subspace_stabilization(module, batches, each, directions, sigma=sigma, draws=50, orders=20)


class TestTrainedNetwork:
    def test_models_agree_near_the_weights_and_part_far_away(self) -> None:
        found = of_trained(0.02)
        assert found.monte_carlo_constant == pytest.approx(found.constant, rel=0.01)
        assert found.monte_carlo_constant == pytest.approx(found.constant, abs=4 * found.monte_carlo_constant_error)
        np.testing.assert_allclose(found.monte_carlo, found.closed_form, rtol=0.05)
        found = of_trained(3.0)
        assert abs(found.monte_carlo_constant - found.constant) > 5 * found.monte_carlo_constant_error
        assert found.monte_carlo_constant / found.constant < 0.5

    def test_at_the_same_rate(self) -> None:
        for found in map(of_trained, (0.02, 3.0)):
            assert found.rate == pytest.approx(-2.0, abs=4 * found.rate_error)
            assert found.rate_error < 0.1

    def test_without_displacement_it_is_the_variance_of_the_losses(self) -> None:
        losses = per_sample_losses(*trained(), each)
        assert of_trained(1e-9).constant == pytest.approx(losses.var(ddof=1), rel=1e-6)


def displaced_moments(problem: cases.Problem, directions: Tensor, sigma: float) -> float:
    """The constant, from dense derivatives of each sample's loss."""
    module, batches, loss_fn = problem
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for sample in [tuple(part[i : i + 1] for part in batch) for batch in batches for i in range(len(batch[0]))]:
        hessian = directions.T @ oracles.dense_hessian(module, [sample], loss_fn) @ directions
        loss = loss_fn(module, sample)
        gradient = directions.T @ torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        rows.append([loss.detach()[None], gradient, hessian.flatten()])
    a, b, curvature = (torch.stack(column).numpy() for column in zip(*rows, strict=True))
    # E ‖y_i − y_j‖²/2 over pairs is the unbiased variance; the formula is quadratic, so it may be given differences.
    pairs = np.array(list(itertools.combinations(range(len(a)), 2))).T
    count = directions.shape[1]
    a, b, curvature = (values[pairs[0]] - values[pairs[1]] for values in (a, b, curvature))
    return float(formula(a[:, 0], b, curvature.reshape(-1, count, count), sigma).mean() / 2)


@pytest.mark.parametrize(("name", "chunk_size"), [*((name, None) for name in cases.NAMES), ("mlp", 2)])
def test_derivatives_of_all_kinds_of_layers(name: str, chunk_size: int | None) -> None:
    problem = cases.make(name)
    problem.module.eval()
    n = sum(p.numel() for p in problem.module.parameters() if p.requires_grad)
    u = orthonormal(n, 3)
    found = subspace_stabilization(*problem, u, sigma=0.4, draws=2, orders=2, chunk_size=chunk_size)
    assert found.constant == pytest.approx(displaced_moments(problem, u, 0.4), rel=1e-10)


class TestState:
    @pytest.mark.parametrize("fails", [0, 1, 3])
    def test_parameters_are_never_written_to(self, fails: int) -> None:
        module, batches = trained()
        module = copy.deepcopy(module).train()
        before = {name: (p, p.data_ptr(), p._version, p.detach().clone()) for name, p in module.named_parameters()}
        random = torch.get_rng_state()
        calls = itertools.count(1)
        seen = []

        def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
            seen.append((module[0].weight.detach().clone(), torch.is_grad_enabled()))
            if next(calls) == fails:
                raise ZeroDivisionError
            return each(module, batch)

        n = sum(p.numel() for p in module.parameters())
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            subspace_stabilization(module, batches, loss_fn, orthonormal(n, 2), sigma=0.5, draws=2, orders=2)
        if not fails:
            # A pass for each draw, at displaced weights, and one with gradients at the weights themselves.
            weight = before["0.weight"][3]
            found = [(torch.equal(used, weight), grad) for used, grad in seen]
            assert found == 6 * [(False, False)] + 3 * [(True, True)]
        for name, p in module.named_parameters():
            same, pointer, version, value = before[name]
            assert p is same
            assert (p.data_ptr(), p._version) == (pointer, version)
            assert torch.equal(p, value)
            assert p.grad is None
        assert module.training
        assert torch.equal(torch.get_rng_state(), random)

    def test_seeds_are_results(self) -> None:
        problem = Quadratic(8)
        arguments = (problem.module, [problem.batch], problem.loss_fn, orthonormal(5, 2))
        first, again, other = (subspace_stabilization(*arguments, sigma=1.0, seed=seed) for seed in (0, 0, 1))
        for field in fields(first):
            np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
        assert (first.monte_carlo != other.monte_carlo).any()
        assert first.constant == other.constant


class TestDominantDirections:
    @pytest.mark.parametrize(
        ("loss_fn", "dtype", "tolerance"), [(cases.cross_entropy, torch.float64, 1e-9), (each, torch.float32, 1e-3)]
    )
    def test_are_the_leading_eigenvectors(self, loss_fn: Any, dtype: torch.dtype, tolerance: float) -> None:
        module, batches = trained()
        values, vectors = torch.linalg.eigh(oracles.dense_hessian(module, batches, cases.cross_entropy))
        module = copy.deepcopy(module).to(dtype)
        batches = [(x.to(dtype), y) for x, y in batches]
        found = dominant_directions(module, batches, loss_fn, 4)
        assert found.directions.shape == (len(values), 4)
        assert found.directions.dtype == dtype
        leading = torch.flip(values[-4:], (0,))
        np.testing.assert_allclose(found.eigenvalues, leading, rtol=tolerance / 10)
        overlaps = (found.directions.double() * torch.flip(vectors[:, -4:], (1,))).sum(dim=0).abs()
        np.testing.assert_allclose(overlaps, 1.0, rtol=tolerance)
        assert (found.residuals < tolerance * float(values[-1])).all()

    def test_residuals_bound_the_errors_of_few_steps(self) -> None:
        module, batches = trained()
        hessian = oracles.dense_hessian(module, batches, cases.cross_entropy)
        found = dominant_directions(module, batches, each, 3, steps=5)
        values, u = torch.from_numpy(found.eigenvalues), found.directions
        norms = torch.linalg.vector_norm(hessian @ u - u * values, dim=0)
        np.testing.assert_allclose(norms, found.residuals, rtol=1e-6)
        assert (found.residuals > 1e-6).any()

    def test_fewer_than_asked_for(self) -> None:
        module, batches, loss_fn = cases.regression((6,), 3, 1, torch.float64)
        with pytest.raises(ValueError, match="Lanczos found 3 eigenvalues in 3 steps, fewer than the 4 asked for"):
            dominant_directions(module, batches, loss_fn, 4)
        with pytest.raises(ValueError, match="`count` must be a positive integer, got 0"):
            dominant_directions(module, batches, loss_fn, 0)


def test_the_plot_shows_both_and_the_average() -> None:
    found = of_trained(0.02)
    ax = found.plot()
    assert ax.get_yscale() == "log"
    curves = {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}
    np.testing.assert_array_equal(curves["50 draws"], found.monte_carlo)
    np.testing.assert_array_equal(curves["quadratic model"], found.closed_form)
    np.testing.assert_array_equal(curves[f"all orders: {found.constant:.3g}/k²"], found.expected)
    assert ax.get_title() == r"$D$ = 3, $\sigma$ = 0.02"
    image = io.BytesIO()
    ax.get_figure().savefig(image)  # whatever cannot be drawn warns here
    assert image.tell() > 5000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(
            ({"directions": torch.ones(shape, dtype=torch.float64)}, r"must have shape \(n, D\) with n=5")
            for shape in ((4, 2), (5, 0), (5,), (2, 5), (6, 2))
        ),
        *(
            ({"directions": orthonormal(5, 2) * factor}, "columns, but UᵀU differs from the identity by")
            for factor in (2.0, math.nan)
        ),
        *(({"sigma": sigma}, "`sigma` must be positive and finite, got") for sigma in (0.0, -1.0, math.nan, math.inf)),
        ({"draws": 1}, "`draws` must be an integer of at least 2, got 1"),
        ({"orders": 1}, "`orders` must be an integer of at least 2, got 1"),
        ({"chunk_size": 0}, "`chunk_size` must be a positive integer, got 0"),
        ({"seed": -1}, "`seed` must be a non-negative integer, got -1"),
        ({"samples": 2}, "with N at least 3"),
        ({"sigma": 1e200}, "the loss of a sample of batch 0 is (inf|nan|-inf)"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    given = {"directions": orthonormal(5, 2), "samples": 6, "sigma": 1.0, "draws": 2, "orders": 2, **wrong}
    problem = Quadratic(given.pop("samples"))
    with pytest.raises(ArithmeticError if wrong.get("sigma") == 1e200 else ValueError, match=message):
        subspace_stabilization(problem.module, [problem.batch], problem.loss_fn, **given)
