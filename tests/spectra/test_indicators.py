"""Indicators of layers against the same sums over eigenvalues."""

import math

import numpy as np
import pytest

from lightning_hesd import Spectrum, layer_spectra
from lightning_hesd.spectra.indicators import effective_rank, layer_indicators, near_zero_share, negative_share
from tests import cases, oracles
from tests.spectra import nodes


def exact(eigenvalues: list[float]) -> Spectrum:
    """A spectrum whose nodes are all eigenvalues, each of weight 1/n."""
    return nodes.spectrum(*sorted(eigenvalues), dimension=len(eigenvalues), rounding=1e-12)


EIGENVALUES = [-2.0, -0.01, 0.0, 0.001, 0.5, 4.0, 4.0]


def test_effective_rank_is_the_exponential_of_the_entropy():
    sizes = np.abs(np.array(EIGENVALUES))
    p = sizes[sizes > 0] / sizes.sum()
    assert effective_rank(exact(EIGENVALUES)) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
    assert effective_rank(exact([3.0] * 5)) == pytest.approx(5)
    assert effective_rank(exact([0.0, 0.0, 7.0])) == pytest.approx(1)
    assert math.isnan(effective_rank(exact([0.0, 0.0])))


def test_near_zero_and_negative_shares():
    spectrum = exact(EIGENVALUES)
    assert near_zero_share(spectrum) == pytest.approx(3 / 7)
    assert near_zero_share(spectrum, relative=0.2) == pytest.approx(4 / 7)
    assert negative_share(spectrum) == pytest.approx(2.01 / 10.511, rel=1e-12)
    assert negative_share(exact([1.0, 2.0])) == 0
    assert math.isnan(negative_share(exact([0.0])))


def test_probes_of_unequal_length_count_alike():
    weights = [[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]
    unequal = {"nodes": [[-1.0, 0.5, 4.0], [-0.5, 3.0, math.nan]], "steps_per_probe": (3, 2), "dimension": 10}
    spectrum = nodes.spectrum(0, 0, 0, weights=weights, **unequal)
    assert near_zero_share(spectrum, relative=0.2) == pytest.approx(0.5)  # 0.5 and -0.5: a half of each probe
    total = 10 * (0.25 + 0.25 + 1 + 0.25 + 1.5) / 2
    logs = 10 * (0.25 * math.log(0.5) + math.log(4) + 0.25 * math.log(0.5) + 1.5 * math.log(3)) / 2
    assert effective_rank(spectrum) == pytest.approx(math.exp(math.log(total) - logs / total), rel=1e-12)
    assert negative_share(spectrum) == pytest.approx(0.5 / 3.25, rel=1e-12)


def test_estimates_are_right_in_the_mean_over_probes():
    everything = oracles.case_eigenvalues("mlp")
    starts = np.random.default_rng(0).normal(size=(60, len(everything)))
    weights = starts**2 / (starts**2).sum(axis=1, keepdims=True)
    spectrum = nodes.spectrum(*everything, weights=weights, dimension=len(everything), rounding=1e-12)
    sizes = np.abs(everything)
    p = sizes[sizes > 1e-12] / sizes.sum()
    assert effective_rank(spectrum) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=0.05)
    assert negative_share(spectrum) == pytest.approx(sizes[everything < 0].sum() / sizes.sum(), rel=0.1)
    assert near_zero_share(spectrum) == pytest.approx((sizes <= 0.01 * sizes.max()).mean(), abs=0.03)


def test_layers_share_the_trace_if_it_is_positive():
    spectra = layer_spectra(*cases.make("mlp"), steps=10)
    found = layer_indicators(spectra)
    assert sum(layer.trace_share for layer in found.values()) == pytest.approx(1)
    assert list(found) == ["0", "2"]
    assert found["2"].trace_share == pytest.approx(spectra["2"].trace / sum(s.trace for s in spectra.values()))
    assert (found["0"].c_t, found["0"].lambda_max) == (spectra["0"].c_t, spectra["0"].lambda_max)
    [layer] = layer_indicators({"all": exact([-1.0, 0.5])}).values()
    assert math.isnan(layer.trace_share)
