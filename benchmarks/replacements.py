"""What each replacement of an operation gains: the time of a product without it, over the time with all of them.

A replacement stays if it gains a tenth somewhere. Times are taken in turns, on an idle machine. Run as
`python -m benchmarks.replacements`.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.candidates import OURS
from benchmarks.problems import load, loss
from benchmarks.tables import tabulate
from lightning_hesd import layer_spectra
from lightning_hesd.numerics.derivatives.fast_derivatives import SLOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.problems import Size

_LAYER_STEPS = 2

KINDS = {
    function.__name__.strip("_").replace("_", " "): [f for f in SLOW if SLOW[f] is function]
    for function in SLOW.values()
}
"""The replacements by their names, and the operations that each replaces."""

EXPLANATION = f"""\
Time without a replacement, over that with all of them: 1.25 means that without it the work takes a quarter longer. The
first number of a cell is that of one HVP of the whole network, the second that of `layer_spectra` of all blocks with
{_LAYER_STEPS} steps. *all*: without any replacement. Empty: the network has no such
operation of the sizes that are replaced. CPU times of two threads, medians of
{{rounds}} rounds in turns.
"""


@contextlib.contextmanager
def _without(kind: str | None) -> Iterator[None]:
    left = {} if kind is None else {f: r for f, r in SLOW.items() if f not in KINDS[kind]}
    with patch.dict(SLOW, left, clear=True):
        yield


def _used_kinds(name: str, size: Size) -> set[str]:
    """Return the replacements that an HVP of a problem uses."""
    used = set()

    def recording(kind: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = replacement(*args, **kwargs)
            if result is not None:
                used.add(kind)
            return result

        return recorded

    recorded = {f: recording(kind, SLOW[f]) for kind, functions in KINDS.items() for f in functions}
    with patch.dict(SLOW, recorded), OURS.product(load(name, size=size)):
        return used


def _product_ratio(name: str, size: Size, rounds: int, kind: str | None) -> tuple[float, float]:
    vector = torch.randn(load(name, size=size).dimension, generator=torch.Generator().manual_seed(0))
    with contextlib.ExitStack() as stack:
        products = [stack.enter_context(OURS.product(load(name, size=size)))]
        with _without(kind):
            products.append(stack.enter_context(OURS.product(load(name, size=size))))
        return _in_turns([partial(product, vector) for product in products], rounds)


def _layers_ratio(name: str, size: Size, rounds: int, kind: str | None) -> tuple[float, float]:
    problem = load(name, size=size)
    spectra = partial(layer_spectra, problem.module, problem.batches, loss, steps=_LAYER_STEPS)

    def without() -> None:
        with _without(kind):
            spectra()

    return _in_turns([spectra, without], rounds)


def _in_turns(works: Sequence[Callable[[], Any]], rounds: int) -> tuple[float, float]:
    """Return the median seconds of the first work, and the median ratio of the second to it, over rounds in turns."""
    seconds = []
    for _ in range(rounds + 1):
        times = [time.process_time()]
        for work in works:
            work()
            times.append(time.process_time())
        seconds.append(np.diff(times))
    taken = np.array(seconds[1:])
    return float(np.median(taken[:, 0])), float(np.median(taken[:, 1] / taken[:, 0]))


def _measure(name: str, steps: int, rounds: int, size: Size) -> list[str]:  # noqa: ARG001 - the steps are fixed
    used = _used_kinds(name, size)
    row: list[str] = []
    milliseconds: list[str] = []
    for kind in (None, *KINDS):
        if kind is not None and kind not in used:
            row.append("")
            continue
        found = [ratio(name, size, rounds, kind) for ratio in (_product_ratio, _layers_ratio)]
        milliseconds = milliseconds or [f"{1e3 * seconds:.3g}" for seconds, _ in found]
        row.append(" ".join(f"{each:.2f}" for _, each in found))
    return [name, " ".join(milliseconds), *row]


if __name__ == "__main__":
    tabulate(
        "Replacements",
        ["network", "time, ms", "all", *KINDS],
        _measure,
        description=__doc__,
        explanation=EXPLANATION,
        rounds=9,
    )
