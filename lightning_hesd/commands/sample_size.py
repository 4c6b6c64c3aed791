"""`lightning-hesd sample-size`: how many samples are enough at the weights of checkpoints."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING

from lightning_hesd.commands.project_arguments import (
    MODE,
    add_project,
    checkpoints_of,
    project_of,
    separated,
    without_advice,
)
from lightning_hesd.sample_size.recommendation import (
    SampleSize,
    Stability,
    find_sample_size,
    pilot_options,
    recommend_sample_size,
)
from lightning_hesd.training.analyzer import Analysis
from lightning_hesd.training.loss_mode import AnalysisMode

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser, Namespace

    from lightning_hesd.commands.project import Checkpoint

__all__ = ["add_arguments", "run", "separated"]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_project(parser, in_one_process=True)
    parser.add_function_arguments(recommend_sample_size, skip={"module", "batches", "loss_fn", "mode"})
    (parser.groups or {})["recommend_sample_size"].title = "What is enough, and how to find out"
    parser.add_argument("--mode", type=AnalysisMode, default="auto", help=MODE)


def run(config: Namespace) -> None:
    """Print how many samples are enough at each checkpoint, and why."""
    project = project_of(config)
    stability = Stability(config.tolerance, config.loss_tolerance)
    names = [name for name in inspect.signature(pilot_options).parameters if name != "mode"]
    options = pilot_options(**{name: config[name] for name in names}, mode="eval")  # which the mode replaces
    analysis = Analysis("sample size", partial(find_sample_size, stability=stability))

    def find(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> SampleSize:
        return project.analyzer(options, checkpoint, config.mode).analyze(trainer, pl_module, analysis=analysis)

    for path in checkpoints_of(config.checkpoints).values():
        with without_advice():
            found, _ = project.at(path, find)
        print(f"{path}:\n{found}", flush=True)
