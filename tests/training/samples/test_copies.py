"""Copies of samplers and loaders: apart from the original in all that changes, and no copies of the data."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from lightning_hesd.training.samples import loaders
from lightning_hesd.training.samples.loaders import private_copy
from tests.line_count import counted_lines


class Table:
    """What a data set consists of."""

    def __init__(self) -> None:
        self.rows = [[1, 2], [3, 4]]


class Data(Dataset[Any]):
    def __init__(self) -> None:
        self.table = Table()


class Holder:
    """Holds all that a sampler may."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.other = Data()
        self.table = data.table
        self.model = nn.Linear(2, 2)
        self.features = torch.zeros(1000)
        self.order = np.arange(10)
        self.names = [(f"{number}.jpg", number) for number in range(1000)]
        self.groups = {"a": [list(range(200)), list(range(200))]}
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.me = self


def test_the_data_are_shared_and_the_rest_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "MAX_COPIED_BYTES", 1000)
    source = Holder(Data())
    copied = private_copy(source, source.data)
    for name in ("data", "other", "table", "model", "features"):
        assert getattr(copied, name) is getattr(source, name), name
    for name in ("order", "names", "groups", "rng", "generator"):
        assert getattr(copied, name) is not getattr(source, name), name
    assert copied.me is copied
    assert copied.names == source.names
    copied.order[0], copied.groups["a"][0][0] = 7, 7
    copied.rng.normal()
    copied.generator.manual_seed(9)
    assert source.order[0] == source.groups["a"][0][0] == 0
    assert source.rng.normal() == np.random.default_rng(0).normal()
    assert torch.equal(source.generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_many_names_are_copied_as_one_list() -> None:
    source = Holder(Data())
    source.names = [(f"{number}.jpg", number) for number in range(20_000)]
    with counted_lines() as count:
        copied = private_copy(source, source.data)
    assert count.lines < 20_000, "one by one takes several lines for each name"
    del copied.names[0]
    assert len(source.names) == 20_000


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.source = Data()
        self.inner = [self]
        self.cursor = [0]

    def __iter__(self) -> Any:
        yield from self.cursor


def test_a_stream_is_copied_itself() -> None:
    stream = Stream()
    copied = private_copy(stream)
    copied.cursor[0] += 1
    assert stream.cursor == [0]
    assert copied.inner == [copied]
    assert copied.source is stream.source
