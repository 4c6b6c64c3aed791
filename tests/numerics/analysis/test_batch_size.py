"""Batches are merged where the loss of a merged batch is the mean of theirs, and only there."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import Spectrum, hessian_spectrum, layer_spectra
from lightning_hesd.numerics.inputs.batches import position_in_epoch
from tests import cases

SIZES = (12, 12, 12, 8)

Batch = list[Tensor]
Batches = list[Batch]


@pytest.fixture
def batches() -> Batches:
    x, y = cases.seeded(lambda: (torch.randn(sum(SIZES), 5), torch.randint(3, (sum(SIZES),))))
    return [list(pair) for pair in zip(x.split(SIZES), y.split(SIZES), strict=True)]


@pytest.fixture
def network() -> nn.Sequential:
    return cases.seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), 1)


def is_merged(spectrum: Spectrum) -> bool:
    return "merged" in spectrum.strategy_reason


@pytest.mark.parametrize("strategy", ["auto", "recompute", "finite_difference"])
def test_a_mean_over_samples_is_merged_and_the_spectrum_stays_the_same(
    network: nn.Sequential, batches: Batches, strategy: Any
) -> None:
    seen: list[int] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        seen.append(len(batch[0]))
        return cases.cross_entropy(module, batch)

    network.double()
    doubles = [[x.double(), y] for x, y in batches]
    apart = hessian_spectrum(network, doubles, loss, steps=30, strategy=strategy, batch_size=None)
    assert not is_merged(apart)
    assert sum(SIZES) not in seen
    together = hessian_spectrum(network, doubles, loss, steps=30, strategy=strategy)
    assert "4 batches are merged into 1" in together.strategy_reason
    assert sum(SIZES) in seen
    assert together.num_samples == apart.num_samples
    assert together.verified == "yes"
    assert together.loss == pytest.approx(apart.loss, rel=1e-14)
    accuracy = 1e-6 if strategy == "finite_difference" else 1e-12
    for name in ("lambda_min", "lambda_max"):
        assert getattr(together, name) == pytest.approx(getattr(apart, name), rel=accuracy)


def test_a_number_is_the_most_samples_of_a_merged_batch(network: nn.Sequential, batches: Batches) -> None:
    spectrum = hessian_spectrum(network, batches, cases.cross_entropy, steps=5, batch_size=24)
    assert "4 batches are merged into 2" in spectrum.strategy_reason
    assert not is_merged(hessian_spectrum(network, batches, cases.cross_entropy, steps=5, batch_size=12))


def test_merged_batches_fit_into_the_memory_and_are_half_as_many_at_least(network: nn.Sequential) -> None:
    wide = [[torch.randn(32, 5), torch.zeros(32, dtype=torch.long)] for _ in range(16)]
    roomy = hessian_spectrum(network, wide, cases.cross_entropy, steps=3, basis="none")
    assert "16 batches are merged into 1" in roomy.strategy_reason
    tight, tighter = (
        hessian_spectrum(network, wide, cases.cross_entropy, steps=3, basis="none", memory_budget=budget)
        for budget in (80_000, 60_000)
    )
    assert re.search(r"16 batches are merged into [2-8]\b", tight.strategy_reason)
    assert not is_merged(tighter)


def test_layers_are_those_of_merged_batches(network: nn.Sequential, batches: Batches) -> None:
    together = layer_spectra(network, batches, cases.cross_entropy, steps=10)
    apart = layer_spectra(network, batches, cases.cross_entropy, steps=10, batch_size=None)
    for name, spectrum in together.items():
        assert is_merged(spectrum)
        assert spectrum.lambda_max == pytest.approx(apart[name].lambda_max, rel=1e-5)


def test_sampling_errors_come_from_the_same_groups(network: nn.Sequential) -> None:
    batches = cases.seeded(lambda: [[torch.randn(16, 5), torch.randint(3, (16,))] for _ in range(4)])
    together, apart = (
        hessian_spectrum(network, batches, cases.cross_entropy, steps=40, sampling_error=True, batch_size=size)
        for size in ("auto", None)
    )
    assert is_merged(together)
    assert together.sampling_groups == apart.sampling_groups == 16
    assert together.c_t_sampling_error == pytest.approx(apart.c_t_sampling_error, rel=1e-3)


def test_tokens_weigh_merged_batches(network: nn.Sequential) -> None:
    batches = cases.seeded(
        lambda: [{"x": torch.randn(6, 4, 5), "labels": torch.randint(-1, 3, (6, 4))} for _ in range(3)]
    )
    for batch in batches:
        batch["labels"][batch["labels"] == -1] = -100

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch["x"]).flatten(0, 1), batch["labels"].flatten())

    with pytest.warns(RuntimeWarning, match="mean over tokens"):
        together = hessian_spectrum(network, batches, loss, steps=40)
    assert is_merged(together)
    apart = hessian_spectrum(network, batches, loss, steps=40, batch_weight="tokens", batch_size=None)
    assert together.lambda_max == pytest.approx(apart.lambda_max, rel=1e-5)


# Losses that are no mean over samples ---------------------------------------------------------------------------------


def contrastive(module: nn.Module, batch: Batch) -> Tensor:
    outputs = module(batch[0])
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def small_variance_term(module: nn.Module, batch: Batch) -> Tensor:
    outputs = module(batch[0])
    return F.cross_entropy(outputs, batch[1]) + 1e-3 * outputs.var(0).sum()


def of_a_fixed_size(module: nn.Module, batch: Batch) -> Tensor:
    if len(batch[0]) > 12:
        raise ValueError("a batch of 12 at most")
    return cases.cross_entropy(module, batch)


LOSSES: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "summed": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
    "class weights": lambda m, b: F.cross_entropy(m(b[0]), b[1], torch.tensor([1.0, 5.0, 0.2], dtype=b[0].dtype)),
    "contrastive": contrastive,
    "small variance term": small_variance_term,
    "by position": lambda m, b: cases.cross_entropy(m, b) * (1 + position_in_epoch() % 2),
    "of a fixed size": of_a_fixed_size,
    "coarse": lambda m, b: F.cross_entropy(m(b[0]).bfloat16(), b[1]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_are_not_merged(network: nn.Sequential, batches: Batches, name: str) -> None:
    found, expected = (
        hessian_spectrum(network, batches, LOSSES[name], steps=10, batch_size=size) for size in ("auto", None)
    )
    assert not is_merged(found)
    assert found.nodes.tolist() == expected.nodes.tolist()


def test_a_term_that_is_flat_at_the_weights_is_found_beside_them(network: nn.Sequential, batches: Batches) -> None:
    """With a last layer of zeros all outputs are zero, and so are their variance and its gradient."""
    nn.init.zeros_(network[2].weight)
    nn.init.zeros_(network[2].bias)
    assert not is_merged(hessian_spectrum(network, batches, small_variance_term, steps=10))


def test_batches_of_training_mode_or_with_other_shapes_stay_as_they_are(network: nn.Sequential, batches: Any) -> None:
    assert not is_merged(hessian_spectrum(network, batches, cases.cross_entropy, steps=5, mode="train"))
    batches = [[torch.randn(4, n, 5), torch.randint(3, (4,))] for n in (2, 3)]

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch[0]).mean(1), batch[1])

    assert not is_merged(hessian_spectrum(network, batches, loss, steps=5))
