"""`tolerance`: when the analysis stops, and what the record says then."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.analysis.stopping import FOR_C_T, CheckSchedule, c_t_excess
from tests import cases
from tests import example_spectra as spectra

TRAINED_LIKE = ("few outliers on a narrow bulk", "geometric", "rank deficient")
INIT_LIKE = ("semicircle", "symmetric")


def analyze(name: str, **options: Any) -> Spectrum:
    module = spectra.Quadratic(spectra.POPULATION[name])
    return hessian_spectrum(module, [torch.zeros(1)], spectra.quadratic_loss, **{"strategy": "graph", **options})


def beginning(name: str, steps: int, *, tolerance: Any, **options: Any) -> Spectrum:
    """Return what the same Lanczos run finds in a fixed number of steps, judged by a tolerance."""
    return dataclasses.replace(analyze(name, **options, steps=steps), tolerance=tolerance)


@pytest.mark.parametrize(
    ("tolerance", "basis"), [(0.05, "device"), (0.01, "device"), ("type", "device"), (0.05, "none")]
)
@pytest.mark.parametrize("name", ["few outliers on a narrow bulk", "lone small negative", "semicircle"])
def test_stops_as_soon_as_the_interval_says_so_with_the_beginning_of_a_longer_run(name, tolerance, basis):
    options = {"tolerance": tolerance, "basis": basis, "seed": 1}
    spectrum = analyze(name, steps=100, **options)
    assert (spectrum.tolerance, spectrum.converged) == (tolerance, True)
    assert spectrum.matvecs == spectrum.steps < 100
    if tolerance == "type":
        assert spectrum.type_certain
    else:
        assert spectrum.c_t_error <= tolerance * max(abs(spectrum.c_t), 1e-3)
    # It is asked every second step here, unless a forecast says that it is far from accurate.
    assert not beginning(name, spectrum.steps - 3, **options).converged
    fixed = beginning(name, spectrum.steps, **options)
    for name in ("nodes", "weights", "residuals"):
        np.testing.assert_array_equal(getattr(spectrum, name), getattr(fixed, name))
    assert spectrum.c_t_interval == fixed.c_t_interval


def test_a_number_of_numpy_is_a_number() -> None:
    spectrum = analyze("semicircle", tolerance=np.float32(0.001), steps=200)
    assert spectrum.tolerance == pytest.approx(0.001)
    assert spectrum.c_t_error <= 0.0011 * abs(spectrum.c_t)


@pytest.mark.parametrize("tolerance", [0.05, 0.01, "type"])
@pytest.mark.parametrize("name", spectra.POPULATION)
def test_the_cheap_test_never_denies_an_accurate_interval(name, tolerance):
    # The coefficients of fewer steps are the beginning of those of more.
    run = spectra.run(spectra.POPULATION[name], 60, torch.Generator().manual_seed(0))
    in_vain = 0
    for steps in range(1, len(run.alphas), 2):
        alphas, betas = run.alphas[:steps], run.betas[:steps]
        found = spectra.of_coefficients([(alphas, betas)], spectra.N, tolerance=tolerance, verified="yes")
        excess = c_t_excess(
            SimpleNamespace(alphas=alphas, betas=betas), tolerance, None, lambda _, found=found: found.rounding,
            dimension=spectra.N, confidence=0.95,
        )  # fmt: skip
        assert not (excess > 0 and found.converged)
        in_vain += excess <= 0 and not found.converged
    assert in_vain <= 3  # where the start vector is an unlucky one, the interval allows for that


def test_checks_come_more_densely_as_the_goal_comes_nearer() -> None:
    schedule, due = CheckSchedule(), []
    for steps in range(2, 101, 2):
        if schedule.is_due(steps):
            due.append(steps)
            schedule.after(steps, 0.1 * (100 - steps), FOR_C_T)
    pauses = np.diff(due)
    assert due[-1] == 100
    assert pauses.max() <= 100 / 6 + 2
    assert pauses[-1] <= 4 < pauses.max()


def test_the_cap_is_reported_and_not_exceeded_for_want_of_a_sampling_error():
    for tolerance in (0.01, "type"):
        spectrum = analyze("about the threshold", tolerance=tolerance, steps=6)
        assert (spectrum.steps, spectrum.matvecs, spectrum.converged) == (6, 6, False)
    # A loss that is the same for every sample has none.
    module, batches = spectra.Quadratic(spectra.POPULATION["uniform"]), [torch.zeros(16)] * 16
    spectrum = hessian_spectrum(module, batches, spectra.quadratic_loss, tolerance="auto", steps=12)
    assert (spectrum.steps, spectrum.converged) == (12, False)
    assert spectrum.c_t_sampling_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("names", "expected"), [(TRAINED_LIKE, "MP"), (INIT_LIKE, "MN")])
def test_the_type_takes_fewer_steps_than_the_value(names, expected):
    for name in names:
        by_type, by_value = (analyze(name, tolerance=tolerance, steps=100) for tolerance in ("type", 0.01))
        assert by_type.hesd_type == by_value.hesd_type == expected
        assert by_type.type_certain
        assert by_type.steps <= by_value.steps
    assert by_type.steps < by_value.steps


def test_every_probe_stops_by_itself_and_missing_nodes_are_padded():
    several, alone = (
        analyze("few outliers on a narrow bulk", tolerance=0.01, steps=100, probes=probes) for probes in (3, 1)
    )
    assert len(set(several.steps_per_probe)) > 1
    assert several.matvecs == sum(several.steps_per_probe)
    assert several.converged
    assert several.steps_per_probe[0] == alone.steps
    for row, steps in enumerate(several.steps_per_probe):
        assert np.isfinite(several.nodes[row, :steps]).all()
        assert np.isnan(several.nodes[row, steps:]).all()
        assert several.weights[row].sum() == pytest.approx(1.0, rel=1e-14)


def noisy_problem(samples: int) -> cases.Problem:
    """Return a network at random weights on random labels, whose samples differ widely."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.7, generator=generator)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (samples,), generator=generator)
    return cases.Problem(module, [(x, y)], cases.cross_entropy)


