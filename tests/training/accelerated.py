"""Cases on the stand-in accelerator, which `test_accelerator.py` starts as a program: its device cannot be taken back.

A single process writes how each of them went to `<out>/rank0.json`, and what training found; of two, which train
together, each writes the latter.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_hesd import (
    HessianOperator,
    HessianSpectrumCallback,
    Spectrum,
    hessian_spectrum,
    layer_spectra,
    top_eigenpairs,
)
from lightning_hesd.metrics import HessianCriteria
from lightning_hesd.numerics.derivatives import attention, fast_derivatives
from lightning_hesd.sample_size.bounds import network_bound
from lightning_hesd.sample_size.directions import dominant_directions
from lightning_hesd.sample_size.sample_losses import per_sample_losses
from lightning_hesd.sample_size.subspace import subspace_stabilization
from lightning_hesd.training.checkpoints.weights import AnalyzedWeights
from lightning_hesd.training.samples import first_batches
from tests.standin import NAME, STANDIN

torch.set_num_threads(1)

DEVICE = torch.device(NAME, 0)


class StandinAccelerator(Accelerator):
    """What Lightning needs to train on the stand-in."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE] * int(devices)

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


AcceleratorRegistry.register(NAME, StandinAccelerator)


_choose_strategy = _AcceleratorConnector._choose_strategy


def _strategy(connector: Any) -> Any:
    is_alone = connector._accelerator_flag == NAME and len(connector._parallel_devices) == 1
    return SingleDeviceStrategy(device=DEVICE) if is_alone else _choose_strategy(connector)


# Let `accelerator="auto"` take the stand-in, as it takes a GPU where there is one: Lightning knows those by name.
_AcceleratorConnector._choose_auto_accelerator = staticmethod(lambda: NAME)
_AcceleratorConnector._choose_strategy = _strategy


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


class Net(pl.LightningModule):
    """A small network with running statistics and, if wanted, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)]
        self.net = nn.Sequential(*layers)
        with torch.no_grad():
            layers[0].weight.mul_(3.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch[0].device == self.device == DEVICE
        loss = mean_loss(self, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def mean_loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def batches(device: torch.device | str = DEVICE) -> list[list[Tensor]]:
    return [[x.to(device), y.to(device)] for x, y in zip(X.split(40), Y.split(40), strict=True)]


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=16)


def fit(callback: Any, *, net: Any = None, data: Any = None, ckpt: Any = None, epochs: int = 1, **options: Any) -> Any:
    """Train, with `accelerator="auto"` unless `options` say otherwise."""
    STANDIN.manual_seed(5)
    net = net or Net()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callback and [callback], **(quiet | options))
    trainer.fit(net, loader() if data is None else data, ckpt_path=ckpt, weights_only=None)
    return trainer


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def values(spectrum: Spectrum) -> list[float]:
    return [spectrum.c_t, spectrum.lambda_max, spectrum.lambda_min, spectrum.loss, spectrum.trace]


def of_any_device(case: Any) -> Any:
    """Mark a case as one to run with float64, too, not only without."""
    case.of_any_device = True
    return case


ROUNDING = 2e-4
"""Relative difference of curvatures whose gradients were summed in another order: a thousand epsilons of float32."""


def diagonals(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().abs() + 1 for name, p in net.named_parameters()}


OUTPUTS = {"output_fn": lambda m, b: m.net(b[0]), "output_loss": lambda o, b: F.cross_entropy(o, b[1])}

ANALYSES: dict[str, dict[str, Any]] = {
    "recomputed": {},
    "retained": {"strategy": "graph"},
    "differences": {"strategy": "finite_difference"},
    "basis_on_the_cpu": {"basis": "cpu"},
    "no_basis": {"basis": "none", "probe": "rademacher"},
    "until_accurate": {"tolerance": 0.05, "sampling_error": True, "probes": 2},
    "ggn": {"matrix": "ggn", **OUTPUTS},
    "residual": {"matrix": "residual", **OUTPUTS},
    "preconditioned": {"preconditioner": diagonals},
    "training_mode": {"mode": "train"},
}


def analyzed(name: str) -> None:
    """An analysis on the device finds what it finds on the CPU, with the same start vectors."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        net = Net().to(device)
        options = {key: value(net) if value is diagonals else value for key, value in ANALYSES[name].items()}
        found.append(hessian_spectrum(net, batches(device), mean_loss, steps=4, **options))
    on_cpu, on_device = found
    assert values(on_device) == pytest.approx(values(on_cpu), rel=20 * ROUNDING if name == "differences" else ROUNDING)
    assert on_cpu.verified == "yes"
    assert on_device.verified == "yes" or (name == "ggn" and not STANDIN.has_float64)
    words = "float64" if STANDIN.has_float64 else f"the finest on {NAME}"
    assert words in on_device.verification
    if name == "until_accurate":
        assert on_device.c_t_sampling_error == pytest.approx(on_cpu.c_t_sampling_error, rel=20 * ROUNDING)


