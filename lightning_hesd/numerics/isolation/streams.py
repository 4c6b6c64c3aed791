"""The positions of random number generators, counters and iterators, and how to restore them."""

from __future__ import annotations

import ast
import itertools
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATORS: tuple[type, ...] = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter("")), type(iter(range(0))))
STREAMS: tuple[type, ...] = (*GENERATORS, *ITERATORS, itertools.count)


def count_from(text: str) -> itertools.count[Any]:
    """Return the `itertools.count` that has this `repr`; it cannot be copied in all versions of Python.

    Raises:
        ValueError: If it counts by numbers other than Python's own.
    """
    return itertools.count(*ast.literal_eval(text.removeprefix("count").replace(")", ",)")))


class GeneratorState:
    """The state of a random number generator."""

    def __init__(self, generator: Any) -> None:
        self.description = f"a {type(generator).__name__}"
        if isinstance(generator, np.random.Generator):
            self._restore = partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
        elif isinstance(generator, random.Random):
            self._restore = partial(generator.setstate, generator.getstate())
        else:
            self._restore = partial(generator.set_state, generator.get_state())

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Restore the state."""
        self._restore()
        return True


class CounterState:
    """The position of an `itertools.count`, which cannot go back, but can be replaced: by `Snapshot.replace`."""

    description = "a count"

    def __init__(self, count: itertools.count[Any], replace: Callable[..., None]) -> None:
        self._count = count
        self._before = repr(count)
        self._replace = replace

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Replace the counter by one that continues from the saved position."""
        if repr(self._count) == self._before:
            return False
        before, self._count = self._count, count_from(self._before)
        self._replace(before, self._count, permanent=True)
        return True


class IteratorState:
    """The position of an iterator of a built-in type."""

    def __init__(self, iterator: Any) -> None:
        self.description = f"a {type(iterator).__name__}"
        self._iterator = iterator
        self._before = iterator.__reduce__()[2:]  # empty if it is exhausted

    def restore(self, replacer: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - as for all states
        """Restore the position.

        Raises:
            RuntimeError: If the iterator is exhausted, and so has let go of its items.
        """
        if self._before:
            self._iterator.__setstate__(*self._before)
            if self._iterator.__reduce__()[2:] != self._before:
                msg = "it is exhausted"
                raise RuntimeError(msg)
        return True


def stream_state(value: Any, replace: Callable[..., None]) -> GeneratorState | CounterState | IteratorState:
    """Save the position of an object of one of the types `STREAMS`."""
    if isinstance(value, itertools.count):
        return CounterState(value, replace)
    return GeneratorState(value) if isinstance(value, GENERATORS) else IteratorState(value)
