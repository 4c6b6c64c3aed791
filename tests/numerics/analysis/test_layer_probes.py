"""`layer_probes`: more random vectors make the traces of layers more accurate, at one product each."""

import numpy as np
import torch

from lightning_hesd import hessian_spectrum
from tests import cases
from tests.oracles import dense_hessian

SEEDS = range(12)


def test_traces_of_layers_are_as_accurate_as_so_many_vectors_make_them() -> None:
    problem = cases.make("mlp")
    hessian = dense_hessian(problem.module, problem.batches, problem.loss_fn)
    spectra = {
        probes: [hessian_spectrum(*problem, steps=6, seed=seed, layer_probes=probes) for seed in SEEDS]
        for probes in (0, 15)
    }
    sizes = [layer.dimension for layer in spectra[0][0].by_layer.values()]
    expected = np.array([float(part.sum()) for part in torch.split(hessian.diagonal(), sizes)])
    errors, stated = {}, {}
    for probes, found in spectra.items():
        traces = np.array([[layer.trace for layer in spectrum.by_layer.values()] for spectrum in found])
        stated[probes] = np.array([[layer.trace_error for layer in s.by_layer.values()] for s in found])
        errors[probes] = np.sqrt(((traces - expected) ** 2).mean(axis=0))
        assert (np.abs(traces - expected) <= 3 * stated[probes]).all()
        assert {spectrum.matvecs for spectrum in found} == {6 + probes}
    assert (errors[15] < 0.5 * errors[0]).all()
    assert (np.median(stated[15], axis=0) < 0.5 * np.median(stated[0], axis=0)).all()


def test_the_spectrum_itself_does_not_change() -> None:
    plain, probed = (hessian_spectrum(*cases.make("mlp"), steps=6, layer_probes=probes) for probes in (0, 3))
    np.testing.assert_array_equal(plain.nodes, probed.nodes)
    assert plain.trace == probed.trace
    bounds = [[layer.lambda_max_bounds for layer in s.by_layer.values()] for s in (plain, probed)]
    assert bounds[0] == bounds[1]


def test_no_vectors_without_a_krylov_basis() -> None:
    spectrum = hessian_spectrum(*cases.make("mlp"), steps=6, layer_probes=3, basis="none")
    assert (spectrum.by_layer, spectrum.matvecs) == ({}, 6)
