"""Dense output: a small network labels the pixels of discs and squares, and an IoU metric ranks the checkpoints.

- The loss is a mean over pixels without those on the edges of shapes, so batches have unequal numbers of labeled
  pixels. `batch_weight` returns that number. Then the Hessian is that of the mean over all labeled pixels, however they
  are batched.
- `training_step` updates a JaccardIndex of torchmetrics and logs it. The analyses call `training_step`, too, but do not
  change the metric. HessianCheckpoint uses it as `train_metric`.

    python -m examples.segmentation
    python -m examples.segmentation --epochs 30
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex

from examples.shared import quiet
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE = 24
CLASSES = 3  # background, disc, square
EDGE = 255


def shapes(images: int, seed: int, noise: float = 0.3) -> TensorDataset:
    """Return noisy images of a disc and a square that may cover it, and the class of every pixel."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    labels = torch.zeros(images, SIZE, SIZE, dtype=torch.long)
    for label in labels:
        row, column = torch.randint(5, SIZE - 5, (2,), generator=generator)
        radius = 3 + 3 * torch.rand(1, generator=generator)
        mark(label, ((rows - row) ** 2 + (columns - column) ** 2).sqrt() - radius, 1)
        row, column = torch.randint(5, SIZE - 5, (2,), generator=generator)
        half = 2 + 3 * torch.rand(1, generator=generator)
        mark(label, torch.maximum((rows - row).abs(), (columns - column).abs()) - half, 2)
    drawn = (labels > 0).float() + noise * torch.randn(labels.shape, generator=generator)
    return TensorDataset(drawn[:, None], labels)


def mark(label: Tensor, distance: Tensor, shape: int) -> None:
    """Write a shape, given by signed distances to its outline, into the labels."""
    label[distance < 0] = shape
    label[distance.abs() < 0.5] = EDGE


def labeled_pixels(batch: list[Tensor]) -> float:
    """Return the weight of a batch: the number of pixels in the mean that is its loss."""
    return float((batch[1] != EDGE).sum())


class Segmenter(pl.LightningModule):
    """A network that processes the image at full and at half resolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine = nn.Sequential(*(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.GELU()))
        self.coarse = nn.Sequential(
            *(nn.AvgPool2d(2), nn.Conv2d(width, 2 * width, 5, padding=2), nn.GroupNorm(2, 2 * width), nn.GELU()),
            *(
                nn.Conv2d(2 * width, width, 5, padding=2),
                nn.GroupNorm(2, width),
                nn.GELU(),
                nn.Upsample(scale_factor=2),
            ),
        )
        self.head = nn.Conv2d(2 * width, CLASSES, 3, padding=1)
        self.train_iou, self.val_iou, self.test_iou = (
            MulticlassJaccardIndex(CLASSES, ignore_index=EDGE) for _ in range(3)
        )
        self.ious: list[tuple[float, float]] = []

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        logits: Tensor = self.head(torch.cat([fine, self.coarse(fine)], dim=1))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        logits = self(batch[0])
        self.train_iou(logits, batch[1])
        self.log("train_iou", self.train_iou, on_step=False, on_epoch=True, prog_bar=True)
        return F.cross_entropy(logits, batch[1], ignore_index=EDGE)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.val_iou(self(batch[0]), batch[1])
        self.log("val_iou", self.val_iou, prog_bar=True)

    def test_step(self, batch: list[Tensor]) -> None:
        self.test_iou(self(batch[0]), batch[1])
        self.log("test_iou", self.test_iou)

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.ious.append((float(metrics["train_iou"]), float(metrics["val_iou"])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(args: Sequence[str] | None = None) -> tuple[Segmenter, HessianSpectrumCallback, HessianCheckpoint]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="Lanczos steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/segmentation"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)  # more threads do not speed up so small a network, and slow it down on shared cores

    rule = HessianCheckpoint("highest_c_t", train_metric="train_iou", tolerance=0.1)
    spectra = HessianSpectrumCallback(
        every_n_epochs=2, num_samples=48, steps=options.steps, batch_weight=labeled_pixels, checkpoint=rule
    )
    with quiet():
        pl.seed_everything(options.seed, verbose=False)
        module = Segmenter()
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(options.log_dir, name=None),
            callbacks=[spectra],
            enable_model_summary=False,
        )
        training, validation = shapes(options.images, seed=0), shapes(64, seed=1)
        trainer.fit(module, DataLoader(training, batch_size=16, shuffle=True), DataLoader(validation, batch_size=64))
        [tested] = trainer.test(
            module, DataLoader(shapes(128, seed=2), batch_size=64), ckpt_path=rule.best_model_path, verbose=False
        )

    print("epoch  train IoU  val IoU      C_t   λ_max  type")
    for record in spectra.history:
        found, (train, val) = record.spectrum, module.ious[record.epoch]
        picked = "  picked" if rule.best is not None and rule.best.epoch == record.epoch else ""
        curvature = (
            record.error if found is None else f"{found.c_t:7.4f}  {found.lambda_max:6.3f}  {found.hesd_type}{picked}"
        )
        print(f"{record.epoch:5}  {train:9.4f}  {val:7.4f}  {curvature}")
    print(f"The pick has an IoU of {tested['test_iou']:.4f} on other images.")
    return module, spectra, rule


if __name__ == "__main__":
    main()
