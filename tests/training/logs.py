"""Loggers, and the files that they leave."""

import csv
from pathlib import Path

from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder: Path | str) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


class ListLogger(DummyLogger):
    """A logger of a kind the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    @property
    def save_dir(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)


def rows(path: Path) -> list[dict[str, str]]:
    """Read the CSV logger's rows, without the callback's columns and the rows that hold nothing else."""
    read = [{k: v for k, v in row.items() if not k.startswith("hesd") and v != ""} for row in read_csv(path)]
    return [row for row in read if set(row) - {"epoch", "step"}]
