"""Cutting batches into smaller ones."""

import collections
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_hesd.numerics.batches import WeightedBatch


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    x: Any
    name: str


X = torch.arange(20.0).view(10, 2)
Y = torch.arange(10)
Z = np.arange(30).reshape(10, 3)
COMMON = torch.arange(3.0)

# Name: (batch, its leaves that are cut, its leaves that are common to all samples).
BATCHES: dict[str, tuple[Any, Any, Any]] = {
    "tensor": (X, lambda b: [b], lambda b: []),
    "tuple": ((X, Y), lambda b: [b[0], b[1]], lambda b: []),
    "list": ([X, Y], lambda b: [b[0], b[1]], lambda b: []),
    "named tuple": (Pair(X, Y), lambda b: [b.x, b.y], lambda b: []),
    "dict": ({"x": X, "y": Y}, lambda b: [b["x"], b["y"]], lambda b: []),
    "ordered dict": (
        collections.OrderedDict(x=X, y=Y),
        lambda b: [b["x"], b["y"]],
        lambda b: [],
    ),
    "dataclass": (Record(X, "train"), lambda b: [b.x], lambda b: [b.name]),
    "array": ((X, Z), lambda b: [b[0], b[1]], lambda b: []),
    "nested": (
        {"in": [X, (Y, {"z": Z})], "meta": Record(Pair(Y, COMMON), "train")},
        lambda b: [b["in"][0], b["in"][1][0], b["in"][1][1]["z"], b["meta"].x.x],
        lambda b: [b["meta"].x.y, b["meta"].name],
    ),
    "common things": (
        (X, COMMON, 0.5, None, "text", torch.tensor(3.0)),
        lambda b: [b[0]],
        lambda b: list(b[1:]),
    ),
}


def joined(leaves: list[Any]) -> Any:
    return np.concatenate(leaves) if isinstance(leaves[0], np.ndarray) else torch.cat(leaves)


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(np.all(first == second))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 10, 16])
@pytest.mark.parametrize("kind", BATCHES)
class TestSplit:
    def test_cuts_what_belongs_to_the_samples_and_keeps_the_rest(self, kind, parts):
        data, cut, common = BATCHES[kind]
        groups = WeightedBatch(data, 10.0, 3).split(parts)
        assert len(groups) == min(parts, 10)
        for position, whole in enumerate(cut(data)):
            leaves = [cut(group.data)[position] for group in groups]
            assert {type(leaf) for leaf in leaves} == {type(whole)}
            assert max(len(leaf) for leaf in leaves) - min(len(leaf) for leaf in leaves) <= 1
            assert same(joined(leaves), whole)
        for group in groups:
            assert all(same(ours, theirs) for ours, theirs in zip(common(group.data), common(data), strict=True))

    def test_keeps_the_structure_and_the_batch(self, kind, parts):
        data, cut, _ = BATCHES[kind]
        before = [leaf.copy() if isinstance(leaf, np.ndarray) else leaf.clone() for leaf in cut(data)]
        for group in WeightedBatch(data, 10.0, 3).split(parts):
            assert type(group.data) is type(data)
            assert group.index == 3
            if isinstance(data, dict):
                assert list(group.data) == list(data)
        assert all(same(leaf, copy) for leaf, copy in zip(cut(data), before, strict=True))

    def test_shares_the_weight_out_by_size(self, kind, parts):
        data, cut, _ = BATCHES[kind]
        groups = WeightedBatch(data, 25.0, 0).split(parts)
        assert sum(group.weight for group in groups) == pytest.approx(25.0, rel=1e-14)
        for group in groups:
            assert group.weight == pytest.approx(2.5 * len(cut(group.data)[0]), rel=1e-14)
