"""The two kinds of measurement: single HVPs, in turns, and whole runs, each in a new process."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.candidates import OTHERS, OURS, TOLERANCE, Candidate, attention, gradient, loop_product
from benchmarks.isolation import PeakMemory, describe
from benchmarks.peers import PEERS
from benchmarks.problems import load
from benchmarks.truth import in_float64, relative_error, steps_within

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.candidates import Product, Run
    from benchmarks.problems import Problem, Size

CANDIDATES = {candidate.name: candidate for candidate in [OURS, *OTHERS, *PEERS]}
GRADIENT = "gradient"
SEED = 0
FEWEST_ROUNDS, LONG = 3, 60.0


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of `work`."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def products(name: str, pieces: int, size: Size, rounds: int) -> dict[str, dict[str, Any]]:
    """Time HVPs of all candidates and plain gradients, in turns; in fewer rounds if they take long.

    Returns:
        For each candidate, and for the gradient: its `seconds` in every round. A candidate also has the seconds to
        `build` it and the relative `error` of its HVP, or the message of its `failure`. `as_is` is the failure with
        fused attention on, if there is one.
    """
    problem = load(name, pieces=pieces, size=size)
    vector = torch.randn(problem.dimension, generator=torch.Generator().manual_seed(SEED))
    vector /= vector.norm()
    exact = _exact_product(name, size, vector)
    results: dict[str, dict[str, Any]] = {GRADIENT: {"seconds": []}}
    with contextlib.ExitStack() as stack:
        ready: dict[str, Callable[[], Any]] = {GRADIENT: lambda: gradient(problem)}
        ready[GRADIENT]()
        for candidate in CANDIDATES.values():
            if pieces not in candidate.pieces:
                continue
            result = results[candidate.name] = {"seconds": []}
            own = load(name, pieces=pieces, size=size)  # differences move the weights, which all graphs share
            try:
                if candidate.package is not None and not candidate.fused:
                    result["as_is"] = _tried_as_is(candidate, own, vector)
                product = _build(candidate, own, stack, result)
                ready[candidate.name] = _call(candidate, product, vector)
                result["error"] = float((ready[candidate.name]().double() - exact).norm() / exact.norm())
            except Exception as error:  # noqa: BLE001 - the report has the failure
                result["failure"] = describe(error)
                ready.pop(candidate.name, None)
        started = time.perf_counter()
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - started > LONG:
                break
            for key, work in ready.items():
                work()  # so that candidates share neither caches nor the allocator's memory
                results[key]["seconds"].append(seconds(work))
    return results


def _build(candidate: Candidate, problem: Problem, stack: contextlib.ExitStack, result: dict[str, Any]) -> Product:
    started = time.perf_counter()
    with attention(fused=candidate.fused):
        product = stack.enter_context(candidate.product(problem))
    result["build"] = time.perf_counter() - started
    return product


def _call(candidate: Candidate, product: Product, vector: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with attention(fused=candidate.fused):
            return product(vector).detach()

    return call


def _exact_product(name: str, size: Size, vector: torch.Tensor) -> torch.Tensor:
    problem = in_float64(load(name, size=size))
    with attention(fused=False), loop_product(problem) as product:
        return product(vector.double())


def _tried_as_is(candidate: Candidate, problem: Problem, vector: torch.Tensor) -> str:
    """Return the failure of an HVP with the network as it is, with fused attention, or an empty result."""
    try:
        with attention(fused=True), candidate.product(problem) as product:
            product(vector)
    except Exception as error:  # noqa: BLE001 - the report has any failure
        return describe(error)
    return ""


def whole(name: str, pieces: int, size: Size, candidate_name: str, truth: float) -> dict[str, Any]:
    """Estimate the density and C_t of a problem with one candidate.

    Run it in a new process: memory is measured above that of a process that has computed one gradient.
    """
    candidate = CANDIDATES[candidate_name]
    assert candidate.density is not None  # noqa: S101 - for the type checker; only such candidates are asked
    problem = load(name, pieces=pieces, size=size)
    gradient(problem)
    memory = PeakMemory()
    result: dict[str, Any] = {}
    try:
        with attention(fused=candidate.fused):
            started = time.perf_counter()
            run = candidate.density(problem, nodes(size), SEED)
            taken = time.perf_counter() - started
            result |= _of_density(run, taken, truth) | {"peak_bytes": memory.growth()}
            spent = run.ends or (run.products, taken)
            if candidate.c_t is not None:
                started = time.perf_counter()
                run = candidate.c_t(problem, SEED)
                spent = run.products, time.perf_counter() - started
            result |= {"c_t": run.c_t, "c_t_products": spent[0], "c_t_seconds": spent[1]}
            result["error"] = relative_error(run.c_t, truth)
    except Exception as error:  # noqa: BLE001 - the report has the failure
        result["failure"] = describe(error)
    return result


def _of_density(run: Run, taken: float, truth: float) -> dict[str, Any]:
    return {
        "density_seconds": taken,
        "density_products": run.products,
        "density_error": relative_error(run.c_t, truth),
        "hindsight": None if run.rule is None else steps_within(run.rule, truth, TOLERANCE),
        "note": run.note,
    }


def nodes(size: Size) -> int:
    """Return the number of nodes of a density."""
    return 100 if size == "full" else 20
