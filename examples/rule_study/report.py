"""The report: what the picks of the rules were worth, over all trainings and for each network and schedule."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import itertools
import platform
from typing import TYPE_CHECKING

import numpy as np

from examples.rule_study.picks import collect, judgment
from examples.rule_study.picks import write as write_picks
from examples.rule_study.training import NETWORKS, POINTS, SCHEDULES, TOO_LONG, Training
from examples.shared import Table, markdown
from lightning_hesd.judgment.statistics import compare
from lightning_hesd.plotting import plot_gains

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from examples.rule_study.training import Network, Schedule
    from lightning_hesd import Judgment
    from lightning_hesd.judgment.statistics import PairedComparison

    Cell = tuple[Network, Schedule]

METRICS = {
    "shifted_acc": "accuracy on held-out digits that are rotated, shifted and noisy",
    "test_acc": "accuracy on held-out digits",
}
AGAINST = ("last", "lowest_train_loss")
"""The baselines: what users have without a rule, and the rule that needs no spectrum."""

LEVEL = 0.05
TITLES = {"mlp": "MLP", "resnet": "ResNet", "vit": "ViT"}
PACKAGES = ("lightning-hesd", "torch", "lightning", "scikit-learn")

INTRODUCTION = """\
# Do the checkpoint rules help?

{summary}

- **Trainings**: {count} on scikit-learn's digits (900 for training, 300 for validation, 597 held out, of which one only
  counts distorted), of {seeds} seeds for each of {cells} settings: an MLP, a small ResNet and a small ViT; AdamW with a
  constant learning rate, a cosine schedule, and a constant one for {too_long} times as many epochs ("too long"). The
  data are the same for every seed.
- **Rules**: each picks among the candidates of its training, as HessianCheckpoint does: MP spectra, and a loss within
  5 % of its drop of the lowest. Every training is analyzed {points} times ({samples} samples, {steps} Lanczos steps).
- **Statistics**: differences to the last epoch, and to the analyzed epoch with the lowest training loss, paired within
  trainings and averaged over the settings of a seed, so that the seeds are independent. Intervals hold for all picks of
  a column together ({confidence:.0%}). A rule is evidently better or worse where interval and sign-flip test agree. The
  level of single settings is {level:.2g}, for their number.
