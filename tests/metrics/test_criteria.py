"""The criteria as torchmetrics: against Spectrum, in collections, over ranks, as plots."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_hesd import Spectrum, assess_generalization
from lightning_hesd.metrics import GeneralizationCriteria, HessianCriteria
from lightning_hesd.metrics.functional import generalization_criteria, hessian_criteria
from tests.ranks import ThreadRank, in_threads
from tests.spectra import nodes


def spectrum(seed: int = 0, probes: int = 2, steps: int = 9) -> Spectrum:
    """A spectrum of both signs whose probes have weights of their own."""
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(steps), size=probes)
    return nodes.spectrum(*np.sort(generator.normal(0.3, 1.0, size=steps)), weights=weights)


def values(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in found.items()}


def expected(found: Spectrum) -> dict[str, float]:
    extremes = {name: getattr(found, name) for name in ("c_t", "lambda_max", "lambda_min")}
    return {**extremes, "k_h05": found.k_h(0.5), "mp": float(found.hesd_type == "MP")}


def criteria(spectra: list[Spectrum], **options: Any) -> dict[str, float]:
    metric = HessianCriteria(**options)
    for found in spectra:
        metric.update(found)
    # The states are flat, so that torchmetrics gathers them whatever the numbers of probes and steps.
    assert {state.ndim for name in metric.metric_state for state in getattr(metric, name)} == {1}
    return values(metric.compute())


def test_metric_and_function_agree_with_the_spectrum() -> None:
    found = spectrum()
    assert criteria([found]) == expected(found)
    pair = torch.tensor(found.nodes), torch.tensor(found.weights)
    assert values(hessian_criteria(*pair, rounding=found.rounding)) == expected(found)
    of_tensors = HessianCriteria()
    of_tensors.update(*pair)
    assert values(of_tensors.compute()) == pytest.approx(expected(found))


def test_padded_probes_count_with_what_they_have() -> None:
    full, short = spectrum(probes=1, steps=9), spectrum(seed=5, probes=1, steps=4)
    found = criteria([full, short])
    assert found["lambda_max"] == max(full.lambda_max, short.lambda_max)
    assert found["k_h05"] == pytest.approx((full.k_h() + short.k_h()) / 2)
    assert found["c_t"] == found["lambda_min"] / found["lambda_max"]


def test_forward_gives_the_batch_and_compute_everything() -> None:
    metric, first, second = HessianCriteria(), spectrum(seed=0), spectrum(seed=1)
    metric(first)
    assert values(metric(second)) == expected(second)
    assert values(metric.compute())["lambda_max"] == max(first.lambda_max, second.lambda_max)
    metric.reset()
    metric.update(first)
    assert values(metric.compute()) == expected(first)


def test_in_a_collection_beside_others() -> None:
    collection = MetricCollection({"hessian": HessianCriteria()}, prefix="val_")
    found = spectrum()
    collection.update(found)
    assert collection.compute()["val_c_t"].item() == found.c_t
    copy = collection.clone(prefix="test_")
    assert copy.compute()["test_c_t"].item() == found.c_t
    assert len(MetricCollection([HessianCriteria(), MeanMetric()])) == 2


def test_generalization() -> None:
    train = spectrum()
    worse = replace(train, nodes=np.where(train.nodes < 0, 2 * train.nodes, train.nodes))
    metric = GeneralizationCriteria()
    metric.update(train, worse)
    assessment = assess_generalization(train, worse)
    assert metric.compute()["delta_r_e"].item() == pytest.approx(2.0) == assessment.delta_r_e
    assert metric.compute()["delta_k_h05"].item() == pytest.approx(assessment.delta_k_h05)
    pairs = [hessian_criteria(torch.tensor(s.nodes), torch.tensor(s.weights)) for s in (train, worse)]
    assert generalization_criteria(*pairs)["delta_r_e"].item() == pytest.approx(2.0)


def test_undefined_is_nan() -> None:
    ones = torch.full((3,), 1 / 3)
    flat = values(hessian_criteria(torch.zeros(3), ones))
    assert all(math.isnan(flat[name]) for name in ("c_t", "k_h05", "mp"))
    convex = hessian_criteria(torch.tensor([0.5, 1.0, 2.0]), ones)
    assert (convex["c_t"].item(), convex["mp"].item()) == (0.0, 1.0)
    assert math.isnan(generalization_criteria(convex, convex)["delta_r_e"].item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"nodes of shape \(3,\) came without `weights`"),
        ((torch.ones(3), torch.ones(2)), r"must have the same shape.*got \(3,\) and \(2,\)"),
        ((torch.full((2,), torch.nan), torch.zeros(2)), r"a node that is not NaN"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 3)), r"\(probes, steps\) or \(steps,\)"),
        ((spectrum(), torch.ones(2)), "`weights` must be left out with a Spectrum"),
    ],
)
def test_misuse_is_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianCriteria().update(*arguments)


def test_plots() -> None:
    metric = HessianCriteria()
    metric.update(spectrum())
    _, axes = metric.plot()
    assert isinstance(axes, Axes)
    assert set(axes.get_legend_handles_labels()[1]) == {"c_t", "lambda_max", "lambda_min", "k_h05", "mp"}
    _, axes = metric.plot([metric(spectrum(seed=1)), metric(spectrum(seed=2))])
    assert [len(line.get_xdata()) for line in axes.lines] == [2] * 5


def test_ranks_pool_their_probes() -> None:
    spectra = [spectrum(seed=seed, probes=1, steps=9 - 2 * seed) for seed in range(3)]

    def work(ranks: ThreadRank) -> dict[str, float]:
        options = {"dist_sync_fn": ranks.gather, "distributed_available_fn": lambda: True}
        return criteria(spectra[:1] if ranks.rank == 0 else spectra[1:], **options)

    assert in_threads(2, work) == [pytest.approx(criteria(spectra))] * 2
