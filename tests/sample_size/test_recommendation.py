"""The recommended number of samples: against formulas, and by simulation, whether its promises hold."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from lightning_hesd.numerics.analysis.group_statistics import samples_needed
from lightning_hesd.sample_size.recommendation import SampleSize, loss_requirement, recommend_sample_size
from lightning_hesd.spectra.intervals import chi_square_quantile
from tests import oracles
from tests.cases import cross_entropy
from tests.sample_size.test_sample_losses import each

POPULATION, PILOT, SEEDS = 3000, 256, 20
CONFIDENCE, TOLERANCE, LOSS_TOLERANCE = 0.9, 0.15, 0.02


@pytest.mark.parametrize("degrees", [1, 2, 7, 15, 40])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.95, 0.975])
def test_chi_square_quantile(probability: float, degrees: int) -> None:
    assert chi_square_quantile(probability, degrees) == pytest.approx(stats.chi2.ppf(probability, degrees), rel=2e-3)


@pytest.mark.parametrize(("error", "bias"), [(0.3, 0.0), (0.3, 0.1), (0.3, -0.1), (0.0, 0.2)])
def test_samples_needed_solves_its_equation(error: float, bias: float) -> None:
    k = samples_needed(200, 0.05, error, bias)
    assert error * math.sqrt(200 / k) + abs(bias) * 200 / k == pytest.approx(0.05, rel=1e-12)
    assert samples_needed(200, 0.0, error, bias) == math.inf


class TestLoss:
    def test_is_the_order_statistic_over_what_is_allowed(self):
        losses = np.arange(1.0, 100.0)  # mean 50, deviations 0, 1, 1, ..., 49, 49
        found = loss_requirement(losses, tolerance=0.01, confidence=0.95)
        assert found.allowed == 0.5
        assert found.samples == math.ceil(47 / 0.5) - 1  # the 95th of 99
        assert found.pilot == pytest.approx(47 / 100)
        assert found.interval[0] < found.samples < found.interval[1]

    def test_a_pilot_that_is_too_small_cannot_tell_and_no_deviation_needs_one_sample(self):
        found = loss_requirement(np.array([1.0, 2.0, 3.0]), tolerance=0.1, confidence=0.95)
        assert found.samples == math.inf
        found = loss_requirement(np.full(100, 2.0), tolerance=0.1, confidence=0.9)
        assert (found.samples, found.pilot) == (1, 0)


# Simulation


RECOMMENDED = {"tolerance": TOLERANCE, "loss_tolerance": LOSS_TOLERANCE, "confidence": CONFIDENCE, "strategy": "graph"}


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network on noisy classes, and a population to draw from."""
    torch.manual_seed(0)
    x = torch.randn(POPULATION, 3, dtype=torch.float64)
    teacher = torch.randn(3, 3, dtype=torch.float64)
    y = (x @ teacher + 0.7 * torch.randn(POPULATION, 3, dtype=torch.float64)).argmax(1)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(module, (x[:1000], y[:1000])).backward()
        optimizer.step()
    return module, x, y


@pytest.fixture(scope="module")
def hessians(problem: tuple[nn.Module, Tensor, Tensor]) -> Tensor:
    """The Hessian of every sample of the population, shape (POPULATION, n, n)."""
    module, x, y = problem
    found = oracles.cross_entropy_hessians(module, x, y)
    whole = oracles.dense_hessian(module, [(x[:100], y[:100])], cross_entropy)
    torch.testing.assert_close(found[:100].mean(0), whole, rtol=0, atol=1e-12)
    return found


def extremes(hessians: Tensor, chosen: np.ndarray) -> tuple[float, float]:
    """Return the largest eigenvalue and C_t of these samples."""
    samples, times = np.unique(chosen, return_counts=True)
    mean = torch.tensordot(torch.from_numpy(times / len(chosen)), hessians[samples], 1)
    eigenvalues = torch.linalg.eigvalsh(mean)
    return float(eigenvalues[-1]), min(float(eigenvalues[0] / eigenvalues[-1]), 0.0)


@pytest.fixture(scope="module")
def recommended(problem: tuple[nn.Module, Tensor, Tensor]) -> list[tuple[SampleSize, np.random.Generator]]:
    module, x, y = problem
    found = []
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        pilot = generator.choice(POPULATION, PILOT, replace=False)
        found.append((recommend_sample_size(module, [(x[pilot], y[pilot])], each, **RECOMMENDED), generator))
    return found


def holds_as_often_as_promised(successes: int, trials: int) -> bool:
    """Whether so few successes are no evidence, at one in a hundred, against the promised probability."""
    return float(stats.binom.cdf(successes, trials, CONFIDENCE)) > 0.01


