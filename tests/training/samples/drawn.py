"""Datasets whose samples know their positions."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from lightning_hesd.training.samples.analysis_samples import AnalysisSamples
from tests.training.modules import Digits, samples


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
