"""Analyze both networks of a GAN with manual optimization: two callbacks, each with its own loss and parameters.

With manual optimization `training_step` returns no loss, and calling it would change the weights. So each callback gets
a `loss_fn(module, batch)`, and `parameters` that selects its network: one Hessian is that of the generator's loss with
respect to the generator, the other that of the discriminator's loss with respect to the discriminator. The noise of the
forward pass is the same in every HVP and in every analysis.

The points to imitate lie around the corners of an octagon. Even a generator that has found all corners is not at a
minimum of its loss, because the loss changes with the discriminator: λ_min stays clearly negative. C_t approaches 0
because λ_max grows.

    python -m examples.gan
    python -m examples.gan --epochs 80
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.shared import quiet
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Sequence

NOISE = 8
ANGLES = 2 * math.pi * torch.arange(8) / 8
CORNERS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
SPREAD = 0.1


def octagon(points: int = 2048) -> TensorDataset:
    """Return points around the corners."""
    generator = torch.Generator().manual_seed(0)
    corners = CORNERS[torch.randint(len(CORNERS), (points,), generator=generator)]
    return TensorDataset(corners + SPREAD * torch.randn(points, 2, generator=generator))


def network(inputs: int, outputs: int, width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.SiLU()), *(nn.Linear(width, width), nn.SiLU()), nn.Linear(width, outputs)
    )


class GAN(pl.LightningModule):
    """Two networks, two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = network(NOISE, 2)
        self.discriminator = network(2, 1)

    def training_step(self, batch: list[Tensor]) -> None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        for optimizer, loss_fn in zip(optimizers, (discriminator_loss, generator_loss), strict=True):
            loss = loss_fn(self, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log(loss_fn.__name__, loss, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = (self.discriminator, self.generator)
        return [torch.optim.Adam(player.parameters(), lr=1e-3, betas=(0.5, 0.99)) for player in players]


def generated(module: GAN, batch: list[Tensor]) -> Tensor:
    [real] = batch
    points: Tensor = module.generator(torch.randn(len(real), NOISE, device=real.device))
    return points


def discriminator_loss(module: GAN, batch: list[Tensor]) -> Tensor:
    """Return the discriminator's loss in classifying points as real or generated."""
    real, fake = module.discriminator(batch[0]), module.discriminator(generated(module, batch).detach())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(module: GAN, batch: list[Tensor]) -> Tensor:
    """Return the generator's loss: it is small if the discriminator takes generated points for real ones."""
    return F.softplus(-module.discriminator(generated(module, batch))).mean()


def corners_found(module: GAN) -> tuple[int, float]:
    """Return the number of corners that are imitated, and the share of generated points near a corner."""
    with torch.no_grad():
        points = module.generator(torch.randn(2000, NOISE, generator=torch.Generator().manual_seed(1)))
    distance, nearest = torch.cdist(points, CORNERS).min(dim=1)
    near = nearest[distance < 4 * SPREAD]
    return int((torch.bincount(near, minlength=len(CORNERS)) >= 20).sum()), len(near) / len(points)


def main(args: Sequence[str] | None = None) -> dict[str, HessianSpectrumCallback]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="epochs between analyses")
    parser.add_argument("--steps", type=int, default=40, help="Lanczos steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/gan"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)  # more threads do not speed up so small a network, and slow it down on shared cores

    spectra = {
        "generator": HessianSpectrumCallback(
            name="generator",
            loss_fn=generator_loss,
            parameters=lambda name, _: name.startswith("generator."),
            every_n_epochs=options.every,
            steps=options.steps,
        ),
        "discriminator": HessianSpectrumCallback(
            name="discriminator",
            loss_fn=discriminator_loss,
            parameters=lambda name, _: name.startswith("discriminator."),
            every_n_epochs=options.every,
            steps=options.steps,
        ),
    }
    with quiet():
        pl.seed_everything(options.seed, verbose=False)
        module = GAN()
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(options.log_dir, name=None),
            callbacks=list(spectra.values()),
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(octagon(), batch_size=128, shuffle=True))

    print(f"{'':7}" + "".join(f"{name:^44}" for name in spectra))
    print("epoch  " + 2 * "    loss      C_t     λ_min     λ_max  type  ")
    for records in zip(*(callback.history for callback in spectra.values()), strict=True):
        row = f"{records[0].epoch:5}  "
        for record in records:
            found = record.spectrum
            row += (
                f"{record.error:44}"
                if found is None
                else f"{found.loss:8.4f}  {found.c_t:7.4f}  {found.lambda_min:8.4f}  {found.lambda_max:8.4f}  "
                f"{found.hesd_type:4}  "
            )
        print(row.rstrip())
    corners, share = corners_found(module)
    print(f"The generator has found {corners} of 8 corners; {share:.0%} of its points are near one.")
    return spectra


if __name__ == "__main__":
    main()
