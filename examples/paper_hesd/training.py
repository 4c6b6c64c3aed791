"""One training in Lightning, with the callbacks that analyze it."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from examples.paper_hesd.adahessian import AdaHessian
from examples.paper_hesd.data import load, rand_augment
from examples.paper_hesd.networks import ViT, build
from examples.paper_hesd.outcomes import WEIGHTS, Row, is_done, write
from examples.shared import quiet, silent_trainer
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from examples.paper_hesd.data import Images
    from examples.paper_hesd.settings import Experiment

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "sgd-tuning": partial(torch.optim.SGD, lr=0.03),
    "sgd-momentum-tuning": partial(torch.optim.SGD, lr=0.006, momentum=0.9),
    "adahessian": AdaHessian,
    "adahessian-unaveraged": partial(AdaHessian, averaged=False),
}
GRADIENT_KEYS = ("clipped_share", "clip_factor", "gradient_cosine", "update_cosine")
EVALUATION_BATCH = 512
DENSE_TOLERANCE = 0.1


class Classifier(pl.LightningModule):
    def __init__(self, network: nn.Module, classes: int, optimizer: str, *, augment: bool) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.augment = augment
        self.train_acc, self.val_acc, self.gen_acc = (MulticlassAccuracy(classes, average="micro") for _ in range(3))

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:  # noqa: ARG002
        images, labels = batch
        return [rand_augment(images) if self.augment and self.trainer.training else images, labels]

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        self.train_acc(logits, labels)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        name, accuracy = (("val_acc", self.val_acc), ("gen_acc", self.gen_acc))[dataloader_idx]
        accuracy(self.network(batch[0]), batch[1])
        self.log(name, accuracy, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])


class SecondOrderClassifier(Classifier):
    """A classifier for AdaHessian, which needs the graph of the gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor]) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            self.manual_backward(self.loss(batch), create_graph=True)
            optimizer.step()


def plain_loss(module: Classifier, batch: list[Tensor]) -> Tensor:
    """Return the loss, for callbacks that cannot call `training_step`, because it would train."""
    return F.cross_entropy(module.network(batch[0]), batch[1])


class RowKeeper(pl.Callback):
    """Stores a row of numbers for each analyzed epoch."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[Row] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every:
            return
        metrics = trainer.callback_metrics
        row = Row(
            epoch=trainer.current_epoch,
            **{name: float(metrics[name]) for name in ("train_acc", "val_acc", "gen_acc")},
            squared_norm=sum(float(p.detach().square().sum()) for p in pl_module.parameters()),
            gradients={key: float(metrics[f"hesd/{key}"]) for key in GRADIENT_KEYS if f"hesd/{key}" in metrics},
        )
        self.rows.append(row)


def run(experiment: Experiment, out: Path) -> float:
    """Train and write the outcome, unless it exists. Return the seconds this took."""
    folder = out / experiment.folder
    if is_done(folder):
        return 0.0
    torch.set_num_threads(1)  # more threads hardly help here, and the other worker needs the core
    started = time.perf_counter()
    with quiet():
        _train(experiment, out, folder, started)
    return time.perf_counter() - started


def _train(experiment: Experiment, out: Path, folder: Path, started: float) -> None:
    setup = experiment.setup
    pl.seed_everything(experiment.seed, verbose=False)
    data = load(setup, experiment.task)
    network = build(experiment.network, data.train[0][0], data.classes, setup)
    if experiment.pretrained is not None:
        assert isinstance(network, ViT)
        weights = torch.load(out / experiment.pretrained.folder / WEIGHTS, weights_only=True)
        network.adopt(weights, freeze=experiment.frozen)
    kind = SecondOrderClassifier if experiment.optimizer.startswith("adahessian") else Classifier
    model = kind(network, data.classes, experiment.optimizer, augment=experiment.augment)

    evaluation = partial(DataLoader, batch_size=EVALUATION_BATCH)
    rows = RowKeeper(experiment.every)
    trainer = silent_trainer(
        folder,
        max_epochs=setup.epochs,
        check_val_every_n_epoch=experiment.every,
        gradient_clip_val=experiment.clip,
        accelerator=setup.accelerator,
        callbacks=[*spectra(experiment, data.validation, data.generalization), rows],
    )
    trainer.fit(
        model,
        DataLoader(data.train, batch_size=setup.batch_size, shuffle=True),
        [evaluation(data.validation), evaluation(data.generalization)],
    )
    torch.save(network.state_dict(), folder / WEIGHTS)
    parameters = sum(p.numel() for p in network.parameters())
    found = {"rows": [asdict(row) for row in rows.rows], "parameters": parameters, "distinct": data.distinct}
    write(experiment, folder, time.perf_counter() - started, **found)


def spectra(experiment: Experiment, validation: Images, generalization: Images) -> list[pl.Callback]:
    """Return the callbacks that analyze this experiment."""
    setup = experiment.setup
    analyze = partial(
        HessianSpectrumCallback,
        num_samples=setup.samples,
        batch_size=setup.samples,  # small images: all in one batch
        steps=setup.steps,
        tolerance=DENSE_TOLERANCE if experiment.dense else None,  # K_H05 needs the same number of steps on all data
        loss_fn=plain_loss if experiment.optimizer.startswith("adahessian") else None,
        progress=False,
    )
    evaluation = partial(DataLoader, batch_size=EVALUATION_BATCH)
    full = experiment.full_analysis
    callbacks: list[pl.Callback] = [
        analyze(
            every_n_epochs=experiment.every,
            at_start=full,
            generalization_dataloader=evaluation(generalization) if full else None,
            preconditioner="optimizer" if full or experiment.preconditioned else None,
            monitor_gradients=True,
        )
    ]
    last = [setup.epochs - 1]
    if full:  # a control: data on which the network generalizes
        callbacks.append(analyze(epochs=last, generalization_dataloader=evaluation(validation), name="clean"))
    if experiment.frozen:
        callbacks.append(analyze(epochs=last, include_frozen=True, name="all"))
    return callbacks
