"""Generators of random numbers, counters and iterators: where they are, and how to take them back there."""

from __future__ import annotations

import ast
import itertools
import random
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

GENERATORS: tuple[type, ...] = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter("")), type(iter(range(0))))
STREAMS: tuple[type, ...] = (*GENERATORS, *ITERATORS, itertools.count)


class Replace(Protocol):
    """Puts another object in all places of a value, for good."""

    def __call__(self, value: object, other: object, *, for_good: bool) -> None:
        """Put it there."""


class Generator:
    """A generator of random numbers."""

    def __init__(self, generator: Any) -> None:
        self.kind = f"a {type(generator).__name__}"
        if isinstance(generator, np.random.Generator):
            self._restore = partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
        elif isinstance(generator, random.Random):
            self._restore = partial(generator.setstate, generator.getstate())
        else:
            self._restore = partial(generator.set_state, generator.get_state())

    def restore(self, references: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Put its state back."""
        self._restore()
        return True


class Count:
    """An `itertools.count`, which cannot go back, but can be replaced."""

    kind = "a count"

    def __init__(self, count: itertools.count[Any], replace: Replace) -> None:
        self._count = count
        self._before = repr(count)
        self._replace = replace

    def restore(self, references: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Put a new one in its place that goes on from where it was."""
        if repr(self._count) == self._before:
            return False
        arguments = ast.literal_eval(self._before.removeprefix("count").replace(")", ",)"))
        before, self._count = self._count, itertools.count(*arguments)
        self._replace(before, self._count, for_good=True)
        return True


class PlainIterator:
    """An iterator of a built-in type, which says where it is."""

    def __init__(self, iterator: Any) -> None:
        self.kind = f"a {type(iterator).__name__}"
        self._iterator = iterator
        self._before = iterator.__reduce__()[2:]  # its position, unless it is exhausted

    def restore(self, references: object | None, *, thorough: bool) -> bool:  # noqa: ARG002 - for the protocol
        """Go back.

        Raises:
            RuntimeError: If it is exhausted for good.
        """
        if self._before:
            self._iterator.__setstate__(*self._before)
            if self._iterator.__reduce__()[2:] != self._before:
                msg = "it is exhausted"
                raise RuntimeError(msg)
        return True


def stream(value: Any, replace: Replace) -> Generator | Count | PlainIterator:
    """Return the state of one of `STREAMS`."""
    if isinstance(value, itertools.count):
        return Count(value, replace)
    return Generator(value) if isinstance(value, GENERATORS) else PlainIterator(value)
