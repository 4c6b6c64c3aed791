"""Errors of differences of spectra on the same samples: the formulas, and resampled data."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import c_t_difference, hessian_spectrum, lambda_max_difference
from lightning_hesd.spectra.differences import are_comparable
from lightning_hesd.spectra.spectrum import Spectrum
from tests.training.scripted import make_spectrum


def resampled(c_t: float, lowest: list[float], highest: list[float]) -> Spectrum:
    """A spectrum with λ_max = 2, and its extremes for three resamples of two groups of samples."""
    groups = np.array([[0.75, 0.25], [-1.0, -2.0], [2.0, 1.0]])
    resamples = {"group_curvatures": groups, "resampled_extremes": np.array([lowest, highest])}
    return replace(make_spectrum(c_t, lambda_max=2.0), num_samples=4, **resamples)


FIRST = resampled(-0.5, [-1.0, -2.0, 0.5], [2.0, 1.0, 2.5])


def test_formulas() -> None:
    second = resampled(-0.25, [-0.5, -1.0, 0.0], [2.0, 2.0, 2.0])
    of_lambda_max = lambda_max_difference(FIRST, second)
    assert of_lambda_max.value == 0.0
    expected = pytest.approx(np.std([2, 1, 2.5], ddof=1))
    assert (of_lambda_max.standard_error, of_lambda_max.unpaired_error) == (expected, expected)
    of_c_t = c_t_difference(FIRST, second)
    ours, theirs = np.array([-0.5, -2.0, 0.0]), np.array([-0.25, -0.5, 0.0])  # C_t is at most 0
    assert of_c_t.value == pytest.approx(-0.25)
    assert of_c_t.standard_error == pytest.approx(np.std(ours - theirs, ddof=1))
    assert of_c_t.unpaired_error == pytest.approx(math.hypot(np.std(ours, ddof=1), np.std(theirs, ddof=1)))
    assert of_c_t.numerical_error == FIRST.c_t_error + second.c_t_error
    # A state does not differ from itself.
    difference = c_t_difference(FIRST, FIRST)
    assert (difference.value, difference.standard_error, difference.is_evident) == (0.0, 0.0, False)
    assert difference.unpaired_error > 0.1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"resampled_extremes": np.empty((2, 0))}, "no resampled extremes.*sampling_error=True"),
        ({"num_samples": 7}, "on the same samples, got 4 in 2 groups and 7 in 2 groups"),
        ({"group_curvatures": np.full((3, 4), 0.25)}, "in 2 groups and 4 in 4 groups"),
        ({"reason": "all is zero"}, "C_t of a spectrum is undefined: all is zero"),
    ],
)
def test_what_cannot_be_compared(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c_t_difference(FIRST, replace(FIRST, **other))
    assert not are_comparable(FIRST, replace(FIRST, **other))


def test_errors_are_those_of_resampled_data() -> None:
    """The standard error is the standard deviation over draws of the samples, far below that of separate draws."""
    torch.manual_seed(0)
    inputs = torch.randn(4000, 4, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.3 * torch.randn(4000, 1, dtype=torch.float64)
    states = []
    for scale in (1.0, 1.1):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(scale)
        states.append(net)

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    found = []
    for _ in range(24):
        drawn = torch.randint(4000, (256,))
        batches = DataLoader(TensorDataset(inputs[drawn], targets[drawn]), batch_size=256)
        first, second = (hessian_spectrum(net, batches, loss, steps=19, sampling_error=True) for net in states)
        found.append((c_t_difference(first, second), lambda_max_difference(first, second)))
    for differences in zip(*found, strict=True):
        scatter = np.std([d.value for d in differences], ddof=1)
        assert np.mean([d.standard_error for d in differences]) == pytest.approx(scatter, rel=0.3)
        assert np.mean([d.unpaired_error for d in differences]) > 2 * scatter
