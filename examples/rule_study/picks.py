"""The picks of all rules in every training, in one table, from which a study can go on elsewhere."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from examples.rule_study.training import POINTS, Training, is_done
from lightning_hesd import Judgment, judge
from lightning_hesd.judgment.candidates import REFERENCES, Pick, RunPicks
from lightning_hesd.judgment.metric import Metric
from lightning_hesd.spectra.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Picks = dict[tuple[str, str], RunPicks]
    """The picks in a training, by metric and name of the training."""

TITLES = {name: rule.title for name, rule in RULES.items()} | REFERENCES


def collect(trainings: Iterable[Training], metrics: Sequence[str], out: Path, table: Path) -> Picks:
    """Return the picks in all trainings that are done: in the table of an earlier study, or in their folders."""
    trainings = list(trainings)
    found = _read(table, trainings) if table.exists() else {}
    for training in trainings:
        for metric in metrics:
            if (metric, training.name) not in found and is_done(training, out):
                [found[metric, training.name]] = judge(out / training.name, metric).runs
    return found


def judgment(runs: Sequence[RunPicks], metric: str, level: float) -> Judgment:
    """Return the judgment of the rules over some trainings."""
    titles = {name: title for name, title in TITLES.items() if any(name in run.picks for run in runs)}
    rules = tuple(name for name in titles if name in RULES and not RULES[name].is_baseline)
    ordered = {name: titles[name] for name in (*rules, *(name for name in titles if name not in rules))}
    return Judgment(Metric.of(metric, None), "near", level, tuple(runs), ordered, rules, ())


def write(picks: Picks, trainings: Mapping[str, Training], path: Path) -> None:
    """Write the table: a row for each metric and training, with the value and the epoch of every pick."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [name for name in TITLES if any(name in run.picks for run in picks.values())]
        writer.writerow(("metric", "run", "settings", *(f"{name}{of}" for name in names for of in ("", " epoch"))))
        for (metric, run), found in sorted(picks.items()):
            row: list[object] = [metric, run, _settings(trainings[run])]
            for name in names:
                pick = found.picks.get(name)
                row += ["", ""] if pick is None else [f"{pick.value:.5f}", pick.epoch]
            writer.writerow(row)


def _read(path: Path, trainings: Sequence[Training]) -> Picks:
    """Read the rows of the given trainings with their settings."""
    settings = {training.name: _settings(training) for training in trainings}
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if settings.get(row["run"]) == row["settings"]:
                picks = {
                    name: Pick(int(row[f"{name} epoch"]) if row[f"{name} epoch"] else None, None, float(row[name]))
                    for name in TITLES
                    if row.get(name)
                }
                found[row["metric"], row["run"]] = RunPicks(row["run"], picks, POINTS, POINTS, POINTS, False, {})
    return found


def _settings(training: Training) -> str:
    return f"{training.epochs} epochs, {training.steps} steps, {training.samples} samples"
