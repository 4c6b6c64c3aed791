"""Datasets whose samples know their positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from lightning_hesd.training.samples.analysis_samples import AnalysisSamples
from tests.training.modules import Digits, digits, samples


def positions(drawn: AnalysisSamples) -> list[int]:
    """Return the positions of the samples, read from the batches themselves."""
    return [position for batch in drawn.batches for position in batch.data[2].tolist()]


class DatasetOfBatches(Dataset[Any]):
    """Item b is the b-th batch of four."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> Any:
        if number >= 5:
            raise IndexError(number)
        return samples(list(range(4 * number, 4 * number + 4)))


class BulkDigits(Digits):
    """Reads a list of positions at once."""

    def __getitem__(self, chosen: Any) -> Any:
        self.read.extend(chosen)
        return samples(list(chosen))


class FiniteStream(IterableDataset[Any]):
    """Goes on from its cursor: what is read once is gone."""

    def __init__(self, size: int = 20) -> None:
        self.size = size
        self.cursor = 0

    def __iter__(self) -> Iterator[Any]:
        x, y = digits()
        while self.cursor < self.size:
            self.cursor += 1
            yield x[self.cursor - 1], y[self.cursor - 1], self.cursor - 1