class TestAuto:
    def test_stops_at_a_quarter_of_the_sampling_error(self):
        auto, fine = (hessian_spectrum(*noisy_problem(64), tolerance=tolerance) for tolerance in ("auto", 0.01))
        full = hessian_spectrum(*noisy_problem(64), steps=100, sampling_error=True)
        assert auto.converged
        assert auto.c_t_sampling_error > 0
        assert auto.c_t_error <= auto.c_t_sampling_error / 4
        assert auto.sampling_groups == 16
        # It is estimated from Ritz vectors that are not accurate yet.
        assert auto.c_t_sampling_error == pytest.approx(full.c_t_sampling_error, rel=0.2)
        assert fine.converged
        assert auto.matvecs < fine.matvecs  # the pass over the groups included
        assert auto.steps < fine.steps

    def test_an_undefined_c_t_has_no_sampling_error(self):
        problem = noisy_problem(64)
        spectrum = hessian_spectrum(*problem[:2], lambda m, b: m(b[0]).mean() * 0, tolerance="auto", steps=10)
        assert math.isnan(spectrum.c_t)
        assert (spectrum.c_t_sampling_error, spectrum.converged) == (None, False)


@pytest.mark.parametrize("name", TRAINED_LIKE)
def test_stops_when_the_density_is_accurate(name):
    options = {"tolerance": 0.15, "stop": "density", "seed": 1}
    spectrum = analyze(name, steps=100, **options)
    assert spectrum.converged
    assert 2 < spectrum.steps < 100
    assert spectrum.error == spectrum.density_error <= 0.15
    fixed = beginning(name, spectrum.steps, tolerance=0.15, seed=1)
    np.testing.assert_array_equal(spectrum.nodes, fixed.nodes)
    eigenvalues = np.sort(spectra.POPULATION[name])
    points = np.union1d(np.linspace(eigenvalues[0], eigenvalues[-1], 20001), spectrum.nodes)
    weights, nodes = spectrum.density_weights[0], spectrum.nodes[0]
    ours = np.array([weights[nodes <= point].sum() for point in points])
    gap = np.abs(ours - np.searchsorted(eigenvalues, points, side="right") / len(eigenvalues))
    distance = float((gap[:-1] * np.diff(points)).sum())
    assert distance / np.ptp(eigenvalues) <= spectrum.density_error


@pytest.mark.parametrize("tolerance", [None, "type", "auto"])
def test_the_density_needs_a_number(tolerance):
    with pytest.raises(ValueError, match=r"`stop='density'` needs a number between 0 and 1 for `tolerance`"):
        analyze("geometric", stop="density", tolerance=tolerance)