def waits(**options: Any) -> int:
    """Return how often the computer waits for the device in eight Lanczos steps; the eighth reads coefficients."""
    counts = []
    for steps in (8, 16):
        with STANDIN.counted() as seen:
            hessian_spectrum(Net().to(DEVICE), batches(), mean_loss, steps=steps, **options)
        counts.append(len(seen))
    return counts[1] - counts[0]


@of_any_device
def case_nothing_waits_in_a_step() -> None:
    assert waits(strategy="graph") == 1
    if STANDIN.has_float64:
        assert waits(strategy="recompute") == 1
        # Running statistics are compared where a graph holds them, which its thread may not have let go of yet.
        assert waits(strategy="recompute", mode="train") < 8
        # Differences wait once in a step, whatever the number of batches.
        assert len(batches()) > 1
        assert waits(strategy="finite_difference") == 1 + 8


def case_default_device() -> None:
    """All is the same where new tensors are on the device by default, as some scripts want it."""

    def found() -> list[Any]:
        net = Net().to(DEVICE)
        with HessianOperator(net, batches(), mean_loss) as hessian:
            pairs = top_eigenpairs(hessian, 2)
        spectra = [
            hessian_spectrum(net, batches(), mean_loss, steps=2, sampling_error=True, loss_along_eigenvectors=True),
            hessian_spectrum(net, batches(), mean_loss, steps=2, probe="rademacher", strategy="finite_difference"),
            *layer_spectra(net, batches(), mean_loss, layers=["net.4"], steps=2).values(),
        ]
        callback = HessianSpectrumCallback(steps=2, num_samples=40, monitor_gradients=True, on_error="raise")
        fit(callback, enable_checkpointing=False)
        spectra.append(callback.history[0].spectrum)
        return [pairs.values.tolist(), [values(spectrum) for spectrum in spectra]]

    expected = found()
    torch.set_default_device(DEVICE)
    try:
        assert found() == expected
    finally:
        torch.set_default_device(None)


class Heads(nn.Module):
    """Attention with the queries of six heads, those of keys and values shared by two each, as parameters."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, heads, 5, 3) for heads in (6, 3, 3)]
        self.inputs = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.register_buffer("mask", torch.rand(5, 5, generator=generator) < 0.7 if masked else None)

    def forward(self) -> Tensor:
        attended = F.scaled_dot_product_attention(*self.inputs, self.mask, is_causal=self.mask is None, enable_gqa=True)
        return attended.sin().square().mean()


def case_attention() -> None:
    """Attention in blocks computes several heads at once, as accelerators need it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_derivatives, "_LONG", 0)
        patch.setattr(attention, "_MIN_ROWS", 2)
        # The pair of heads at once, one head, a part of a head.
        for masked, size in ((False, 2 * 25), (True, 2 * 25 - 1), (False, 10), (True, 10)):
            patch.setattr(attention, "_BLOCK_ELSEWHERE", size)
            found = []
            for device in (torch.device("cpu"), DEVICE):
                net = Heads(masked).to(device)
                vector = torch.randn(2 * 12 * 15, generator=torch.Generator().manual_seed(1))
                with HessianOperator(net, [torch.zeros(1)], lambda module, _: module()) as hessian:
                    found.append((hessian @ vector).cpu())
            assert (found[1] - found[0]).norm() <= ROUNDING * found[0].norm()
    counts = [operations(heads) for heads in (1, 4)]
    assert counts[0] == counts[1]


