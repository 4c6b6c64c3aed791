"""Training with the callback is the same to the last bit: in float32, in mixed precision, and when memory runs out."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu.finding import Finding, Setting, judged
from benchmarks.gpu.memory import capped, peak_of
from lightning_hesd import HessianSpectrumCallback, hessian_spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_hesd import Spectrum

CLASSES = 4
STEPS = 12
ROUNDING = 1e-4
"""Relative difference of spectra of one loss in float32 whose products are summed in another order."""


class Network(pl.LightningModule):
    """Convolutions with batch norm and dropout, attention over positions, and a head; it trains by Adam."""

    def __init__(self, width: int, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.Dropout(dropout)
        )
        self.attend = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (images, classes)."""
        x = self.body(images).flatten(2).transpose(1, 2)
        query, key, value = self.attend(x).unsqueeze(1).chunk(3, -1)  # with one head
        logits: Tensor = self.head((x + F.scaled_dot_product_attention(query, key, value).squeeze(1)).mean(1))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Return the mean cross-entropy, and log it."""
        found = loss(self, batch)
        self.log("loss", found)
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def loss(module: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a batch of images and labels."""
    return F.cross_entropy(module(batch[0]).float(), batch[1])


def data(samples: int, size: int = 6) -> TensorDataset:
    """Return random images and labels that depend on them."""
    images = torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(3))
    return TensorDataset(images, (2 * (images[:, 0].mean((1, 2)) > 0) + (images[:, 1].mean((1, 2)) > 0)).long())


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        module: The module, on the device.
        state: Weights, states of the optimizer and of the loss scaler, and of the random number generators.
        scale: The loss scale; None without a scaler.
    """

    module: Network
    state: list[Any]
    scale: float | None


def train(setting: Setting, callback: HessianSpectrumCallback | None, epochs: int = 2, **options: Any) -> Trained:
    """Train, deterministically; `options` are the Trainer's."""
    module = Network(6 if setting.is_small else 32)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that training could draw from
    loader = DataLoader(data(_samples(setting)), batch_size=16 if setting.is_small else 64, shuffle=True)
    devices: Any = [setting.device.index or 0] if setting.is_cuda else 1
    with tempfile.TemporaryDirectory() as folder, deterministic(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer = pl.Trainer(
            accelerator=setting.device.type,
            devices=devices,
            max_epochs=epochs,
            callbacks=[] if callback is None else [callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **options,
        )
        trainer.fit(module, loader)
        module.to(setting.device)  # the end of training has moved it to the CPU
        state = [
            module.state_dict(),
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            trainer.precision_plugin.state_dict(),
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(setting.device)] if setting.is_cuda else [],
            np.random.get_state()[1],  # type: ignore[index]  # noqa: NPY002
        ]
        scale = trainer.precision_plugin.state_dict().get("scale")
    return Trained(module, tree_leaves(state), scale)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms in this context."""
    before = torch.are_deterministic_algorithms_enabled()
    kept = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = kept or ":4096:8"
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        if kept is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def differing(first: Trained, second: Trained) -> int:
    """Return the number of values in two final states, tensors or others, that are not equal to the last bit."""
    pairs = zip(first.state, second.state, strict=True)
    return sum(not _is_equal(a, b) for a, b in pairs)


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return bool(np.array_equal(a, b))


def callback_of(**options: Any) -> HessianSpectrumCallback:
    """Return a callback that analyzes, monitors gradients, and raises what goes wrong."""
    usual: dict[str, Any] = {"steps": STEPS, "num_samples": 32, "monitor_gradients": True, "on_error": "raise"}
    return HessianSpectrumCallback(**usual | {"verbose": False} | options)


def spectra_of(callback: HessianSpectrumCallback) -> list[Spectrum]:
    """Return the spectra of the records that have one."""
    return [record.spectrum for record in callback.history if record.spectrum is not None]


def callback_batch(setting: Setting) -> tuple[Tensor, ...]:
    """Return the first samples of the training data, on the CPU."""
    images, labels = data(_samples(setting)).tensors
    return images[:32], labels[:32]


def _samples(setting: Setting) -> int:
    return 48 if setting.is_small else 512


def identity(setting: Setting) -> Iterator[Finding]:
    """Train with and without the callback, in float32."""
    plain = train(setting, None)
    options: dict[str, Any] = {"at_start": True, "preconditioner": "optimizer"}
    if not setting.is_small:
        options |= {"sampling_error": True, "layers": "auto"}
    callback = callback_of(**options)
    watched = train(setting, callback)
    changed = differing(plain, watched)
    spectra = spectra_of(callback)
    yield judged(
        "float32: training is the same to the last bit with the callback",
        not changed and len(spectra) == 3,
        f"{changed} of {len(plain.state)} values of the final state differ; {len(spectra)} analyses, "
        f"last C_t {spectra[-1].c_t:.5f}",
    )
    again = callback_of(**options)
    train(setting, again)
    same = all(np.array_equal(a.nodes, b.nodes) for a, b in zip(spectra, spectra_of(again), strict=True))
    yield judged(
        "float32: a second training finds the same spectra to the last bit",
        same,
        f"{len(spectra)} analyses of {spectra[0].steps_per_probe[0]} steps",
    )


def mixed_precision(setting: Setting) -> Iterator[Finding]:
    """Train in mixed precision, with a loss scaler that overflows and grows, with and without the callback."""
    for name in ("bf16-mixed", "16-mixed"):

        def plugin(name: str = name) -> MixedPrecision:
            scaler = None
            if name == "16-mixed":  # the first steps overflow, and are skipped; later ones let the scale grow
                scaler = torch.amp.GradScaler(setting.device.type, init_scale=2.0**21, growth_interval=2)
            return MixedPrecision(name, setting.device.type, scaler)  # type: ignore[arg-type]

        plain = train(setting, None, plugins=[plugin()])
        callback = callback_of(dataloader=[callback_batch(setting)])
        watched = train(setting, callback, plugins=[plugin()])
        changed = differing(plain, watched)
        scales = f"; loss scale 2^21 at first, 2^{math.log2(watched.scale):.0f} at last" if watched.scale else ""
        yield judged(
            f"{name}: training is the same to the last bit with the callback, the loss scaler too",
            not changed,
            f"{changed} of {len(plain.state)} values of the final state differ{scales}",
        )
        yield same_spectrum(f"{name}: the spectrum is that of the loss in float32", setting, callback, watched)


def same_spectrum(title: str, setting: Setting, callback: HessianSpectrumCallback, trained: Trained) -> Finding:
    """Compare the last spectrum with one that is computed without a Trainer, in float32."""
    found = spectra_of(callback)[-1]
    batch = [part.to(setting.device) for part in callback_batch(setting)]
    expected = hessian_spectrum(trained.module, [batch], loss, steps=STEPS)
    errors = [abs(getattr(found, name) / getattr(expected, name) - 1) for name in ("c_t", "lambda_max", "loss")]
    figures = "relative differences: C_t {:.1e}, λ_max {:.1e}, loss {:.1e}".format(*errors)
    return judged(title, max(errors) <= ROUNDING, f"{figures}, limit {ROUNDING:.0e}")


def out_of_memory(setting: Setting) -> Iterator[Finding]:
    """Cap the memory so that graphs do not fit, then so that nothing of an analysis fits; training goes on."""
    batches, size = (3, 64) if setting.is_small else (8, 2048)
    samples = list(DataLoader(data(batches * size), batch_size=size))
    options: dict[str, Any] = {"dataloader": samples, "memory_budget": 2**50, "basis": "none", "steps": 3}
    peaks = {}
    epochs = 1 if setting.is_small else 2
    plain, peaks["training"] = peak_of(setting, lambda: train(setting, None, epochs), reserved=True)
    for strategy in ("recompute", "graph"):
        work = partial(train, setting, callback_of(strategy=strategy, **options), epochs)
        _, peaks[strategy] = peak_of(setting, work, reserved=True)
    room = ", ".join(f"{name} {peak / 2**20:.1f}" for name, peak in peaks.items())

    callback = callback_of(**options)
    limit = (max(peaks["training"], peaks["recompute"]) + peaks["graph"]) / 2
    with capped(setting, limit):
        watched = train(setting, callback, epochs)
    spectrum = spectra_of(callback)[0]
    yield judged(
        "memory runs out: the analysis keeps no graphs, and training goes on to the last bit",
        spectrum.strategy == "recompute" and "out of memory" in spectrum.strategy_reason.lower()
        and not differing(plain, watched),
        f"MiB: {room}, cap {limit / 2**20:.1f}; {spectrum.strategy_reason[:160]}",
    )  # fmt: skip

    failing = callback_of(**options, on_error="warn")
    limit = (peaks["training"] + peaks["recompute"]) / 2
    with capped(setting, limit), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = train(setting, failing, epochs)
    errors = [record.error or "" for record in failing.history]
    yield judged(
        "memory runs out for any analysis: the record says so, and training goes on to the last bit",
        len(errors) == epochs and all("memory" in error for error in errors) and not differing(plain, watched),
        f"cap {limit / 2**20:.1f} MiB; {errors[-1][:160]}",
    )
