"""Fine-tune with frozen layers: which weights does the spectrum belong to?

A network learns the digits 0 to 4. Then it gets a new head for 5 to 9. At first only the head is trained; later
BaseFinetuning unfreezes the body. Two callbacks analyze the same loss:

- "trained" analyzes the parameters that require grad (the default). The loss of a linear head alone is convex: there is
  no negative curvature, and C_t is 0 up to rounding. This says nothing about the whole network.
- "all" has `include_frozen=True`: it analyzes all weights that the loss depends on. Its C_t can be compared over the
  whole training.

From the epoch that unfreezes the body, both spectra are equal.

    python -m examples.finetuning
    python -m examples.finetuning --epochs 16 --thaw 8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.shared import quiet
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Sequence

FEATURES = 32


def digits(first: int, last: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return the digits from `first` to `last`, labeled from 0."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    wanted = (labels >= first) & (labels <= last)
    data = TensorDataset(images[wanted].float().reshape(-1, 1, 8, 8) / 16, labels[wanted] - first)
    return DataLoader(data, batch_size=64, shuffle=True)


class Classifier(pl.LightningModule):
    """A convolutional body and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Flatten(), nn.Linear(256, FEATURES), nn.GELU()),
        )
        self.new_head()

    def new_head(self) -> None:
        self.head = nn.Linear(FEATURES, 5)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        logits = self.head(self.body(batch[0]))
        self.log("train_acc", (logits.argmax(1) == batch[1]).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-3)


class Thaw(BaseFinetuning):
    """Trains the head alone before an epoch, and from then on also the body, at a tenth of the learning rate."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, initial_denom_lr=10)


def main(args: Sequence[str] | None = None) -> dict[str, HessianSpectrumCallback]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=8, help="epochs on the digits 0 to 4")
    parser.add_argument("--epochs", type=int, default=12, help="epochs on the digits 5 to 9")
    parser.add_argument("--thaw", type=int, default=6, help="the first of these epochs, 0-based, that trains the body")
    parser.add_argument("--steps", type=int, default=40, help="Lanczos steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/finetuning"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)  # more threads do not speed up so small a network, and slow it down on shared cores

    spectra = {
        "trained": HessianSpectrumCallback(name="trained", every_n_epochs=2, steps=options.steps),
        "all": HessianSpectrumCallback(name="all", every_n_epochs=2, steps=options.steps, include_frozen=True),
    }
    with quiet():
        pl.seed_everything(options.seed, verbose=False)
        module = Classifier()
        pretraining = pl.Trainer(
            max_epochs=options.pretraining,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        pretraining.fit(module, digits(0, 4))
        print(f"accuracy on 0 to 4 after pretraining: {float(pretraining.callback_metrics['train_acc']):.4f}")
        module.new_head()
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(options.log_dir, name=None),
            callbacks=[Thaw(options.thaw), *spectra.values()],
            log_every_n_steps=10,
            enable_model_summary=False,
        )
        trainer.fit(module, digits(5, 9))

    print("epoch  spectrum of  parameters      C_t  [interval]            λ_max    loss")
    for records in zip(*(callback.history for callback in spectra.values()), strict=True):
        for name, record in zip(spectra, records, strict=True):
            found = record.spectrum
            if found is None:
                print(f"{record.epoch:5}  {name:11}  {record.error}")
                continue
            low, high = found.c_t_interval
            print(
                f"{record.epoch:5}  {name:11}  {found.dimension:10}  {found.c_t:7.4f}  [{low:7.4f}, {high:7.4f}]  "
                f"{found.lambda_max:7.3f}  {found.loss:6.4f}"
            )
    print(f"accuracy on 5 to 9: {float(trainer.callback_metrics['train_acc']):.4f}")
    return spectra


if __name__ == "__main__":
    main()
