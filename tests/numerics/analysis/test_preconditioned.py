"""Spectra of D^(-1/2) H D^(-1/2), and of frozen weights, against dense matrices."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum
from tests import cases
from tests.oracles import case_eigenvalues, case_hessian, dense_hessian, hausdorff

WIDE = 1e3
"""The diagonals reach from 1/WIDE to WIDE, as those of Adam do."""


def diagonals(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: WIDE ** (2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def preconditioned(name: str, preconditioner: dict[str, Tensor]) -> Tensor:
    """Return the dense matrix D^(-1/2) H D^(-1/2)."""
    scale = torch.cat([d.flatten() for d in preconditioner.values()]).rsqrt()
    return scale[:, None] * case_hessian(name) * scale


@pytest.mark.parametrize(
    ("name", "dtype", "epsilons"),
    [*((name, torch.float64, 50) for name in cases.NAMES), ("mlp", torch.float32, 100), ("tied", torch.float32, 100)],
)
def test_nodes_are_eigenvalues_of_the_preconditioned_hessian(name: str, dtype: torch.dtype, epsilons: float) -> None:
    problem = cases.make(name, dtype)
    preconditioner = diagonals(problem.module)
    values = torch.linalg.eigvalsh(preconditioned(name, preconditioner)).numpy()
    spectrum = hessian_spectrum(*problem, steps=len(values), preconditioner=preconditioner)
    size = np.abs(values).max()
    assert spectrum.matrix == "preconditioned hessian"
    extremes = [spectrum.lambda_min, spectrum.lambda_max]
    np.testing.assert_allclose(extremes, values[[0, -1]], rtol=0, atol=epsilons * torch.finfo(dtype).eps * size)
    if dtype == torch.float64:
        assert hausdorff(spectrum.nodes[0][spectrum.weights[0] > 1e-12], values) <= 1e-9 * size


def test_central_differences_state_their_error() -> None:
    problem = cases.make("mlp")
    given = diagonals(problem.module)
    values = torch.linalg.eigvalsh(preconditioned("mlp", given)).numpy()
    found = hessian_spectrum(*problem, steps=len(values), preconditioner=given, strategy="finite_difference")
    assert found.rounding < 1e-6 * values[-1]
    np.testing.assert_allclose([found.lambda_min, found.lambda_max], values[[0, -1]], rtol=0, atol=found.rounding)


def test_identity_changes_nothing_but_the_predicted_memory() -> None:
    problem = cases.make("mlp")
    ones = {name: torch.ones_like(p) for name, p in problem.module.named_parameters()}
    plain = hessian_spectrum(*problem, steps=8, sampling_error=True, batch_weight=None)
    same = hessian_spectrum(*problem, steps=8, sampling_error=True, preconditioner=ones)
    np.testing.assert_array_equal(plain.nodes, same.nodes)
    assert plain.c_t_sampling_error == same.c_t_sampling_error
    assert same.predicted_memory == plain.predicted_memory + 3 * 43 * 8  # its vectors


def test_sampling_error_is_that_of_the_preconditioned_hessian() -> None:
    """A linear model under squared error: its preconditioned Hessian is that of rescaled inputs."""
    problem = cases.regression((64,), 5, 1, torch.float64)
    weight = torch.tensor([[4.0, 0.25, 1.0, 16.0, 2.0]], dtype=torch.float64)
    rescaled = [(x / weight.sqrt(), y) for x, y in problem.batches]
    ours = hessian_spectrum(*problem, preconditioner={"weight": weight}, sampling_error=True)
    theirs = hessian_spectrum(problem.module, rescaled, problem.loss_fn, sampling_error=True)
    assert ours.lambda_max == pytest.approx(theirs.lambda_max, rel=1e-12)
    assert ours.lambda_max_sampling_error == pytest.approx(theirs.lambda_max_sampling_error, rel=1e-9)


def test_no_curvature_is_measured_in_the_same_coordinates() -> None:
    """With large D the preconditioned curvature is small, but so it is against the loss in these coordinates."""
    problem = cases.make("mlp")
    plain = hessian_spectrum(*problem, steps=5)
    large = {name: torch.full_like(p, 1e18) for name, p in problem.module.named_parameters()}
    spectrum = hessian_spectrum(*problem, steps=5, preconditioner=large)
    assert spectrum.reason is None
    assert spectrum.c_t == pytest.approx(plain.c_t, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given | {"head": torch.ones(1)}, r"`preconditioner` names 'head', which is no parameter"),
        (lambda given: {n: d for n, d in given.items() if n != "2.bias"}, r"has no diagonal for '2\.bias'"),
        (lambda given: given | {"2.bias": torch.ones(4)}, r"must have the shape of the parameter, \(3,\), got \(4,\)"),
        (lambda given: given | {"2.bias": torch.zeros(3)}, r"`preconditioner\['2\.bias'\]` must be positive.*got 0\.0"),
        (lambda given: given | {"2.bias": torch.full((3,), torch.inf)}, r"must be positive and finite, got inf"),
        (lambda given: given | {"2.bias": torch.full((3,), torch.nan)}, r"must be positive and finite, got nan"),
        (lambda given: given | {"2.bias": 1.0}, r"`preconditioner` must map names of parameters to tensors"),
        (lambda given: "optimizer", r"`preconditioner` must map names .*got 'optimizer'"),
    ],
)
def test_misfits_are_named(change: Any, message: str) -> None:
    problem = cases.make("mlp")
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(*problem, preconditioner=change(diagonals(problem.module)))


def test_frozen_weights_can_be_included() -> None:
    problem = cases.make("frozen")
    frozen = [name for name, p in problem.module.named_parameters() if not p.requires_grad]
    assert frozen
    trained = hessian_spectrum(*problem)
    every = hessian_spectrum(*problem, include_frozen=True)
    with pytest.raises(ZeroDivisionError):
        hessian_spectrum(problem.module, problem.batches, lambda *_: 1 / 0, include_frozen=True)
    assert [name for name, p in problem.module.named_parameters() if not p.requires_grad] == frozen
    assert all(p.grad is None for p in problem.module.parameters())
    assert trained.lambda_max == pytest.approx(case_eigenvalues("frozen")[-1], rel=1e-10)
    problem.module.requires_grad_(True)
    values = torch.linalg.eigvalsh(dense_hessian(*problem))
    assert every.dimension == len(values) > trained.dimension
    assert every.lambda_max == pytest.approx(float(values[-1]), rel=1e-10)
    assert every.lambda_min == pytest.approx(float(values[0]), rel=1e-10)
