"""`lightning-hesd sample-size`: how many samples are enough at the weights of checkpoints."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from lightning_hesd.commands.posthoc import sample_size
from lightning_hesd.commands.project_arguments import (
    MODE,
    add_project,
    checkpoints_of,
    project_of,
    separated,
    without_advice,
)
from lightning_hesd.sample_size.recommendation import Stability, pilot_options, recommend_sample_size
from lightning_hesd.training.loss_mode import AnalysisMode

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["add_arguments", "run", "separated"]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_project(parser, in_one_process=True)
    parser.add_function_arguments(recommend_sample_size, skip={"module", "batches", "loss_fn", "mode"})
    parser.add_argument("--mode", type=AnalysisMode, default="auto", help=MODE)


def run(config: Namespace) -> None:
    """Print how many samples are enough at each checkpoint, and why."""
    project = project_of(config)
    stability = Stability(config.tolerance, config.loss_tolerance)
    names = [name for name in inspect.signature(pilot_options).parameters if name != "mode"]
    options = pilot_options(**{name: config[name] for name in names}, mode="eval")  # which the mode replaces
    for path in checkpoints_of(config.checkpoints).values():
        with without_advice():
            found = sample_size(project, path, stability, options, config.mode)
        print(f"{path}: {found}", flush=True)
