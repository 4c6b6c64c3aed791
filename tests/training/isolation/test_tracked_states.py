"""States of containers, objects and arrays are restored in place: the same objects, in the same order."""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_hesd.numerics.isolation.containers import BufferState
from lightning_hesd.training.isolation.tracked_states import (
    LARGE_CONTAINER,
    Owner,
    Place,
    TrackedContent,
    TrackedState,
    TrackedStates,
    TrackedValue,
)

PLACE = Place(None, "x", Owner.USER)


class Attributes:
    count = 0
    seen: dict[str, int] = {}  # noqa: RUF012 - the counter of many a class

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


Case = tuple[Callable[[], Any], Callable[[Any], TrackedState], Callable[[Any], object], Callable[[Any], object]]


items = partial(TrackedContent.of, place=PLACE)
array = partial(TrackedValue.of_array, place=PLACE)
table = partial(TrackedValue.of_table, place=PLACE)


CASES: dict[str, Case] = {
    "dict": (lambda: {"a": 1, "b": [2]}, items, lambda d: d.update(a=3, c=4), lambda d: list(d.items())),
    "list_replaced": (lambda: [[1], [2]], items, lambda v: v.__setitem__(0, [1]), lambda v: list(map(id, v))),
    "long_list": (lambda: list(range(LARGE_CONTAINER + 1)), items, lambda v: v.pop(), list),
    "attributes": (
        Attributes,
        lambda o: TrackedContent.of(vars(o), PLACE._replace(of_attributes=True)),
        lambda o: (setattr(o, "a", 3), setattr(o, "c", 1), delattr(o, "b")),
        lambda o: list(vars(o)),
    ),
    "class": (
        lambda: type("Own", (Attributes,), {"count": 0, "seen": [0]}),
        items,
        lambda c: (setattr(c, "count", 1), setattr(c, "new", 1), delattr(c, "seen")),
        lambda c: (c.count, c.seen, hasattr(c, "new")),
    ),
    "array": (lambda: np.array([1.0, np.nan]), array, lambda a: a.__setitem__(0, 2.0), lambda a: a.tobytes()),
    "array_of_objects": (lambda: np.array([{"n": 1}, None]), array, lambda a: a.__setitem__(1, 2), list),
    "shared_number": (
        lambda: ctypes.c_double(1.0),
        lambda b: TrackedContent(BufferState(b), PLACE),
        lambda b: setattr(b, "value", 2.0),
        lambda b: b.value,
    ),
    "table": (
        lambda: pd.DataFrame({"a": [1.0, np.nan], "b": ["x", "y"]}),
        table,
        lambda t: (t.__setitem__("c", 1), t.loc.__setitem__((0, "a"), 3.0)),
        lambda t: t.to_json(),
    ),
    "series": (lambda: pd.Series([1.0, 2.0]), table, lambda t: t.__setitem__(0, 3.0), list),
    "setting": (
        lambda: torch,
        lambda _: TrackedValue.of_setting("the type", torch.get_default_dtype, torch.set_default_dtype),
        lambda _: torch.set_default_dtype(torch.float64),
        lambda _: torch.get_default_dtype(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_states_are_restored(name: str) -> None:
    make, track, change, look = CASES[name]
    value = make()
    state = track(value)
    states = TrackedStates([state])
    before = look(value)
    assert states.restore() == {}
    assert not state.changed()
    for _ in range(2):
        change(value)
        assert state.changed()
        assert states.restore() == {}
        assert look(value) == before
        assert not state.changed()


def test_labels_name_the_changes() -> None:
    place = Place(Place(None, "trainer", Owner.TRAINER), ".callbacks[0]", Owner.USER)
    value = Attributes()
    attributes, mapping = TrackedContent.of(vars(value), place._replace(of_attributes=True)), {"n": 1, 2: 0}
    tracked = [attributes, TrackedContent.of(mapping, Place(place, ".b", Owner.USER)), TrackedContent.of([0], place)]
    value.a, value.new = 5, 6  # type: ignore[attr-defined]
    mapping["n"], mapping[2] = 2, 3
    changed = [f"{state.place}{label}" for state in tracked for label in state.changed()]
    expected = ["trainer.callbacks[0].a", "trainer.callbacks[0].new", "trainer.callbacks[0].b['n']"]
    assert changed == [*expected, "trainer.callbacks[0].b[2]"]


def test_items_of_a_long_container_are_compared_at_the_end_only() -> None:
    value = list(range(LARGE_CONTAINER + 1))
    states = TrackedStates([items(value)])
    value[0] = -1
    assert states.restore() == {}
    assert value[0] == -1
    assert states.restore(thorough=True) == {}
    assert value == list(range(LARGE_CONTAINER + 1))


def test_an_item_that_moves_to_another_container_is_noticed() -> None:
    """All items together are the same objects in the same order then."""
    first, second = [[1], [2]], [[3]]
    states = TrackedStates([items(first), items(second)])
    second.insert(0, first.pop())
    states.restore()
    assert (first, second) == ([[1], [2]], [[3]])
