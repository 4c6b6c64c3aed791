"""Merging of batches: what is merged into which structure, and what is refused."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.merging import UnmergeableBatchesError, in_groups, merged

Pair = namedtuple("Pair", ["x", "label"])  # noqa: PYI024 - as users write it


def batches(*data: Any, sizes: tuple[int, ...] = (2, 3)) -> list[WeightedBatch]:
    return [
        WeightedBatch(d, 10.0 * n, index, position=index + 5, size=float(n))
        for index, (d, n) in enumerate(zip(data, sizes, strict=True))
    ]


def test_samples_are_concatenated_in_the_structure_of_the_batch() -> None:
    pairs = Pair(torch.zeros(2, 4), torch.arange(2)), Pair(torch.ones(3, 4), torch.arange(2, 5))
    given = [{"pair": pair, "scale": 0.5, "name": "a", "rest": [torch.ones(len(pair.x))]} for pair in pairs]
    whole = merged(batches(*given))
    assert isinstance(whole.data["pair"], Pair)
    assert whole.data["pair"].label.tolist() == [0, 1, 2, 3, 4]
    assert whole.data["pair"].x.sum() == 12
    assert (whole.data["scale"], whole.data["name"], len(whole.data["rest"][0])) == (0.5, "a", 5)
    assert [part.index for part in whole.merged_from] == [0, 1]
    assert (whole.weight, whole.num_samples, whole.index, whole.position) == (50.0, 5.0, 0, 5)


def test_rows_of_samples_are_concatenated_and_common_tensors_must_be_equal() -> None:
    """Rows as the labels of all tokens."""
    whole = merged(batches([torch.zeros(2, 4), torch.arange(8)], [torch.zeros(3, 4), torch.arange(12)]))
    assert whole.data[1].tolist() == [*range(8), *range(12)]
    with pytest.raises(UnmergeableBatchesError, match="neither of samples nor equal"):
        merged(batches([torch.zeros(2, 4), torch.arange(8)], [torch.zeros(3, 4), torch.arange(1, 9)]))
    common = torch.ones(7)
    whole = merged(batches([torch.zeros(2), common], [torch.zeros(3), common.clone()]))
    assert whole.data[1].tolist() == common.tolist()
    with pytest.raises(UnmergeableBatchesError, match="neither of samples nor equal"):
        merged(batches([torch.zeros(2), common], [torch.zeros(3), 2 * common]))
    # The parts of rows or of a scalar for a sample, the same in all batches, are no number of rows.
    part = [torch.zeros(2), common, torch.tensor(0.5)]
    assert [len(part) for part in merged(batches(part, part, sizes=(2, 2))).data[:2]] == [4, 7]


def test_scalars_and_shorter_tensors_that_are_equal_are_common() -> None:
    """Without looking for their number of rows per sample, 0 and 0.5, among all whole numbers, which takes a minute."""
    data = [torch.zeros(4), torch.tensor(3.0), torch.ones(2)]
    whole = merged(batches(data, [t.clone() for t in data], sizes=(4, 4)))
    assert [len(whole.data[0]), whole.data[1].item(), len(whole.data[2])] == [8, 3.0, 2]


def test_one_batch_stays_itself() -> None:
    [batch] = batches([object()], sizes=(2,))
    assert merged([batch]) is batch


@dataclass(frozen=True)
class Images:
    pixels: torch.Tensor
    size: int


class Encoding(UserDict[str, Any]):
    """As tokenizers return them."""


def test_dataclasses_and_mappings_keep_their_type() -> None:
    first, second = (Encoding(images=Images(torch.full((n, 1), n), 1)) for n in (2, 3))
    whole = merged(batches(first, second))
    assert isinstance(whole.data, Encoding)
    assert whole.data["images"].pixels.flatten().tolist() == [2, 2, 3, 3, 3]
    assert len(first["images"].pixels) == 2, "the batches stay as they were"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 5), "differ in shape"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.float64), "differ in shape, dtype"),
        ({"x": torch.zeros(2)}, {"y": torch.zeros(3)}, "unequal keys"),
        ([torch.zeros(2)], [torch.zeros(3), torch.zeros(3)], "unequal lengths"),
        ([torch.zeros(2), 1.0], [torch.zeros(3), 2.0], "type float"),
        ([torch.zeros(2), {1}], [torch.zeros(3), {1}], "type set"),
        ([torch.zeros(2)], (torch.zeros(3),), "a list and other types"),
        (torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True), "with a graph"),
        (torch.zeros(2).to_sparse(), torch.zeros(3).to_sparse(), "special kind"),
    ],
)
def test_other_batches_are_refused(first: Any, second: Any, message: str) -> None:
    with pytest.raises(UnmergeableBatchesError, match=message):
        merged(batches(first, second))


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([4] * 8, 32, [8]),
        ([4] * 8, 31, [4, 4]),
        ([4] * 9, 16, [3, 3, 3]),
        ([4] * 8, 1, [1] * 8),
        ([4, 4, 4, 1], 1000.5, [4]),
        ([100, 1, 1, 1], 10, [1, 3]),
    ],
)
def test_groups_are_few_and_about_equal(sizes: list[int], most: float, expected: list[int]) -> None:
    given = batches(*[torch.zeros(n) for n in sizes], sizes=tuple(sizes))
    groups = in_groups(given, most)
    assert [len(group) for group in groups] == expected
    assert [batch for group in groups for batch in group] == given
