"""The leading eigenvectors of an analysis are compared with those of the analysis before."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hesd import SpectrumHistory
from lightning_hesd.training.loggers.output import figures
from tests.oracles import dense_hessian
from tests.training.modules import Copies, callback, fit, plain_loss, samples

COUNT = 3
BATCH = samples(range(32))


def tracking(**options: Any) -> Any:
    shared = {"dataloader": [BATCH], "loss_fn": plain_loss, "num_samples": 32, "dtype": torch.float64, "steps": 60}
    return callback(**shared, track_eigenvectors=COUNT, **options)


def test_overlap_is_that_of_dense_eigenvectors(tmp_path: Path) -> None:
    spectra, copies = tracking(), Copies()
    trainer = fit(tmp_path, spectra, copies, max_epochs=3)
    networks = [copies.networks[record.global_step] for record in spectra.history]
    hessians = [dense_hessian(network, [BATCH], plain_loss) for network in networks]
    leading = [torch.linalg.eigh(hessian).eigenvectors[:, -COUNT:] for hessian in hessians]
    expected = [float((a.T @ b).square().sum()) / COUNT for a, b in itertools.pairwise(leading)]
    found = [record.spectrum.subspace_overlap for record in spectra.history]
    assert found[0] is None
    assert found[1:] == pytest.approx(expected, abs=1e-4)
    assert all(0.1 < overlap < 0.9999 for overlap in expected)
    assert trainer.callback_metrics["hesd/subspace_overlap"] == pytest.approx(found[-1])


def test_the_loss_along_the_extreme_eigenvectors(tmp_path: Path) -> None:
    shared = {"num_samples": 32, "steps": 8, "generalization_dataloader": [samples(range(32, 64))]}
    plain, along = callback(**shared), callback(**shared, loss_along_eigenvectors=True)
    runs = [fit(tmp_path / name, used, max_epochs=1) for name, used in (("plain", plain), ("along", along))]
    weights = [trainer.lightning_module.state_dict().values() for trainer in runs]
    assert all(map(torch.equal, *weights))
    for record, other in zip(along.history, plain.history, strict=True):
        assert other.spectrum.losses_along.size == 0
        for spectrum in (record.spectrum, record.generalization):
            assert spectrum.losses_along.shape == (2, 2, 21)
            assert spectrum.losses_along[:, 1, 10] == pytest.approx(spectrum.loss, rel=1e-6)
            extremes = (spectrum.lambda_min, spectrum.lambda_max)
            for (distances, losses), value in zip(spectrum.losses_along, extremes, strict=True):
                second = (losses[11] - 2 * losses[10] + losses[9]) / distances[11] ** 2
                assert second == pytest.approx(value, rel=0.3, abs=1e-3)
    loaded = SpectrumHistory.load(runs[1].log_dir)
    assert loaded[-1].spectrum.losses_along.tobytes() == along.history[-1].spectrum.losses_along.tobytes()
    drawn = [tag for tag, _ in figures(along.history)]
    assert drawn == ["/density_figure", "/losses_along_figure", "_gen/density_figure", "_gen/losses_along_figure"]
    assert [tag for tag, _ in figures(plain.history)] == ["/density_figure", "_gen/density_figure"]


def test_no_overlap_without_a_krylov_basis(tmp_path: Path) -> None:
    spectra = tracking(basis="none")
    fit(tmp_path, spectra, max_epochs=2)
    assert [record.spectrum.subspace_overlap for record in spectra.history] == [None, None]
