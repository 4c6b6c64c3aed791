"""What each replacement of an operation gains: the time of an HVP without it, over the time with all of them.

A replacement stays if it gains a tenth somewhere. Times are taken in turns, on an idle machine. Run as
`python -m benchmarks.replacements`.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.candidates import OURS
from benchmarks.problems import load
from benchmarks.tables import tabulate
from lightning_hesd.numerics.derivatives.fast_derivatives import SLOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.problems import Size

    Product = Callable[[torch.Tensor], torch.Tensor]

KINDS = {
    function.__name__.strip("_").replace("_", " "): [f for f in SLOW if SLOW[f] is function]
    for function in SLOW.values()
}
"""The replacements by their names, and the operations that each replaces."""

EXPLANATION = """\
Time of one HVP in evaluation mode, on two threads, without a replacement, over that with all of them: 1.25 means that
without it a product takes a quarter longer. *all*: without any. Medians of {rounds} rounds in turns."""


@contextlib.contextmanager
def _without(kind: str | None) -> Iterator[None]:
    left = {} if kind is None else {f: r for f, r in SLOW.items() if f not in KINDS[kind]}
    with patch.dict(SLOW, left, clear=True):
        yield


def _measure(name: str, steps: int, rounds: int, size: Size) -> list[str]:  # noqa: ARG001 - products, not runs
    kinds: list[str | None] = [None, *KINDS]
    with contextlib.ExitStack() as stack:
        problem = load(name, size=size)
        vector = torch.randn(problem.dimension, generator=torch.Generator().manual_seed(0))
        everything = stack.enter_context(OURS.product(problem))
        used = {}
        for kind in kinds:
            with _without(kind):
                used[kind] = stack.enter_context(OURS.product(load(name, size=size)))
        seconds: dict[Any, list[float]] = {key: [] for key in ("with", *used)}
        for _ in range(rounds + 1):
            for key, product in {"with": everything, **used}.items():
                started = time.perf_counter()
                product(vector)
                seconds[key].append(time.perf_counter() - started)
    medians = {key: float(np.median(times[1:])) for key, times in seconds.items()}
    return [name, f"{1e3 * medians['with']:.1f}", *(f"{medians[kind] / medians['with']:.2f}" for kind in kinds)]


if __name__ == "__main__":
    tabulate(
        "Replacements",
        ["network", "product, ms", "without all", *KINDS],
        _measure,
        description=__doc__,
        explanation=EXPLANATION,
        rounds=9,
    )
