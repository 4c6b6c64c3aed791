"""How accurate: stopping at a tolerance, the sampling error, and as many samples as that takes."""

from pathlib import Path
from typing import Any

import pytest

from lightning_hesd import HessianSpectrumCallback
from tests.training.modules import Digits, callback, fit, loader, plain_loss

DATA = 1024


def observer_of(**options: Any) -> HessianSpectrumCallback:
    return callback(**{"steps": 60, "dataloader": loader(Digits(DATA), batch_size=128), **options})


def test_k_h05_is_not_logged_for_varying_steps(tmp_path: Path) -> None:
    observer = observer_of(tolerance=0.05)
    trainer = fit(tmp_path, observer, max_epochs=1)
    assert observer.history[-1].spectrum.converged
    assert observer.history[-1].spectrum.steps < 60
    assert "hesd/k_h05" not in trainer.callback_metrics
    assert "hesd/c_t" in trainer.callback_metrics


def test_the_sampling_error_is_logged_and_kept(tmp_path: Path) -> None:
    observer = observer_of(tolerance="auto", num_samples=64)
    trainer = fit(tmp_path, observer, max_epochs=1)
    spectrum = observer.history[-1].spectrum
    assert spectrum.converged
    assert 0 < spectrum.c_t_error <= spectrum.c_t_sampling_error / 4
    assert spectrum.c_t_total_error == spectrum.c_t_error + spectrum.c_t_sampling_error
    assert trainer.callback_metrics["hesd/c_t_sampling_error"] == pytest.approx(spectrum.c_t_sampling_error)
    restored = HessianSpectrumCallback(num_samples=64)
    restored.load_state_dict(observer.state_dict())
    assert restored.history[-1].spectrum.to_dict().keys() == spectrum.to_dict().keys()
    assert restored.history[-1].spectrum.c_t_sampling_error == spectrum.c_t_sampling_error


def test_samples_grow_until_the_sampling_error_meets_the_tolerance(tmp_path: Path) -> None:
    observer = observer_of(num_samples="auto", tolerance=0.25, loss_fn=plain_loss)
    fit(tmp_path, observer)
    first, second = (record.spectrum for record in observer.history)
    for spectrum in (first, second):
        assert spectrum.c_t_sampling_error <= spectrum.allowed_error or spectrum.num_samples == DATA
    assert 256 <= first.num_samples <= second.num_samples  # what was added stays


def test_samples_grow_to_all_data_and_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    few = observer_of(num_samples=256)
    many = observer_of(num_samples="auto", tolerance=1e-3)
    for observer in (few, many):
        fit(tmp_path, observer, max_epochs=1)
    spectrum = many.history[-1].spectrum
    assert spectrum.num_samples == DATA
    assert spectrum.c_t_sampling_error > spectrum.allowed_error
    drawn = [observer.state_dict()["samples"]["training"]["indices"] for observer in (few, many)]
    assert set(drawn[1]) == set(range(DATA))
    assert len(set(drawn[0])) == 256
    resumed = observer_of(num_samples="auto", tolerance=1e-3)
    resumed.load_state_dict(many.state_dict())
    assert resumed.state_dict()["samples"]["training"]["num_samples"] >= DATA