def operations(heads: int) -> int:
    """Return the number of matrix products of an HVP of attention with some heads."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counter.count += func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, heads, 4, 2).to(DEVICE).requires_grad_()
    with Counter():
        loss = attention.long_attention(x, x, x, None, 1.0, causal=True).sin().sum()
        [gradient] = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)
    return Counter.count


def case_layers() -> None:
    net = Net()
    on_cpu = layer_spectra(net, batches("cpu"), mean_loss, steps=6)
    on_device = layer_spectra(net.to(DEVICE), batches(), mean_loss, steps=6)
    for name, spectrum in on_cpu.items():
        assert values(on_device[name]) == pytest.approx(values(spectrum), rel=ROUNDING)


@of_any_device
def case_float64_is_refused_where_there_is_none() -> None:
    net = Net().to(DEVICE)
    if STANDIN.has_float64:
        hessian_spectrum(net, batches(), mean_loss, steps=2, dtype=torch.float64)
        return
    with pytest.raises(ValueError, match=r"`dtype=torch.float64` is not available on .*standin:0: leave it None"):
        hessian_spectrum(net, batches(), mean_loss, steps=2, dtype=torch.float64)


@of_any_device
def case_random_numbers_of_the_device() -> None:
    """Each evaluation draws the same dropout, and the generator goes on from where it was."""
    before = STANDIN.get_rng_state()
    spectrum = hessian_spectrum(Net(0.5).to(DEVICE), batches(), mean_loss, steps=4, mode="train", strategy="recompute")
    assert torch.equal(STANDIN.get_rng_state(), before)
    assert spectrum.verified == "yes"


@of_any_device
def case_fit() -> None:
    """Training is the same, the spectrum is that of an analysis on the CPU, picks load."""
    plain, net = Net(0.3), Net(0.3)
    fit(None, net=plain, enable_checkpointing=False)
    generator = STANDIN.get_rng_state()
    data = {"dataloader": batches("cpu"), "generalization_dataloader": batches("cpu")[:1]}
    further = {"layers": "net.4", "monitor_gradients": True, "preconditioner": "optimizer"}
    callback = HessianSpectrumCallback(steps=3, **data, **further, checkpoint="highest_c_t", on_error="raise")
    trainer = fit(callback, net=net)
    assert trainer.strategy.root_device == DEVICE
    assert same(plain, net)
    assert torch.equal(STANDIN.get_rng_state(), generator)
    record = callback.history[-1]
    expected = hessian_spectrum(net.cpu(), batches("cpu"), mean_loss, steps=3)
    assert values(record.spectrum) == pytest.approx(values(expected), rel=ROUNDING)
    assert record.spectrum.verified == "yes"
    assert record.preconditioned is not None
    assert record.layers
    assert record.generalization is not None
    assert {"hesd/clip_factor", "hesd/gradient_cosine"} <= trainer.callback_metrics.keys()
    picked = torch.load(callback.checkpoint.best_model_path, map_location="cpu", weights_only=True)
    assert picked["state_dict"].keys() == net.state_dict().keys()


def case_resume() -> None:
    options: dict[str, Any] = {"steps": 2, "num_samples": 20, "mode": "eval", "on_error": "raise"}
    whole, first, second = (HessianSpectrumCallback(**options) for _ in range(3))
    fit(whole, epochs=2, enable_checkpointing=False)
    fit(first, enable_checkpointing=False).save_checkpoint("first.ckpt")
    fit(second, epochs=2, ckpt="first.ckpt", enable_checkpointing=False)
    assert [r.spectrum.c_t for r in second.history] == [r.spectrum.c_t for r in whole.history]


class Stream(IterableDataset[Any]):
    """Samples one after another."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y, strict=True)


def case_batches_of_training_are_kept() -> None:
    callback = HessianSpectrumCallback(steps=3, num_samples=64, on_error="raise")
    plain, net = Net(), Net()
    first_batches.MAX_DEVICE_BYTES = 2 * X[:16].nbytes  # the others go to the CPU
    for observer, trained in ((None, plain), (callback, net)):
        fit(observer, net=trained, enable_checkpointing=False, data=DataLoader(Stream(), batch_size=16))
    assert same(plain, net)
    expected = hessian_spectrum(net.cpu(), loader(), mean_loss, steps=3)
    assert values(callback.history[0].spectrum) == pytest.approx(values(expected), rel=ROUNDING)


def case_checkpoints_may_be_finer_than_the_device() -> None:
    net = Net().to(DEVICE)
    weights = AnalyzedWeights(net)
    assert weights.missed_by({name: value.cpu().double() for name, value in net.state_dict().items()}) is None
    assert weights.missed_by({"net.0.bias": net.net[0].bias.detach().cpu().double() + 1}) == "net.0.bias"


