"""`lightning-hesd judge`: which checkpoint rule would have picked the best checkpoint, and how surely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_hesd.judgment.judge import judge
from lightning_hesd.judgment.statistics import LEVEL

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

CANDIDATES = (
    "Among which analyzed epochs the rules pick: 'near' (MP, and a loss within 5 % of its drop of the lowest one), "
    "'all', or a number (MP, and a loss within it of the lowest one)."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("runs", nargs="+", type=str, help="Log directories of runs, or folders of such.")
    parser.add_argument("--metric", type=str, required=True, help="The metric by which picks are judged.")
    parser.add_argument(
        "--mode",
        type=Literal["max", "min"] | None,
        default=None,
        help="Whether a higher (max) or a lower (min) metric is better; default: min if its name says loss or error.",
    )
    parser.add_argument("--candidates", type=Literal["near", "all"] | float, default="near", help=CANDIDATES)
    parser.add_argument(
        "--metrics-csv",
        type=Path | None,
        default=None,
        help="Values of the metric computed later: a file with the columns run, epoch or global_step, and the metric.",
    )
    parser.add_argument("--rules", nargs="+", type=str, default=None, help="Names of rules to compare; default: all.")
    parser.add_argument("--val-loss", type=str | None, default=None, help="Validation loss; default: the usual names.")
    parser.add_argument(
        "--val-metric", type=str | None, default=None, help="Another metric to pick by, for comparison."
    )
    parser.add_argument("--level", type=float, default=LEVEL, help="Probability of a false claim about any rule.")
    parser.add_argument("--name", type=str, default="hesd", help="Name of the callback in the runs.")
    parser.add_argument("--csv", type=Path | None, default=None, help="File for the table.")
    parser.add_argument("--json", type=Path | None, default=None, help="File for the table and all picks.")
    parser.add_argument("--markdown", type=Path | None, default=None, help="File for the text.")
    parser.add_argument("--figure", type=Path | None, default=None, help="File for the figure, .png, .pdf or .svg.")


def run(config: Namespace) -> None:
    """Print the comparison, and write it to the files asked for."""
    found = judge(
        config.runs,
        config.metric,
        mode=config.mode,
        candidates=config.candidates,
        metrics=config.metrics_csv,
        rules=config.rules,
        val_loss=config.val_loss,
        val_metric=config.val_metric,
        level=config.level,
        name=config.name,
    )
    print(found)
    if config.csv is not None:
        found.to_csv(config.csv)
    if config.json is not None:
        found.to_json(config.json)
    if config.markdown is not None:
        found.to_markdown(config.markdown)
    if config.figure is not None:
        from lightning_hesd.commands.plot import save_figure  # noqa: PLC0415 - Matplotlib is slow to import

        save_figure(config.figure, found.plot)
