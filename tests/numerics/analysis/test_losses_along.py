"""`loss_along_eigenvectors`: the loss along the eigenvectors of the extreme eigenvalues."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum
from tests import cases
from tests.oracles import dense_hessian

CURVATURES = (-0.5, 0.25, 1.0, 4.0)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.25], dtype=torch.float64))
        axes = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.register_buffer("axes", torch.linalg.qr(axes).Q)


def quadratic(module: Point, batch: Tensor) -> Tensor:
    """A polynomial of degree two with these curvatures; batches differ by a constant."""
    along = module.axes.T @ module.place
    return (torch.tensor(CURVATURES, dtype=torch.float64) @ along.square()) / 2 + along.sum() + batch.mean()


BATCHES = [torch.full((3, 1), 1.0, dtype=torch.float64), torch.full((1, 1), 5.0, dtype=torch.float64)]


def test_a_quadratic_follows_its_parabolas_everywhere() -> None:
    point = Point()
    spectrum = hessian_spectrum(point, BATCHES, quadratic, loss_along_eigenvectors=True)
    along = point.axes.T @ point.place.detach()
    loss = quadratic(point, torch.tensor([2.0])).item()  # the mean of the constants, by samples
    assert spectrum.loss == pytest.approx(loss)
    for (distances, losses), axis, curvature in zip(spectrum.losses_along, (0, 3), (-0.5, 4.0), strict=True):
        slope = -abs(curvature * float(along[axis]) + 1)
        assert losses == pytest.approx(loss + slope * distances + curvature * distances**2 / 2, rel=1e-9)
        assert len(distances) == 21
        assert distances[10] == 0
        farthest = min(math.sqrt(0.2 * abs(loss / curvature)), float(point.place.detach().norm()))
        assert (distances[0], distances[-1]) == pytest.approx((-farthest, farthest))
    assert spectrum.matvecs == 4  # evaluations are no products


def test_losses_are_those_of_moved_weights() -> None:
    problem = cases.make("mlp")
    spectrum = hessian_spectrum(*problem, steps=200, loss_along_eigenvectors=True)
    vectors = torch.linalg.eigh(dense_hessian(*problem)).eigenvectors[:, [0, -1]].T
    moved = copy.deepcopy(problem.module).eval()
    parameters = [p for p in moved.parameters() if p.requires_grad]
    start = torch.cat([p.detach().flatten() for p in parameters])
    for vector, (distances, losses) in zip(vectors, spectrum.losses_along, strict=True):
        expected, sizes = [], [len(batch[0]) for batch in problem.batches]
        for distance in distances:
            torch.nn.utils.vector_to_parameters(start + distance * vector, parameters)
            expected.append(np.average([problem.loss_fn(moved, b).item() for b in problem.batches], weights=sizes))
        assert losses == pytest.approx(expected if expected[11] <= expected[9] else expected[::-1], rel=1e-7)
        assert losses[11] <= losses[9]


@pytest.mark.parametrize("options", [{"probes": 2, "basis": "cpu"}, {"strategy": "finite_difference"}])
def test_module_and_random_numbers_stay_as_they_were(options: dict[str, Any]) -> None:
    problem = cases.make("conv_batchnorm")
    problem.module.train()
    before = copy.deepcopy(problem.module.state_dict())
    state = torch.get_rng_state()
    spectrum = hessian_spectrum(*problem, steps=6, mode="train", loss_along_eigenvectors=True, **options)
    assert np.isfinite(spectrum.losses_along).all()
    assert spectrum.losses_along[:, 1, 10] == pytest.approx(spectrum.loss, rel=1e-6)
    assert all(map(torch.equal, before.values(), problem.module.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), state)


def test_with_several_probes_the_vectors_are_those_of_the_extreme_nodes() -> None:
    problem = cases.make("mlp")
    spectrum = hessian_spectrum(*problem, steps=5, probes=4, loss_along_eigenvectors=True)
    assert len(set(spectrum.nodes[:, 0])) == 4
    extremes = spectrum.lambda_min, spectrum.lambda_max
    for (distances, losses), eigenvalue in zip(spectrum.losses_along, extremes, strict=True):
        # Also where a node has not converged it is the curvature along its vector.
        second = (losses[11] - 2 * losses[10] + losses[9]) / distances[11] ** 2
        assert second == pytest.approx(eigenvalue, rel=0.05)


@pytest.mark.parametrize("options", [{}, {"loss_along_eigenvectors": True, "basis": "none"}])
def test_no_losses_without_the_option_or_a_krylov_basis(options: dict[str, Any]) -> None:
    assert hessian_spectrum(*cases.make("mlp"), steps=6, **options).losses_along.shape == (2, 2, 0)


def test_no_losses_along_eigenvectors_of_a_part_of_the_hessian() -> None:
    split = {"output_fn": lambda m, _: m.place, "output_loss": lambda outputs, b: outputs.square().sum() + b.mean()}
    options = {"matrix": "ggn", **split, "loss_along_eigenvectors": True}
    spectrum = hessian_spectrum(Point(), BATCHES, lambda m, b: m.place.square().sum() + b.mean(), **options)
    assert spectrum.losses_along.size == 0


def test_no_loss_where_the_loss_function_refuses_its_inputs() -> None:
    point = Point()
    start = point.place.detach().clone()

    def cautious(module: Point, batch: Tensor) -> Tensor:
        if float((module.place.detach() - start).norm()) > 0.2:
            raise ValueError("too far")
        return quadratic(module, batch)

    spectrum = hessian_spectrum(point, BATCHES, cautious, loss_along_eigenvectors=True)
    for distances, losses in spectrum.losses_along:
        assert (np.isnan(losses) == (np.abs(distances) > 0.2)).all()
    assert torch.equal(point.place.detach(), start)
