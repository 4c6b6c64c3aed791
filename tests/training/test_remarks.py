"""What is said once: why a spectrum is MN, and that a quasi-singular one no longer measures flatness."""

from __future__ import annotations

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
from lightning_hesd.training.gradient_monitor import MANIPULATING
from tests.training.digits_run import Net, data
from tests.training.scripted import make_trainer


def said_in(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [message for record in caplog.records if words in (message := record.getMessage())]


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


AVERAGES = "AdaHessian averages the Hessian's diagonal over space"


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("net", "monitor", "clip", "expected"),
    [
        (Saddle, True, 0.001, "gradients were clipped in 100% of the sampled steps, to 0.00"),
        (Saddle, False, 0.001, r"the Trainer clips gradients \(gradient_clip_val=0.001\)"),
        (Saddle, True, None, "none was found"),
        (Saddle, False, None, "unknown; `monitor_gradients=True` looks for one"),
        (SaddleWithAdaHessian, False, None, AVERAGES),
        (SaddleWithAdaHessian, True, None, AVERAGES),
    ],
)
def test_mn_is_explained_once(
    tmp_path: Path, net: type[Saddle], monitor: bool, clip: float | None, expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    loader = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4)
    spectra = HessianSpectrumCallback(steps=2, num_samples=8, monitor_gradients=monitor, loss_fn=saddle)
    trainer = make_trainer(tmp_path, [spectra], 2, gradient_clip_val=clip)
    with caplog.at_level(logging.INFO):
        trainer.fit(net(), loader)
    [said] = said_in(caplog, "is MN")
    assert said.startswith("hesd: the spectrum of epoch 0 is MN (C_t = -3), so the criteria of generalization")
    assert re.search(f"Likely cause: {expected}", said)


@pytest.mark.parametrize(("name", "how"), MANIPULATING.items())
def test_every_optimizer_that_manipulates_gradients_is_named(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Named(Saddle):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = type(name.upper(), (torch.optim.SGD,), {})(self.parameters(), lr=1e-3)
            return optimizer

    loader = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4)
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, [HessianSpectrumCallback(steps=2, num_samples=8)], 1).fit(Named(), loader)
    [said] = said_in(caplog, "is MN")
    assert f"Likely cause: {name.upper()} {how}." in said


def test_excessive_training_makes_a_spectrum_quasi_singular(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    spectra = HessianSpectrumCallback(every_n_epochs=10, at_start=True, steps=12, num_samples=160)
    trainer = make_trainer(tmp_path, [spectra], 130)
    with caplog.at_level(logging.INFO):
        trainer.fit(Net(), data())
    found = {record.epoch: record.spectrum for record in spectra.history if record.spectrum is not None}
    near = 0.05 * (found[-1].loss - min(s.loss for s in found.values()))
    fallen = [
        epoch
        for epoch, now in found.items()
        if any(now.lambda_max <= s.lambda_max / 10 and abs(now.loss - s.loss) <= near for s in found.values())
    ]
    assert len(fallen) > 1
    assert all(found[epoch].type_certain and found[epoch].hesd_type == "MP" for epoch in fallen)
    [said] = said_in(caplog, "quasi-singular")
    assert f"the spectrum of epoch {fallen[0]} is quasi-singular: the largest eigenvalue fell to 0.0" in said
    assert "Largest eigenvalue and trace no longer mean flatness; prefer C_t" in said