- Made with `python -m examples.rule_study` on {date}: {versions}.
"""


def write(trainings: Sequence[Training], out: Path, target: Path) -> Path:
    """Write the report, its figures and the table of picks; only seeds of which all trainings are done count.

    Trainings that an earlier table in the folder of the report has need no folder of their own.

    Args:
        trainings: All trainings of the study.
        out: Folder of the trainings.
        target: Folder of the report.

    Raises:
        ValueError: If no seed is complete.
    """
    target.mkdir(parents=True, exist_ok=True)
    table = target / "picks.csv"
    found = collect(trainings, list(METRICS), out, table)
    write_picks(found, {training.name: training for training in trainings}, table)
    by_seed: dict[int, list[Training]] = {}
    for training in trainings:
        by_seed.setdefault(training.seed, []).append(training)
    done = {run for _, run in found}
    complete = [t for seed in by_seed.values() if all(t.name in done for t in seed) for t in seed]
    if not complete:
        msg = f"no seed in {out} has all of its trainings: run the study first."
        raise ValueError(msg)
    cells = [(network, schedule) for network in NETWORKS for schedule in SCHEDULES]
    level = LEVEL / (len(cells) * len(METRICS))
    judged: dict[str, dict[Cell, Judgment]] = {metric: {} for metric in METRICS}
    for metric, cell in itertools.product(METRICS, cells):
        runs = [found[metric, t.name] for t in complete if (t.network, t.schedule) == cell]
        judged[metric][cell] = judgment(runs, metric, level)
    pooled = {
        metric: [_Pooled(list(of_metric.values()), name) for name in AGAINST] for metric, of_metric in judged.items()
    }
    first = complete[0]
    text = INTRODUCTION.format(
        summary="\n\n".join(f"**{_sentence(each, meaning)}**" for m, meaning in METRICS.items() for each in pooled[m]),
        count=len(complete),
        seeds=len(complete) // len(cells),
        cells=len(cells),
        too_long=TOO_LONG,
        points=POINTS,
        samples=first.samples,
        steps=first.steps,
        confidence=1 - LEVEL,
        level=level,
        date=dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        versions=", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES) + f", {platform.machine()}",
    )
    for metric, meaning in METRICS.items():
        pooled[metric][0].draw(target / f"{metric}.png", metric)
        text += f"\n## {meaning.capitalize()}\n\n{markdown(_table(pooled[metric]))}\n\n![{meaning}]({metric}.png)\n\n"
        text += markdown(_by_cell(judged[metric])) + "\n"
    path = target / "report.md"
    path.write_text(text, encoding="utf-8")
    return path


class _Pooled:
    """Gains over a baseline, averaged over the settings of a seed."""

    def __init__(self, judgments: Sequence[Judgment], against: str) -> None:
        self.titles = judgments[0].titles
        self.against = self.titles[against]
        self.rules = [name for name in self.titles if name in judgments[0].rules]
        self.names = [name for name in self.titles if name not in {against, "best_possible"}]
        gains = [[judgment.gains(name, against) for name in self.names] for judgment in judgments]
        self.means = {name: 100 * np.mean([np.mean(j.values[name]) for j in judgments]) for name in self.titles}
        # In points, shape (seeds, names).
        self.found: PairedComparison = compare(100 * np.mean(gains, axis=0).T, level=LEVEL)

    def gain(self, name: str, unit: str = "") -> str:
        """Return the mean gain of a pick with its interval."""
        at = self.names.index(name)
        return _gain(self.found.means[at], self.found.low[at], self.found.high[at], unit)

    def cells(self, name: str) -> tuple[str, str, str]:
        """Return the gain of a pick, the numbers of seeds, and whether it is evidently better or worse."""
        if name not in self.names:
            return "", "", ""
        at = self.names.index(name)
        evidently = "better" if self.found.better[at] else "worse" if self.found.worse[at] else ""
        return self.gain(name), f"{self.found.wins[at]}/{self.found.ties[at]}/{self.found.losses[at]}", evidently

    def draw(self, path: Path, metric: str) -> None:
        """Draw the gains."""
        found = self.found
        axes = plot_gains(
            [self.titles[name] for name in self.names],
            found.gains,
            np.stack([found.low, found.means, found.high]),
            evident=found.better | found.worse,
            first_baseline=len(self.rules),
            label=f"gain in {metric} over the {self.against}, points\n(bars: {1 - LEVEL:.0%} intervals; marks: seeds)",
        )
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(path)


def _gain(mean: float, low: float, high: float, unit: str = "") -> str:
    return f"{mean:+.2f}{unit} [{low:+.2f}, {high:+.2f}]" if np.isfinite(low) else f"{mean:+.2f}{unit}"


def _sentence(pooled: _Pooled, meaning: str) -> str:
    found = pooled.found
    better = [name for at, name in enumerate(pooled.names) if name in pooled.rules and found.better[at]]
    best = max(pooled.rules, key=lambda name: found.means[pooled.names.index(name)])
    of = f"Over {len(found.gains)} seeds and all settings, by the {meaning},"
    count = f"{len(better)} of {len(pooled.rules)} rules are" if better else "no rule is"
    return (
        f"{of} {count} evidently better than the {pooled.against}; the largest gain, {pooled.titles[best]}, is "
        f"{pooled.gain(best, ' points')}."
    )


def _table(pooled: Sequence[_Pooled]) -> Table:
    """Return the means of all picks, and their gains over each baseline."""
    first = pooled[0]
    rows = [
        (title, f"{first.means[name]:.2f}", *(cell for each in pooled for cell in each.cells(name)))
        for name, title in first.titles.items()
    ]
    header = [cell for each in pooled for cell in (f"over {each.against}, points", "won/tied/lost", "evidently")]
    return Table(("pick", "mean, %", *header), rows)


def _by_cell(found: dict[Cell, Judgment]) -> Table:
    rows = [(TITLES[network], schedule, judgment.sentence) for (network, schedule), judgment in found.items()]
    return Table(("network", "schedule", "result"), rows)
