"""Long containers of plain values, and snapshots of objects that hold them."""

import collections
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from lightning_hesd.numerics.isolation.containers import has_plain_items
from lightning_hesd.numerics.isolation.snapshot import restore_state
from tests.line_count import counted_lines

MANY = 20_000


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ([1, "a", None, 2.0, b"", True], True),
        ({("a", 1): 1, "b": ("c", 2)}, True),
        (collections.deque([1, 2]), True),
        ([("a", [1])], False),
        ({"a": {}}, False),
        ([torch.zeros(1)], False),
        ([(("a", 1), 2)], False),
    ],
)
def test_which_containers_have_plain_items(container: Any, expected: bool) -> None:
    assert has_plain_items(container) is expected


class Holder(Dataset[Any]):
    def __init__(self, content: Any) -> None:
        self.content = content
        self.small = [[1, 2]]


CONTENTS: dict[str, Any] = {
    "pairs": lambda: [(f"{number}.jpg", number) for number in range(MANY)],
    "names": lambda: {str(number): number for number in range(MANY)},
    "records": lambda: [{"id": number} for number in range(MANY)],
}


@pytest.mark.parametrize(("kind", "tensors"), [("pairs", True), ("pairs", False), ("names", False), ("records", False)])
def test_long_containers_are_restored_without_python_code_for_each_item(kind: str, tensors: bool) -> None:
    content = CONTENTS[kind]()
    holder, before = Holder(content), len(content)
    with counted_lines() as count, restore_state(holder, tensors=tensors):
        pass
    assert count.lines < MANY / 2, "a line for each item would be more"
    with restore_state(holder, tensors=tensors):
        content.popitem() if isinstance(content, dict) else content.pop(0)
        holder.small[0].append(3)
        holder.content = None
    assert holder.content is content
    assert len(content) == before
    assert holder.small == [[1, 2]]
