"""Train with LightningCLI: model, data, callback and checkpoint rule all come from a YAML file.

`config.yaml` beside this file sets options of every kind. `--print_config` shows all others with their defaults,
`--trainer.callbacks.help lightning_hesd.HessianSpectrumCallback` explains them, and arguments of the command line
override them. An unknown name or a wrong value ends the command before training.

    python -m examples.lightning_cli.main fit --config examples/lightning_cli/config.yaml
    python -m examples.lightning_cli.main fit --config examples/lightning_cli/config.yaml --print_config
    python -m examples.lightning_cli.main fit --config examples/lightning_cli/config.yaml \\
        --trainer.callbacks.steps 80 --trainer.max_epochs 24

The run's folder then holds a complete config.yaml. It can repeat the run, and analyze its checkpoints again:

    lightning-hesd analyze runs/lightning_cli/version_0/checkpoints/*.ckpt --generalization val \\
        --config runs/lightning_cli/version_0/config.yaml --out runs/lightning_cli/version_0/again
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI

from examples.shared import quiet
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Sequence


class CLI(LightningCLI):
    """A LightningCLI that prints the results at the end of training."""

    def after_fit(self) -> None:
        """Print the assessment of each analysis, and the pick of the rule."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for spectra in callbacks:
            if isinstance(spectra, HessianSpectrumCallback):
                for record in spectra.history:
                    print(f"epoch {record.epoch:2}: {record.assessment or record.spectrum or record.error}")
        for rule in callbacks:
            if isinstance(rule, HessianCheckpoint):
                print(f"best by {rule.rule}: {rule.best_model_path}")


def main(args: Sequence[str] | None = None) -> CLI:
    torch.set_num_threads(1)  # more threads do not speed up so small a network, and slow it down on shared cores
    with quiet():
        return CLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,  # so that the saved config.yaml names the classes
            subclass_mode_data=True,
            args=None if args is None else list(args),
        )


if __name__ == "__main__":
    main()
