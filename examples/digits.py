"""Watch the Hessian's spectrum while small networks learn handwritten digits, and let it pick the weights.

A residual CNN and a small ViT are trained on scikit-learn's 8x8 digits. After every third epoch the callback estimates
the spectrum of the Hessian of the training loss, and two rules pick a checkpoint, each among the analyzed epochs whose
training accuracy is within 0.01 of the best:

- highest C_t, the rule of Gabdullin (2025);
- lowest largest eigenvalue (λ_max), the rule that paper compares it with.

The rules do not use the generalization set (held-out digits, rotated, shifted and noisy). It shows, at the end, how
well the picks generalize, and the judge says what follows from these runs.

    python examples/digits.py
    python examples/digits.py --model vit --optimizer sgd-momentum --epochs 72 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd import SpectrumHistory


def digits(train_size: int = 1200) -> tuple[TensorDataset, TensorDataset]:
    """Return the training set, and a generalization set of held-out digits from a shifted distribution."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    generator = torch.Generator().manual_seed(0)  # the same split and the same distortions for every seed of a run
    order = torch.randperm(len(images), generator=generator)
    train, held_out = order[:train_size], order[train_size:]
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(distort(images[held_out].repeat(3, 1, 1, 1), generator), labels[held_out].repeat(3)),
    )


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate each image by up to 15 degrees, shift it by up to one pixel, and add noise."""
    angle, right, down = torch.rand(3, len(images), generator=generator).mul(2).sub(1)
    angle, pixel = angle * math.radians(15), 2 / images.shape[-1]
    rows = [angle.cos(), -angle.sin(), right * pixel, angle.sin(), angle.cos(), down * pixel]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved + 0.1 * torch.randn(moved.shape, generator=generator)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width),
        ResidualBlock(width, 2 * width, stride=2),
        ResidualBlock(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class ViT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2, heads: int = 2, patch: int = 2) -> None:
        super().__init__()
        tokens = (8 // patch) ** 2
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(tokens * width, 10)  # reads all tokens; this learns faster here than their mean

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.blocks(tokens).flatten(1))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "vit": ViT}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
}


class Classifier(pl.LightningModule):
    """An ordinary LightningModule; the spectrum needs no code in it."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.train_acc, self.gen_acc, self.test_acc = (MulticlassAccuracy(10, average="micro") for _ in range(3))
        self.accuracies: dict[int, tuple[float, float]] = {}  # epoch: (training, generalization)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.gen_acc(self.network(batch[0]), batch[1])
        self.log("gen_acc", self.gen_acc, prog_bar=True)

    def test_step(self, batch: list[Tensor]) -> None:
        self.test_acc(self.network(batch[0]), batch[1])
        self.log("test_acc", self.test_acc)

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.accuracies[self.current_epoch] = float(metrics["train_acc"]), float(metrics["gen_acc"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Run(NamedTuple):
    """The results of one training run."""

    log_dir: str
    history: SpectrumHistory
    accuracies: dict[int, tuple[float, float]]
    picks: dict[str, tuple[int, float]]  # rule: (epoch, generalization accuracy)


def train(name: str, args: argparse.Namespace) -> Run:
    """Train one network, and test the picks of both rules."""
    pl.seed_everything(args.seed, verbose=False)
    model = Classifier(NETWORKS[name](), args.optimizer)
    training_set, generalization_set = digits()
    generalization_loader = DataLoader(generalization_set, batch_size=256)

    by_c_t = HessianCheckpoint("highest_c_t", train_metric="train_acc")
    by_lambda_max = HessianCheckpoint("lowest_max_eigenvalue", train_metric="train_acc")
    spectra = HessianSpectrumCallback(
        every_n_epochs=3,
        at_start=True,
        num_samples=args.samples,  # fewer than the default, as `steps`, to be fast
        batch_size=args.samples,
        steps=40,
        generalization_dataloader=generalization_loader,  # for the assessment; the rules do not use it
        loss_along_eigenvectors=True,  # 42 evaluations of the samples, for a figure
        checkpoint=by_c_t,  # this one becomes the Trainer's "best"
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(args.log_dir, name=name),
        callbacks=[spectra, by_lambda_max],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(training_set, batch_size=64, shuffle=True), generalization_loader)

    picks = {}
    for rule, checkpoint, path in (
        ("highest C_t", by_c_t, "best"),
        ("lowest λ_max", by_lambda_max, by_lambda_max.best_model_path),
    ):
        [metrics] = trainer.test(model, generalization_loader, ckpt_path=path, verbose=False)
        assert checkpoint.best is not None  # set after the first analysis
        picks[rule] = checkpoint.best.epoch, metrics["test_acc"]
    return Run(str(trainer.log_dir), spectra.history, model.accuracies, picks)


def report(run: Run) -> None:
    """Print one row for each analysis, and the picks of the rules."""
    print(f"\n{run.log_dir}\nepoch  train acc  gen acc      C_t  [interval]             λ_max  type  picked by")
    for record in run.history:
        row = f"{record.epoch:5}" if record.epoch >= 0 else "start"
        accuracies = run.accuracies.get(record.epoch)
        row += "  {:9.4f}  {:7.4f}".format(*accuracies) if accuracies else f"  {'-':>9}  {'-':>7}"
        if record.spectrum is None:
            print(f"{row}  {record.error}")
            continue
        c_t, (low, high) = record.spectrum.c_t, record.spectrum.c_t_interval
        rules = " and ".join(rule for rule, (picked, _) in run.picks.items() if picked == record.epoch)
        print(
            f"{row}  {c_t:7.4f}  [{low:7.4f}, {high:7.4f}]  {record.spectrum.lambda_max:7.3f}  "
            f"{record.spectrum.hesd_type}    {rules}".rstrip()
        )
    for rule, (epoch, gen_acc) in run.picks.items():
        print(f"{rule:12} picks epoch {epoch:2}, generalization accuracy {gen_acc:.4f}")
    best, (_, gen_acc) = max(run.accuracies.items(), key=lambda item: item[1][1])
    print(f"in hindsight epoch {best:2} was best, generalization accuracy {gen_acc:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*NETWORKS, "both"], default="both")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--samples", type=int, default=200, help="of each analysis (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/digits"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # more threads hardly speed up such small networks, and slow them down on shared cores
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for harmless in (
        ".*does not have many workers",  # the data are in memory
        ".*LeafSpec.*deprecated",  # Lightning 2.6 with torch 2.13
    ):
        warnings.filterwarnings("ignore", message=harmless)

    runs = [train(name, args) for name in (NETWORKS if args.model == "both" else [args.model])]
    for run in runs:
        report(run)
    print(f"\n{judge({run.log_dir: run.history for run in runs}, 'gen_acc').sentence}")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    if tensorboard.is_relative_to(Path.cwd()):
        tensorboard = tensorboard.relative_to(Path.cwd())
    print(f"Curves, densities and figures: {tensorboard} --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
