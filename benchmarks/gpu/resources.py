"""What an analysis costs on the device: waits of the computer in Lanczos steps, and memory against plan."""

from __future__ import annotations

import contextlib
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.finding import Finding, Setting, judged
from benchmarks.gpu.memory import free_cached, peak_of
from benchmarks.gpu.problems import loss, make
from benchmarks.networks import GPT
from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.krylov.lanczos import STEPS_BETWEEN_CHECKS
from lightning_hesd.numerics.operators.strategies import AnalysisCache, Strategy

if TYPE_CHECKING:
    from collections.abc import Iterator

aten = torch.ops.aten


class WaitCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations for which the computer waits for an accelerator: numbers read, and copies from the device.

    On the CPU it counts the same operations, which would be waits elsewhere.

    Attributes:
        waits: Names of the operations, in order.
    """

    READING = (
        *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero),  # noqa: SLF001
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation, and run it."""
        result = func(*args, **(kwargs or {}))
        devices = {value.device.type for value in tree_leaves((args, result)) if isinstance(value, Tensor)}
        is_copy = func.overloadpacket in {aten._to_copy, aten.copy_} and len(devices) > 1  # noqa: SLF001
        if func.overloadpacket in self.READING or is_copy:
            self.waits.append(func.overloadpacket.__name__)
        return result


@contextlib.contextmanager
def waits_counted(setting: Setting) -> Iterator[list[str]]:
    """Collect the waits inside: those that CUDA reports, or on other devices the operations that would wait."""
    if not setting.is_cuda:
        with WaitCounter() as counter:
            yield counter.waits
        return
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


def waiting(setting: Setting) -> Iterator[Finding]:
    """Count the waits per Lanczos step, from the difference of a longer run and a shorter one."""
    problem = make("MLP" if setting.is_small else "attention", is_small=setting.is_small).to(setting.device)
    few, many = STEPS_BETWEEN_CHECKS, (2 if setting.is_small else 4) * STEPS_BETWEEN_CHECKS
    per_step_on_the_cpu = 6.0  # reading is free there: three coefficients, and the test for a second pass
    for name in get_args(Strategy):
        allowed = float(name == "finite_difference")  # the norm of the vector
        counts = []
        for steps in (few, many):
            with waits_counted(setting) as waits:
                spectrum = hessian_spectrum(problem.module, problem.batches, loss, steps=steps, strategy=name)
            counts.append(len(waits))
        taken = spectrum.steps_per_probe[0] - few
        measured = (counts[1] - counts[0]) / taken
        limit = allowed + 1 / STEPS_BETWEEN_CHECKS if setting.is_cuda else allowed + per_step_on_the_cpu
        where = "CUDA's own count" if setting.is_cuda else "operations that would wait elsewhere"
        yield judged(
            f"{name}: no waiting for the device in a Lanczos step",
            measured <= limit,
            f"{measured:.3f} waits per step ({counts[0]} in {few} steps, {counts[1]} in {few + taken}), at most "
            f"{limit:.3f} expected; {where}",
        )


class Wide(nn.Module):
    """A perceptron whose vectors are large beside its graphs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (samples, 10)."""
        logits: Tensor = self.head(self.body(x))
        return logits


def _problems(setting: Setting) -> dict[str, tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
    generator = torch.Generator().manual_seed(0)
    width, samples, context = (64, 32, 16) if setting.is_small else (2048, 2048, 512)
    torch.manual_seed(0)
    images = [(torch.randn(samples, 64, generator=generator), torch.zeros(samples).long()) for _ in range(4)]
    ids = torch.randint(64, (4, 2 if setting.is_small else 8, context + 1), generator=generator)
    texts = [(part[:, :-1], part[:, 1:]) for part in ids]
    gpt = GPT(64, context, width=16 if setting.is_small else 256, depth=1 if setting.is_small else 4)
    found = {"wide perceptron": (Wide(width), images), "GPT": (gpt, texts)}
    return {
        name: (net.to(setting.device).eval(), [(x.to(setting.device), y.to(setting.device)) for x, y in data])
        for name, (net, data) in found.items()
    }


MARGIN = 1.1
"""Largest peak as a multiple of the plan."""


def memory(setting: Setting) -> Iterator[Finding]:
    """Compare the peak of the first analysis and of later ones with the plan, and see that nothing stays behind."""
    problems = _problems(setting)
    for name in ("GPT",) if setting.is_small else problems:
        module, batches = problems[name]
        hessian_spectrum(module, batches, _cross_entropy, steps=2)  # so that libraries have their workspaces
        for basis in ("none",) if setting.is_small else ("device", "cpu", "none"):
            options, cache = analysis_options(steps=4 if setting.is_small else 20, basis=basis), AnalysisCache()
            work = partial(analyze, module, weighted_batches(batches), _cross_entropy, options, cache=cache)
            before = _allocated(setting)
            _, first = peak_of(setting, work)
            spectrum, later = peak_of(setting, work)
            left = _allocated(setting) - before
            predicted = spectrum.predicted_memory or math.nan
            yield judged(
                f"{name}, basis {basis}: peak memory within the plan, and none left over",
                later <= MARGIN * predicted and not left,
                f"peak {later / 2**20:.1f} MiB, plan {predicted / 2**20:.1f} MiB, ratio {later / predicted:.2f}; the "
                f"first analysis, which compares in float64: {first / 2**20:.1f} MiB; left over: {left} bytes; "
                f"{spectrum.strategy_reason}",
            )


def _cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1].flatten())


def _allocated(setting: Setting) -> int:
    free_cached(setting)
    return torch.cuda.memory_allocated(setting.device) if setting.is_cuda else 0
