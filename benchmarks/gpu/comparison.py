"""Ours beside the other candidates of the benchmark, on the device: time, memory and error."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.candidates import OURS, PYHESSIAN, TOLERANCE, Candidate, attention, loop_product
from benchmarks.gpu.finding import Finding, Setting, judged
from benchmarks.gpu.memory import peak_of
from benchmarks.isolation import describe
from benchmarks.peers import PEERS
from benchmarks.problems import RECIPES, load
from benchmarks.truth import in_float64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.problems import Problem, Size

CANDIDATES = [OURS, PYHESSIAN, *(peer for peer in PEERS if not peer.fused)]
"""The exact candidates with a density."""

LARGEST_ERROR = 1e-4
"""Relative error of an HVP in float32 above which it is not exact."""


def comparison(setting: Setting) -> Iterator[Finding]:
    """Compare HVPs and whole estimates; a row for each problem, number of batches and candidate."""
    size: Size = "quick" if setting.is_small else "full"
    names = ("mlp",) if setting.is_small else tuple(RECIPES)
    for name in names if _has_digits() else ("gpt",):
        for pieces in (2,) if setting.is_small else (1, 8):
            yield from _compared(setting, name, pieces, size)
    if not _has_digits():
        yield Finding("the problems with images", "for information", "left out: scikit-learn is not installed")


def _has_digits() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def _compared(setting: Setting, name: str, pieces: int, size: Size) -> Iterator[Finding]:
    def problem() -> Problem:
        return load(name, pieces=pieces, size=size, device=setting.device)

    own = problem()
    vector = torch.randn(own.dimension, generator=torch.Generator().manual_seed(0)).to(setting.device)
    vector /= vector.norm()
    with attention(fused=False), loop_product(in_float64(problem())) as product:
        exact = product(vector.double())
    ours: dict[str, float] = {}
    for candidate in CANDIDATES:
        title = f"{RECIPES[name].title}, batches: {pieces}, {candidate.name}"
        if candidate.package is not None and not _is_installed(candidate.package):
            yield Finding(title, "for information", "not installed")
            continue
        try:
            found = _measured(setting, candidate, problem, vector, exact)
        except Exception as error:
            if candidate is OURS:
                raise
            yield Finding(title, "for information", describe(error))
            continue
        ours = ours or found
        yield _finding(title, found, ours, is_ours=candidate is OURS)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _measured(
    setting: Setting, candidate: Candidate, problem: Callable[[], Problem], vector: torch.Tensor, exact: torch.Tensor
) -> dict[str, float]:
    """Return seconds and error of an HVP, and seconds, HVPs, memory and C_t of an estimate of the density."""
    rounds, nodes = (1, 10) if setting.is_small else (10, 50)
    found: dict[str, float] = {}
    with attention(fused=candidate.fused):
        with contextlib.ExitStack() as stack:
            product = stack.enter_context(candidate.product(problem()))
            result = product(vector).detach()
            found["error"] = float((result.double() - exact).norm() / exact.norm())
            found["product"] = statistics.median(_seconds(setting, lambda: product(vector)) for _ in range(rounds))
        assert candidate.density is not None  # noqa: S101 - for the type checker; only such candidates are listed
        estimate, own = candidate.density, problem()
        estimate(own, 4, 0)  # so that libraries have their workspaces
        started = time.perf_counter()
        run, peak = peak_of(setting, lambda: estimate(own, nodes, 0))
        found |= {"density": time.perf_counter() - started, "peak": peak, "products": run.products, "c_t": run.c_t}
        if candidate.c_t is not None and not setting.is_small:
            found["until"] = _seconds(setting, lambda: candidate.c_t and candidate.c_t(own, 0))
    return found


def _seconds(setting: Setting, work: Callable[[], Any]) -> float:
    setting.synchronize()
    started = time.perf_counter()
    work()
    setting.synchronize()
    return time.perf_counter() - started


def _finding(title: str, found: dict[str, float], ours: dict[str, float], *, is_ours: bool) -> Finding:
    figures = (
        f"HVP {1e3 * found['product']:.3g} ms ({found['product'] / ours['product']:.2f} × ours), error "
        f"{found['error']:.1e}; density {found['density']:.3g} s ({found['density'] / ours['density']:.2f} × ours), "
        f"{found['products']:.0f} HVPs, peak {found['peak'] / 2**20:.0f} MiB, C_t {found['c_t']:.5f}"
    )
    if is_ours:
        if "until" in found:
            figures += f"; C_t to {TOLERANCE:.0%} in {found['until']:.3g} s"
        return judged(title, found["error"] <= LARGEST_ERROR, figures)
    return Finding(title, "for information", figures)
