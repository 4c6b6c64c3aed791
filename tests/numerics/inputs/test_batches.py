"""Cutting batches into smaller ones."""

import collections
import collections.abc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from lightning_hesd.numerics.inputs.batches import WeightedBatch, position_in_epoch, weighted_batches
from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError, cut
from lightning_hesd.numerics.inputs.sample_counts import count_samples
from tests.numerics.isolation.test_snapshot import AttributeDict, Silent


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    x: Any
    name: str


class Frozen(collections.abc.Mapping):
    """A mapping that cannot be written to."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Own:
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y, self.name = x, y, "train"


class Items(Own):
    """Iterates over names and tensors, as the batches of torch_geometric do."""

    def __iter__(self) -> Any:
        yield from vars(self).items()


class Cyclic(Own):
    def __init__(self, x: Any, y: Any) -> None:
        super().__init__(x, y)
        self.me = self


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y


X = torch.arange(20.0).view(10, 2)
Y = torch.arange(10)
Z = np.arange(30).reshape(10, 3)
COMMON = torch.arange(3.0)

# Name: (batch, its leaves that are cut, its leaves that are common to all samples).
BATCHES: dict[str, tuple[Any, Any, Any]] = {
    "tensor": (X, lambda b: [b], lambda b: []),
    "tuple": ((X, Y), lambda b: [b[0], b[1]], lambda b: []),
    "ordered dict": (collections.OrderedDict(x=X, y=Y), lambda b: [b["x"], b["y"]], lambda b: []),
    "nested: dict, list, tuple, array, dataclass, named tuple": (
        {"in": [X, (Y, {"z": Z})], "meta": Record(Pair(Y, COMMON), "train")},
        lambda b: [b["in"][0], b["in"][1][0], b["in"][1][1]["z"], b["meta"].x.x],
        lambda b: [b["meta"].x.y, b["meta"].name],
    ),
    "packed": (
        (pack_sequence([torch.arange(3.0 + n % 4) for n in range(10)], enforce_sorted=False), Y),
        lambda b: [pad_packed_sequence(b[0], batch_first=True, total_length=6)[0], b[1]],
        lambda b: [],
    ),
    "sorted packed": (
        pack_sequence([torch.arange(float(12 - n)) for n in range(10)]),
        lambda b: [pad_packed_sequence(b, batch_first=True, total_length=12)[0]],
        lambda b: [],
    ),
    "user dict": (collections.UserDict(x=X, y=Y), lambda b: [b["x"], b["y"]], lambda b: []),
    "dict of attributes": (AttributeDict(x=X, y=Y), lambda b: [b["x"], b["y"], b.x, b.y], lambda b: []),
    "mapping": (Frozen(x=X, y=Y), lambda b: [b["x"], b["y"]], lambda b: []),
    "own class": (Own(X, Y), lambda b: [b.x, b.y], lambda b: [b.name]),
    "own class that iterates over its items": (Items(X, Y), lambda b: [b.x, b.y], lambda b: []),
    "own class with slots": (Slotted(X, Y), lambda b: [b.x, b.y], lambda b: []),
    "own class that refers to itself": (Cyclic(X, Y), lambda b: [b.x, b.y, b.me.x], lambda b: []),
    "lists of entries": (
        {"x": X, "names": [f"{n}.jpg" for n in range(10)], "boxes": [torch.full((n, 4), float(n)) for n in range(10)]},
        lambda b: [b["x"], np.array(b["names"]), torch.tensor([float(len(box)) for box in b["boxes"]])],
        lambda b: [],
    ),
    "common things": ((X, COMMON, 0.5, None, "text", torch.tensor(3.0)), lambda b: [b[0]], lambda b: list(b[1:])),
}


REFUSED: dict[str, Any] = {
    "graphs": {"x": X, "edges": torch.tensor([[0, 1], [1, 2]]), "y": Y},
    "time first": (torch.zeros(7, 10, 2), torch.zeros(7, 10)),
    "pointers to samples": (X, torch.tensor([0, 4, 10])),
    "arrays of positions": (X, np.array([0, 4, 10])),
    "packed of another length": (X, pack_sequence([torch.zeros(2)])),
    "an iterator": (X, iter([1, 2, 3])),
    "a sparse tensor": X.to_sparse(),
    "an object of as many entries": (X, range(10)),
}


def joined(leaves: list[Any]) -> Any:
    return np.concatenate(leaves) if isinstance(leaves[0], np.ndarray) else torch.cat(leaves)


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(np.all(first == second))


@pytest.mark.parametrize("parts", [3, 16])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_split_cuts_what_belongs_to_the_samples_and_keeps_the_rest(kind, parts):
    data, cut, common = BATCHES[kind]
    before = [leaf.copy() if isinstance(leaf, np.ndarray) else leaf.clone() for leaf in cut(data)]
    groups = WeightedBatch(data, 25.0, 3).split(parts)
    assert len(groups) == min(parts, 10)
    assert sum(group.weight for group in groups) == pytest.approx(25.0, rel=1e-14)
    for position, whole in enumerate(before):
        leaves = [cut(group.data)[position] for group in groups]
        assert {type(leaf) for leaf in leaves} == {type(whole)}
        assert max(len(leaf) for leaf in leaves) - min(len(leaf) for leaf in leaves) <= 1
        assert same(joined(leaves), whole)
        assert same(cut(data)[position], whole)
    for group in groups:
        assert all(same(ours, theirs) for ours, theirs in zip(common(group.data), common(data), strict=True))
        assert type(group.data) is type(data)
        assert group.index == 3
        assert group.weight == pytest.approx(2.5 * len(cut(group.data)[0]), rel=1e-14)
        if isinstance(data, dict):
            assert list(group.data) == list(data)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_may_be_cut_wrongly_is_refused(kind):
    with pytest.raises(UnsplittableBatchError):
        WeightedBatch(REFUSED[kind], 10.0, 0).split(2)


def test_the_copy_of_a_chunk_takes_no_more_memory_than_the_chunk():
    images, numbers = torch.zeros(100, 8), np.zeros((100, 8))
    few = WeightedBatch((images, numbers), 100.0, 0).cut_at([4])[0].copy()
    assert few.data[0].untyped_storage().nbytes() == images[:4].nbytes
    assert few.data[1].base is None


def test_the_samples_are_along_the_dimension_that_the_weight_tells():
    with pytest.raises(UnsplittableBatchError, match="nothing in a batch of type tuple has the number of samples, 10"):
        cut((torch.zeros(3), {"scale": 2.0}), 10, [slice(0, 5), slice(5, 10)])
    groups = WeightedBatch((torch.zeros(3), X), 10.0, 0).split(2)
    assert [(len(group.data[0]), len(group.data[1])) for group in groups] == [(3, 5)] * 2


class TestWeights:
    @pytest.mark.parametrize(
        ("batch", "expected", "doubt"),
        [
            ((X, Y), 10, None),
            ({"x": X, "n": 3}, 10, None),
            (Own(X, Y), 10, None),
            (Items(X, Y), 10, None),
            (pack_sequence([torch.zeros(3), torch.zeros(2)]), 2, None),
            ((pack_sequence([torch.zeros(3), torch.zeros(2)]), torch.zeros(2)), 2, None),
            ({"scale": torch.tensor(1.0), "x": X, "y": Y}, 10, "its first tensor is a scalar"),
            ((torch.zeros(7, 10, 3), Y), 7, "its tensors have first dimensions 7, 10"),
            ([torch.zeros(3, 9), torch.zeros(2, 9)], 3, "its tensors have first dimensions 3, 2"),
            (torch.tensor(1.0), 1, None),
            (SimpleNamespace(nodes=torch.zeros(7, 3), graph=torch.zeros(7), y=Y, batch_size=10), 10, None),
            (SimpleNamespace(nodes=torch.zeros(7, 3), offsets=torch.zeros(3), num_graphs=2), 2, None),
            ([SimpleNamespace(nodes=torch.zeros(n), y=Y, batch_size=10) for n in (7, 8)], 10, None),
            ((SimpleNamespace(nodes=torch.zeros(7), y=Y, batch_size=10), torch.zeros(10)), 10, None),
            (SimpleNamespace(nodes=torch.zeros(7), y=Y, batch_size=32), 7, "its tensors have first dimensions 7, 10"),
            ([SimpleNamespace(y=torch.zeros(n), batch_size=n) for n in (7, 8)], 7, "first dimensions 7, 8"),
            ({"id": "abc", "n": 7, "position": np.array(3), "ids": np.arange(3), "x": torch.zeros(5, 1)}, 5, None),
            (({"meta": ["ab", b"cd", None]}, [Record((1, torch.zeros(8, 3)), "")]), 8, None),
        ],
    )
    def test_of_batches_of_unknown_origin(self, batch, expected, doubt):
        size, found = count_samples(batch)
        assert (size, type(size)) == (expected, float)
        assert found is None if doubt is None else doubt in found and "pass `batch_weight=`" in found

    @pytest.mark.parametrize("batch", ["text", b"bytes", 3, None, [], {"x": [1, "a"]}, Record, np.zeros(3)])
    def test_cannot_be_told_without_a_tensor(self, batch):
        with pytest.raises(
            ValueError, match=rf"type {type(batch).__name__}, which holds no tensor: pass `batch_weight`"
        ):
            count_samples(batch)

    def test_doubts_are_told_once(self):
        batches = [(torch.zeros(7, 10), Y)] * 3
        with pytest.warns(RuntimeWarning, match="taken to hold 7 samples.*`batch_weight=`") as caught:
            weighted_batches(batches)
        assert len(caught) == 1
        assert [batch.weight for batch in weighted_batches(batches, lambda batch: len(batch[1]))] == [10, 10, 10]

    def test_leave_iterators_and_modules_alone(self):
        source = iter([torch.zeros(3)])
        assert count_samples((source, torch.nn.Linear(2, 3), X)) == (10.0, None)
        assert len(list(source)) == 1


def test_the_position_in_the_epoch_is_known_while_a_batch_is_evaluated():
    for batch, expected in ((WeightedBatch(X, 1.0, 4), 4), (WeightedBatch(X, 1.0, 4, position=9), 9)):
        with batch.copy().evaluated():
            assert position_in_epoch() == expected
        assert batch.split(2)[1].position == batch.position
    assert position_in_epoch() == 0


class Unreadable:
    """Raises whatever it is asked."""

    def __iter__(self) -> Any:
        raise RuntimeError

    __len__ = __iter__


class Events:
    """Consists of batches of one event, as those do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Any:
        return (Events(row[None]) for row in self.x)


def test_samples_of_odd_batches_are_counted() -> None:
    x = torch.zeros(4, 2)
    for batch in (Events(x), {"x": x, "note": Unreadable()}, x.as_subclass(Silent)):
        assert count_samples(batch) == (4, None)