@pytest.mark.parametrize(("quantity", "position"), [("lambda_max", 0), ("c_t", 1)])
def test_the_spectrum_is_as_stable_as_promised(hessians, recommended, quantity, position):
    true = extremes(hessians, np.arange(POPULATION))[position]
    inside, inside_with_fewer = 0, 0
    for result, generator in recommended:
        k = int(result.requirements[quantity].samples)
        fresh = generator.integers(POPULATION, size=k)
        inside += abs(extremes(hessians, fresh)[position] - true) <= TOLERANCE * abs(true)
        inside_with_fewer += abs(extremes(hessians, fresh[: k // 8])[position] - true) <= TOLERANCE * abs(true)
    assert holds_as_often_as_promised(inside, SEEDS)
    assert not holds_as_often_as_promised(inside_with_fewer, SEEDS)  # so the number is not just very large


def test_the_loss_is_as_stable_as_promised(problem, recommended):
    module, x, y = problem
    losses = each(module, (x, y)).detach().numpy()
    inside, inside_with_fewer, trials = 0, 0, 0
    for result, generator in recommended:
        k = int(result.requirements["loss"].samples)
        for _ in range(20):
            fresh = generator.choice(losses, k + 1)
            inside += abs(fresh.mean() - fresh[:k].mean()) <= LOSS_TOLERANCE * losses.mean()
            few = fresh[: k // 2 + 1]
            inside_with_fewer += abs(few.mean() - few[:-1].mean()) <= LOSS_TOLERANCE * losses.mean()
            trials += 1
    assert holds_as_often_as_promised(inside, trials)
    assert not holds_as_often_as_promised(inside_with_fewer, trials)


def test_intervals_contain_what_a_large_pilot_finds(problem, recommended):
    module, x, y = problem
    large = recommend_sample_size(module, [(x, y)], each, **RECOMMENDED)
    low, high = zip(*(result.requirements["loss"].interval for result, _ in recommended), strict=True)
    inside = sum(a <= large.requirements["loss"].samples <= b for a, b in zip(low, high, strict=True))
    assert holds_as_often_as_promised(inside, SEEDS)


def test_the_answer_is_that_of_the_most_demanding_quantity(recommended):
    result, _ = recommended[0]
    needed = {name: requirement.samples for name, requirement in result.requirements.items()}
    assert result.samples == max(needed.values())
    assert result.is_extrapolated == (result.samples > PILOT)
    said = str(result).splitlines()
    assert said[0] == f"{result.samples:,.0f} samples are enough, with a confidence of 90% for each quantity."
    assert all(len(line) <= 80 for line in said)
    assert f"With 256 samples it is {result.requirements['loss'].pilot:.3g}." in " ".join(str(result).split())
    unknown = replace(result.requirements["loss"], samples=math.inf)
    assert str(replace(result, requirements={**result.requirements, "loss": unknown})).splitlines()[:2] == [
        "256 samples are too few to tell how many are enough.",
        "- loss: 256 samples are too few to tell.",
    ]


@pytest.mark.parametrize(
    ("options", "samples", "message"),
    [
        ({"tolerance": 0}, 20, "`tolerance` must be positive and finite, got 0"),
        ({"loss_tolerance": math.inf}, 20, "`loss_tolerance` must be positive and finite, got inf"),
        ({"confidence": 1}, 20, "`confidence` must lie between 0 and 1, got 1"),
        ({}, 5, "at least 8 groups of samples"),
    ],
)
def test_mistakes(problem, options, samples, message):
    module, x, y = problem
    with pytest.raises(ValueError, match=message):
        recommend_sample_size(module, [(x[:samples], y[:samples])], each, **options)


def test_no_curvature():
    batch = (torch.zeros(16, 2), torch.zeros(16, dtype=torch.long))
    with pytest.raises(ArithmeticError, match="the spectrum has no sampling error"):
        recommend_sample_size(nn.Linear(2, 1), [batch], each)


def test_of_a_mean_over_tokens() -> None:
    """Samples are not what such a loss is the mean of: there is no number of them to recommend."""
    torch.manual_seed(0)
    ids = torch.randint(4, (16, 5))
    mask = torch.arange(5) < torch.arange(2, 18).remainder(4)[:, None] + 2
    batch = {"input_ids": ids, "labels": ids.where(mask, -100)}

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    with pytest.raises(ValueError, match="the loss is not a mean over samples"):
        recommend_sample_size(nn.Embedding(4, 4), [batch], loss, steps=5)