def case_samples_are_added() -> None:
    callback = HessianSpectrumCallback(steps=2, num_samples="auto", tolerance=0.1, batch_size=8, on_error="raise")
    fit(callback)
    assert callback.history[0].spectrum.num_samples == len(X)
    assert callback.history[0].spectrum.c_t_sampling_error > 0


def case_autocast() -> None:
    """Training computes in bfloat16, and the analysis in the type of the parameters."""
    callback = HessianSpectrumCallback(steps=3, on_error="raise")
    net = Net()
    fit(callback, net=net, plugins=[MixedPrecision("bf16-mixed", NAME)])
    expected = hessian_spectrum(net.cpu(), loader(), mean_loss, steps=3)
    assert values(callback.history[0].spectrum) == pytest.approx(values(expected), rel=ROUNDING)


def case_metrics() -> None:
    spectrum = hessian_spectrum(Net(), batches("cpu"), mean_loss, steps=6)
    metric = HessianCriteria().to(DEVICE)
    metric.update(spectrum)
    found = metric.compute()["c_t"]
    assert found.device == DEVICE
    assert found.item() == pytest.approx(spectrum.c_t, rel=1e-6)


def case_landscape() -> None:
    def losses(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    found = []
    for device in (torch.device("cpu"), DEVICE):
        net, data = Net().net.to(device).eval(), batches(device)
        directions = dominant_directions(net, data, losses, 1, steps=6).directions
        settling = subspace_stabilization(net, data, losses, directions, sigma=0.1, draws=2, orders=2)
        bound = network_bound(nn.Sequential(net[0], nn.ReLU(), net[4]), data[0][0])
        found.append([per_sample_losses(net, data, losses).mean(), settling.constant, bound])
    assert found[1] == pytest.approx(found[0], rel=20 * ROUNDING)


TAKES_LONG = ".*analyses will take about"  # than these trainings of a few steps

CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}
CASES |= {f"analysis_{name}": partial(analyzed, name) for name in ANALYSES}


def outcome(case: Any, folder: Path) -> str | None:
    """Return None if a case passes, and else what went wrong."""
    folder.mkdir()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for harmless in (".*LeafSpec", ".*does not have many workers", ".*smaller than the logging", TAKES_LONG):
                warnings.filterwarnings("ignore", harmless)
            case()
    except BaseException:  # noqa: BLE001 - what it is does not matter
        return traceback.format_exc()
    return None


class TogetherWithoutWrapper(DDPStrategy):
    """Does not wrap the module, of which PyTorch's own part in C++ knows no such device: all train on the same data."""

    def configure_ddp(self) -> None: ...


def collectives_of_the_device() -> None:
    """Let collectives take tensors of the device, and no others, as those of GPUs do."""
    for name in ("all_reduce", "broadcast"):
        collective = getattr(dist, name)

        def by_cpu(tensor: Tensor, *args: Any, collective: Any = collective, **kwargs: Any) -> None:
            assert tensor.device == DEVICE, "not on the device"
            copy = tensor.cpu()
            collective(copy, *args, **kwargs)
            tensor.copy_(copy)

        setattr(dist, name, by_cpu)


def train_together(folder: Path, size: int) -> list[list[float]]:
    strategy: Any = "auto"
    if size > 1:
        dist.init_process_group("gloo")
        collectives_of_the_device()
        strategy = TogetherWithoutWrapper(process_group_backend="gloo")
    options = {"steps": 3, "num_samples": 40, "batch_size": 4, "sampling_error": True, "monitor_gradients": True}
    callback = HessianSpectrumCallback(**options, checkpoint="highest_c_t", on_error="raise")
    fit(callback, strategy=strategy, devices=size, use_distributed_sampler=False, default_root_dir=folder)
    return [[*values(r.spectrum), r.spectrum.num_samples, r.spectrum.c_t_sampling_error] for r in callback.history]


def outcomes(folder: Path, *, float64: bool) -> dict[str, str | None]:
    """Run the cases; with float64 only those of which that matters."""
    STANDIN.has_float64 = float64
    chosen = {name: case for name, case in CASES.items() if not float64 or hasattr(case, "of_any_device")}
    return {name: outcome(case, folder / f"{name}-{float64}") for name, case in chosen.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    result: dict[str, Any] = {}
    if size == 1:
        result = {f"float64={float64}": outcomes(folder, float64=float64) for float64 in (True, False)}
    STANDIN.has_float64 = False
    result["training"] = train_together(folder, size)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
