"""What is said once: why a spectrum is MN, and that a quasi-singular one no longer measures flatness."""

import logging
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.paper_hesd.adahessian import AdaHessian
from lightning_hesd import HessianSpectrumCallback
from tests.training.scripted import make_trainer

LOADER = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4)


@pytest.fixture(autouse=True)
def information(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


class Saddle(pl.LightningModule):
    """Its loss has one positive and one larger negative curvature: MN."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, 0.1]))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.w.square() * torch.tensor([1.0, -3.0])).sum() * batch[0].mean() + 10

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def saddle(module: Saddle, batch: Any) -> torch.Tensor:
    return Saddle.training_step(module, batch, 0)


class SaddleWithAdaHessian(Saddle):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx), create_graph=True)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdaHessian(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("net", "monitor", "clip", "expected"),
    [
        (Saddle, True, 0.001, "gradients were clipped in 100% of the sampled steps, to 0.00"),
        (Saddle, False, 0.001, r"the Trainer clips gradients \(gradient_clip_val=0.001\)"),
        (Saddle, True, None, "none was found"),
        (Saddle, False, None, "unknown; `monitor_gradients=True` looks for it"),
        (SaddleWithAdaHessian, True, None, "AdaHessian averages the Hessian's diagonal over space"),
    ],
)
def test_mn_is_explained_once(
    tmp_path: Path, net: Any, monitor: bool, clip: Any, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    spectra = HessianSpectrumCallback(steps=2, num_samples=8, monitor_gradients=monitor, loss_fn=saddle)
    make_trainer(tmp_path, [spectra], 2, gradient_clip_val=clip).fit(net(), LOADER)
    [said] = [message for message in caplog.messages if "is MN" in message]
    assert said.startswith("hesd: the spectrum of epoch 0 is MN (C_t = -3), so the criteria of generalization")
    assert re.search(f"Likely cause: {expected}", said)


def test_a_largest_eigenvalue_that_falls_at_the_same_loss_is_quasi_singular(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, at the first of the epochs."""
    rest, curvature = [10.0, 1.0, 2.9, 2.9], [100.0, 100.0, 5.0, 4.0]  # by epoch, of a loss of 12, 3, 3 and 3

    def loss_fn(module: Saddle, batch: Any) -> torch.Tensor:
        return rest[module.current_epoch] + curvature[module.current_epoch] * module.w.square().sum()

    spectra = HessianSpectrumCallback(steps=2, num_samples=8, loss_fn=loss_fn)
    make_trainer(tmp_path, [spectra], 4).fit(Saddle(), LOADER)
    [said] = [message for message in caplog.messages if "quasi-singular" in message]
    assert "the spectrum of epoch 2 is quasi-singular: the largest eigenvalue fell to 10 while" in said
    assert "Largest eigenvalue and trace no longer mean flatness; prefer C_t" in said


def test_samples_without_a_sampling_error_have_spectra_and_one_warning(tmp_path: Path) -> None:
    spectra = HessianSpectrumCallback(steps=2, num_samples=8, loss_fn=saddle, sampling_error=True)
    with pytest.warns(RuntimeWarning, match="hesd: no sampling error: .* does not depend on the values") as warned:
        make_trainer(tmp_path, [spectra], 2).fit(Saddle(), LOADER)
    assert len([w for w in warned if "no sampling error" in str(w.message)]) == 1
    assert [record.spectrum.c_t for record in spectra.history] == pytest.approx([-3, -3])
