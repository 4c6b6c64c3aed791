"""Settings of the study: one `Experiment` for each training, and the sizes that all of them share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Network = Literal["resnet", "vit"]
NETWORKS: tuple[Network, ...] = ("resnet", "vit")
STRONG_CLIP = 0.05
DENSER = 4


@dataclass(frozen=True)
class Setup:
    """Sizes that all experiments share; each is an option of the command line."""

    train_folder: str | None = field(default=None, metadata={"help": "class folders of PNG files, instead of digits"})
    gen_folder: str | None = field(default=None, metadata={"help": "the same classes from a shifted distribution"})
    train_size: int = field(default=900, metadata={"help": "training samples, at most 900 of the digits"})
    batch_size: int = field(default=64, metadata={"help": "training samples per step"})
    resnet_width: int = field(default=8, metadata={"help": "channels of the first stage; ResNet20: 16"})
    resnet_blocks: int = field(default=1, metadata={"help": "residual blocks per stage; ResNet20: 3"})
    vit_width: int = field(default=24, metadata={"help": "hidden dimension; ViT small: 384"})
    vit_depth: int = field(default=2, metadata={"help": "transformer blocks; ViT small: 12"})
    vit_heads: int = field(default=2, metadata={"help": "attention heads; ViT small: 6"})
    vit_patch: int = field(default=2, metadata={"help": "pixels along a patch; 4 for 32x32 images"})
    epochs: int = field(default=32, metadata={"help": "epochs of every training; the paper's go up to 1000"})
    points: int = field(default=4, metadata={"help": "how many of these epochs are analyzed, evenly spaced"})
    steps: int = field(default=40, metadata={"help": "Lanczos steps of every spectrum; the paper's: 100"})
    samples: int = field(default=256, metadata={"help": "samples of every spectrum"})
    accelerator: str = field(default="cpu", metadata={"help": "of Lightning's Trainer"})


@dataclass(frozen=True)
class Experiment:
    """One training.

    Attributes:
        name: Name in the report.
        network: Key of the network.
        optimizer: Key of `training.OPTIMIZERS`.
        setup: Sizes.
        seed: Seed of initialization and order of samples; the data are the same for every seed.
        task: "digits", or "colored" for pre-training (`data.Colored`).
        augment: Whether training images are augmented.
        clip: Largest global norm of gradients; None: not clipped.
        pretrained: Experiment whose weights to start from, except input layer and classifier.
        frozen: Whether these weights are frozen.
        full_analysis: Also analyze the initialization, the generalization data, the preconditioned Hessian, and at the
            end how clean held-out data compare.
        preconditioned: Also analyze the preconditioned Hessian.
        dense: Analyze more often, because MN spectra may last for a few epochs only; to spend less on each of these
            spectra, it takes as many steps as C_t needs.
    """

    name: str
    network: Network
    optimizer: str
    setup: Setup
    seed: int = 0
    task: Literal["digits", "colored"] = "digits"
    augment: bool = False
    clip: float | None = None
    pretrained: Experiment | None = None
    frozen: bool = False
    full_analysis: bool = False
    preconditioned: bool = False
    dense: bool = False

    @property
    def every(self) -> int:
        """Number of epochs from one analysis to the next; pre-training is analyzed at its end only."""
        if self.task == "colored":
            return self.setup.epochs
        usual = self.setup.epochs // self.setup.points
        return max(1, usual // DENSER) if self.dense else usual

    @property
    def folder(self) -> str:
        """Name of the folder of the outcome; it identifies the settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def experiments(setup: Setup, seeds: int) -> list[Experiment]:
    """Return all experiments, the longest first, so that both workers end at about the same time."""

    def vit(name: str, optimizer: str, **rest: object) -> Experiment:
        return Experiment(f"vit-{name}", "vit", optimizer, setup, **rest)  # type: ignore[arg-type]

    def resnet(name: str, optimizer: str, **rest: object) -> Experiment:
        return Experiment(f"resnet-{name}", "resnet", optimizer, setup, **rest)  # type: ignore[arg-type]

    pretraining = vit("pretraining", "adamw", task="colored")
    return [
        pretraining,
        vit("adahessian", "adahessian", preconditioned=True, dense=True),
        vit("adahessian-unaveraged", "adahessian-unaveraged", dense=True),
        resnet("adahessian", "adahessian", preconditioned=True, dense=True),
        vit("adamw-dense", "adamw", dense=True),
        *(
            make(f"adamw-seed{seed}", "adamw", seed=seed, full_analysis=True)
            for seed in range(seeds)
            for make in (resnet, vit)
        ),
        *(
            vit(f"{name}-clip-{clip:g}", name, clip=clip, preconditioned=True, dense=True)
            for name in ("adamw", "sgd-momentum")
            for clip in (1.0, STRONG_CLIP)
        ),
        vit("sgd", "sgd"),
        vit("sgd-momentum", "sgd-momentum"),
        resnet("sgd-momentum", "sgd-momentum"),
        *(vit(f"{name}-augmented", name, augment=True) for name in ("adamw", "sgd", "sgd-momentum")),
        *(
            vit(
                f"{name}-{'frozen' if frozen else 'tuned'}",
                f"{name}-tuning",
                pretrained=pretraining,
                frozen=frozen,
            )
            for name in ("sgd", "sgd-momentum")
            for frozen in (False, True)
        ),
    ]
