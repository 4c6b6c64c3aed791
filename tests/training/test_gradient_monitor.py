"""What the monitor says of gradients that a real Trainer clips, in every way there is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.training.gradient_monitor import GradientMonitor
from tests.training.broken import out_of_luck
from tests.training.digits_run import Net, data
from tests.training.logs import read_csv
from tests.training.scripted import make_trainer

UNTOUCHED = {"clipped_share": 0, "clip_factor": 1, "gradient_cosine": 1, "update_cosine": 1}


class SGDNet(Net):
    """Keeps the norms of its gradients, as backward leaves them."""

    def __init__(self, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.norms: list[float] = []

    def on_after_backward(self) -> None:
        self.norms.append(float(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]).norm()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer(self.parameters(), lr=0.01)
        return optimizer


class OwnClipping(SGDNet):
    def configure_gradient_clipping(self, optimizer: Any, *_args: Any, **_kwargs: Any) -> None:
        for p in self.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)


class Manual(SGDNet):
    """Clips the gradients of the first of its optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        found: Any = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        self.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizers[0], gradient_clip_val=0.001, gradient_clip_algorithm="norm")
        for optimizer in optimizers:
            optimizer.step()
        return loss


class TwoOptimizers(Manual):
    """The first layer is clipped, the last is not."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


def fit(
    tmp_path: Path, net: pl.LightningModule, *, epochs: int = 1, monitor: bool = True, **arguments: Any
) -> dict[str, float]:
    """Train, and return the last values that were logged."""
    torch.manual_seed(0)
    spectra = HessianSpectrumCallback(
        epochs=[epochs - 1],
        steps=4,
        num_samples=40,
        monitor_gradients=monitor,
        loss_fn=None if net.automatic_optimization else lambda module, batch: Net.training_step(module, batch, 0),
    )
    trainer = make_trainer(tmp_path, [spectra], epochs, **arguments)
    trainer.fit(net, data())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    metrics = trainer.callback_metrics
    logged = {key: float(metrics[f"hesd/{key}"]) for key in UNTOUCHED if f"hesd/{key}" in metrics}
    [record] = spectra.history
    assert {key: value for key, value in record.gradients.items() if key != "steps"} == pytest.approx(logged, rel=1e-6)
    return logged


def clipped_to(threshold: float) -> Callable[[SGDNet], float]:
    return lambda net: sum(threshold / norm for norm in net.norms) / len(net.norms)


@pytest.mark.parametrize(
    ("kind", "arguments", "clip_factor"),
    [
        (SGDNet, {}, None),
        (SGDNet, {"accumulate_grad_batches": 2}, None),
        (SGDNet, {"gradient_clip_val": 0.01}, clipped_to(0.01)),
        (OwnClipping, {}, lambda _: 0.5),
        (Manual, {}, clipped_to(0.001)),
    ],
    ids=["plain", "accumulated", "by norm", "by the module", "manual"],
)
def test_gradients_that_keep_their_direction(
    kind: type[SGDNet], arguments: dict[str, Any], clip_factor: Callable[[SGDNet], float] | None, tmp_path: Path
) -> None:
    found = fit(tmp_path, net := kind(), **arguments)
    clipping = {} if clip_factor is None else {"clipped_share": 1, "clip_factor": clip_factor(net)}
    assert found == pytest.approx(UNTOUCHED | clipping, rel=1e-4)


def test_a_share_of_the_steps_is_clipped(tmp_path: Path) -> None:
    free, net = SGDNet(), SGDNet()
    fit(tmp_path / "free", free)
    threshold = sorted(free.norms)[len(free.norms) // 2]
    found = fit(tmp_path / "clipped", net, gradient_clip_val=threshold)
    above = [norm for norm in net.norms if norm > threshold]
    assert 0 < len(above) < len(net.norms)
    assert found["clipped_share"] == pytest.approx(len(above) / len(net.norms))
    assert found["clip_factor"] == pytest.approx(sum(threshold / norm for norm in above) / len(above), rel=1e-3)


def test_a_failure_ends_the_looking_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientMonitor, "_compare", out_of_luck)
    with pytest.warns(RuntimeWarning, match="the gradients will no longer be monitored. OSError: no luck") as said:
        found = fit(tmp_path, SGDNet())
    assert len([w for w in said if "monitored" in str(w.message)]) == 1
    assert found == {}


def test_clipping_by_value_turns_the_gradient_and_adam_the_update_only(tmp_path: Path) -> None:
    by_value = fit(tmp_path / "value", SGDNet(), gradient_clip_val=0.002, gradient_clip_algorithm="value")
    assert by_value["clipped_share"] == 1
    assert 0.3 < by_value["gradient_cosine"] < 0.99
    assert by_value["update_cosine"] == pytest.approx(by_value["gradient_cosine"], abs=1e-4)

    adam = fit(tmp_path / "adam", SGDNet(torch.optim.Adam))
    assert adam["clipped_share"] == 0
    assert adam["gradient_cosine"] == pytest.approx(1, abs=1e-4)
    assert 0.1 < adam["update_cosine"] < 0.95


def test_each_of_several_optimizers_counts(tmp_path: Path) -> None:
    found = fit(tmp_path, TwoOptimizers())
    assert found["clipped_share"] == 0.5
    assert found["update_cosine"] == pytest.approx(1, abs=1e-4)


def test_every_epoch_is_logged_by_itself(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, SGDNet(), epochs=3, logger=logger, gradient_clip_val=0.01)
    rows = [row for row in read_csv(Path(logger.log_dir) / "metrics.csv") if row.get("hesd/clip_factor")]
    assert [row["step"] for row in rows] == ["3", "7", "11"]
    assert len({row["hesd/clip_factor"] for row in rows}) == 3


def test_long_epochs_are_sampled(tmp_path: Path) -> None:
    steps: list[int] = []
    loader = DataLoader(TensorDataset(torch.rand(100, 64), torch.randint(10, (100,))), batch_size=2)
    spectra = HessianSpectrumCallback(epochs=[5], num_samples=8, monitor_gradients=True)
    trainer = make_trainer(tmp_path, [spectra], 1)
    monitor: Any = spectra._monitor
    compare = monitor._compare
    monitor._compare = lambda o: (compare(o), steps.append(len(monitor._rows)))
    trainer.fit(SGDNet(), loader)
    assert steps[-1] == 13  # every 4th of 50
    assert not monitor._raw
