"""The tracked sharpness against dense Hessians along a path of weights, and what it costs."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hesd.numerics.analysis.tracking import SEARCH_PRODUCTS, TRACKING_PRODUCTS, SharpnessTracker
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import AnalysisOptions
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from tests import cases
from tests.oracles import dense_hessian
from tests.ranks import in_threads


def gradient_of(problem: cases.Problem) -> Tensor:
    """Return the gradient of the mean loss over all samples, shape (n,)."""
    module, batches, loss_fn = problem
    sizes = [len(batch[0]) for batch in batches]
    loss = sum(n * loss_fn(module, batch) for n, batch in zip(sizes, batches, strict=True)) / sum(sizes)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def descend(problem: cases.Problem, lr: float, steps: int) -> None:
    """Take some steps of gradient descent."""
    parameters = list(problem.module.parameters())
    for _ in range(steps):
        weights = torch.nn.utils.parameters_to_vector(parameters) - lr * gradient_of(problem)
        torch.nn.utils.vector_to_parameters(weights.detach(), parameters)


def diagonals(problem: cases.Problem, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    named = problem.module.named_parameters()
    return {name: torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.05 for name, p in named}


def measure(tracker: SharpnessTracker, problem: cases.Problem, **given: Any) -> Any:
    module, batches, loss_fn = problem
    return tracker.measure(module, weighted_batches(batches), loss_fn, AnalysisOptions(), **given)


@pytest.mark.parametrize(("name", "preconditioned"), [("mlp", False), ("attention", True)])
def test_a_few_products_follow_the_largest_eigenvalues(name: str, preconditioned: bool) -> None:
    problem, tracker = cases.make(name), SharpnessTracker()
    problem.module.eval()
    changes = []
    for number in range(4):
        given = diagonals(problem, 0) if preconditioned else None
        found = measure(tracker, problem, preconditioner=given)
        hessian = dense_hessian(*problem)
        largest = torch.linalg.eigvalsh(hessian)[-1].item()
        assert found.products <= 1 + (TRACKING_PRODUCTS if number else SEARCH_PRODUCTS)
        accuracy = 0.95 if number else 0.99
        assert largest * accuracy <= found.lambda_max <= largest * (1 + 1e-9)
        slope = gradient_of(problem)
        assert found.batch_sharpness == pytest.approx(((slope @ hessian @ slope) / (slope @ slope)).item())
        if given is None:
            assert found.preconditioned is None
        else:
            root = torch.cat([d.flatten() for d in given.values()]).rsqrt()
            largest = torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1].item()
            assert largest * accuracy <= found.preconditioned <= largest * (1 + 1e-9)
        changes.append(found.lambda_max)
        descend(problem, 0.05, 5)
    assert max(changes) > 1.05 * min(changes), "there is something to follow"


def test_many_parameters_in_float32() -> None:
    """A plain sum of so many squares would be off in the fourth digit."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(2**22, generator=torch.Generator().manual_seed(0)))
    problem = cases.Problem(module, [(torch.zeros(1),)], lambda m, _: m.weight.square().sum())
    found = measure(SharpnessTracker(), problem)
    assert (found.lambda_max, found.batch_sharpness) == pytest.approx((2.0, 2.0), rel=3e-6)


def test_the_cost_in_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph, a gradient, and a differentiation for each product; the first measurement also verifies them."""
    problem, tracker, cache = cases.make("mlp"), SharpnessTracker(), AnalysisCache()
    module, batches, loss_fn = problem
    options = AnalysisOptions(batch_size=None)
    grad, calls = torch.autograd.grad, []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    for number in range(4):
        descend(problem, 0.05, 3)
        calls.clear()
        found = tracker.measure(module, weighted_batches(batches), loss_fn, options, cache=cache)
        if number:
            assert found.products <= 1 + TRACKING_PRODUCTS
            assert len(calls) == len(batches) * (2 + found.products)


def of_weights(values: list[float], loss: Callable[[Tensor], Tensor]) -> cases.Problem:
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return cases.Problem(module, [(torch.zeros(1, 1),)], lambda m, _: loss(m.w))


def test_a_search_finds_an_eigenvalue_that_the_last_ritz_vector_is_blind_to() -> None:
    """The Hessian is diagonal, and the start vectors are eigenvectors of other eigenvalues."""
    curvature = torch.ones(3, dtype=torch.float64)
    problem, tracker = of_weights([0.0, 1.0, 0.0], lambda w: (curvature * w**2).sum() / 2), SharpnessTracker()
    curvature[:] = torch.tensor([4.0, 2.0, 1.0])
    assert measure(tracker, problem).lambda_max == pytest.approx(4.0)
    curvature[:] = torch.tensor([4.0, 2.0, 9.0])
    assert measure(tracker, problem).lambda_max == pytest.approx(4.0), "neither start vector has a part of the third"
    tracker.search_next()
    assert measure(tracker, problem).lambda_max == pytest.approx(9.0)


def test_at_a_stationary_point_there_is_no_batch_sharpness_and_without_a_gradient_an_error() -> None:
    found = measure(SharpnessTracker(), of_weights([0.0] * 3, lambda w: (w**2).sum()))
    assert found.batch_sharpness is None
    assert found.lambda_max == pytest.approx(2.0)
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        measure(SharpnessTracker(), of_weights([0.0] * 3, lambda w: (w**2).sum().sqrt()))


def test_several_ranks_find_what_one_finds() -> None:
    problem, cache = cases.make("mlp"), AnalysisCache()
    module, batches, loss_fn = problem
    alone = SharpnessTracker().measure(module, weighted_batches(batches), loss_fn, AnalysisOptions(), cache=cache)
    copies = [copy.deepcopy(module) for _ in range(2)]

    def of_rank(ranks: Any) -> Any:
        own = weighted_batches(batches)[ranks.rank :: ranks.size]
        # Verified already: threads share the default dtype, which changes for that.
        given: dict[str, Any] = {"collectives": ranks, "cache": replace(cache)}
        return SharpnessTracker().measure(copies[ranks.rank], own, loss_fn, AnalysisOptions(), **given)

    for found in in_threads(2, of_rank):
        assert found.lambda_max == pytest.approx(alone.lambda_max, rel=1e-9)
        assert found.batch_sharpness == pytest.approx(alone.batch_sharpness, rel=1e-9)
        assert found.products == alone.products
