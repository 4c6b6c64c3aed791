"""Datasets whose samples know their positions."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from lightning_hesd.training.samples.analysis_samples import AnalysisSamples
from tests.training.modules import Digits, samples


def positions(drawn: AnalysisSamples) -> list[int]:
    """Return the positions of the samples, read from the batches themselves."""
    return [position for batch in drawn.batches for position in batch.data[2].tolist()]


class DatasetOfBatches(Dataset[Any]):
    """Item b is the b-th batch; there are five."""

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> Any:
        if number >= 5:
            raise IndexError(number)
        return samples(list(range(self.batch_size * number, self.batch_size * (number + 1))))


class Counted:
    """An iterable that is no DataLoader; it counts the batches that are taken."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            self.given += 1
            yield batch


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
        while self.cursor < self.size:
            self.cursor += 1
            yield Digits(self.size)[self.cursor - 1]
