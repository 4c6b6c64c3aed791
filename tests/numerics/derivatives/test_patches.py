"""Patches end in any order, and restore the attributes of before."""

import itertools
from contextlib import ExitStack
from typing import Any

import pytest

from lightning_hesd.numerics.derivatives.patches import patched


class Base:
    value = "inherited"


class Owner(Base):
    own = "own"


@pytest.mark.parametrize(
    ("name", "make"),
    [("own", lambda: type("Kind", (Owner,), {"own": "own"})), ("value", Owner)],
    ids=["class", "object"],
)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_of_several_threads_end_in_any_order(name: str, make: Any, order: tuple[int, ...]) -> None:
    owner = make()
    before = dict(vars(owner))
    stacks = [ExitStack() for _ in range(3)]
    for number, stack in enumerate(stacks):
        stack.enter_context(patched(owner, name, number))
        assert getattr(owner, name) == number
    left = [0, 1, 2]
    for number in order:
        stacks[number].close()
        left.remove(number)
        if left:
            assert getattr(owner, name) == left[-1]
    assert dict(vars(owner)) == before


def test_a_patch_ends_with_an_exception() -> None:
    owner = Owner()
    with pytest.raises(KeyError), patched(owner, "value", 1):
        raise KeyError
    assert vars(owner) == {}
