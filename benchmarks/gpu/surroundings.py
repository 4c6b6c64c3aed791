"""Spectra are the same with another default device, stream, GPU or layout, with compilation, and with dropout."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.gpu.finding import Finding, Setting, judged
from benchmarks.gpu.problems import Problem, cudnn_setting, loss, make
from benchmarks.isolation import describe
from lightning_hesd import hessian_spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_hesd import Spectrum

STEPS = 16
ROUNDING = 1e-4
"""Relative difference of extremes in float32 whose products are summed in another order."""


def surroundings(setting: Setting) -> Iterator[Finding]:
    """Compare spectra with one on the current device, in the usual layout, on the usual stream."""
    problem = make("convolutions and batch norm", is_small=setting.is_small).to(setting.device)
    expected = _spectrum(problem)

    def compared(title: str, found: Spectrum, remark: str = "") -> Finding:
        pairs = [(getattr(found, name), getattr(expected, name)) for name in ("lambda_max", "lambda_min")]
        error = max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)
        return judged(title, error <= ROUNDING, f"difference of the extremes {error:.1e}, limit {ROUNDING:.0e}{remark}")

    with _default_device(setting.device):
        yield compared("new tensors on the device by default: the same spectrum", _spectrum(problem))
    layout = Problem(
        problem.name,
        problem.module.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        [(x.contiguous(memory_format=torch.channels_last), y) for x, y in problem.batches],
    )
    yield compared("channels last: the same spectrum", _spectrum(layout))
    backend = "inductor" if setting.is_cuda else "eager"
    compiled: Any = torch.compile(problem.module, backend=backend)
    title = "a compiled module: the same spectrum"
    try:
        compiled(problem.batches[0][0])
    except Exception as error:  # noqa: BLE001 - not every machine has the compilers
        yield Finding(title, "for information", f"{backend} does not compile here: {describe(error)}")
    else:
        yield compared(title, _spectrum(problem, compiled), f"; backend {backend}")
    yield _with_dropout(setting, problem)
    if not setting.is_cuda:
        yield Finding("another stream, another GPU: the same spectrum", "needs CUDA", "")
        return
    setting.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(setting.device)):  # type: ignore[no-untyped-call]
        found = _spectrum(problem)
    setting.synchronize()
    yield compared("another stream: the same spectrum", found)
    other = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    if other == torch.cuda.current_device():
        yield Finding("another GPU than the current one: the same spectrum", "for information", "there is one GPU only")
        return
    yield compared(
        "another GPU than the current one: the same spectrum", _spectrum(problem.to(torch.device("cuda", other)))
    )


def _spectrum(problem: Problem, module: Any = None, **options: Any) -> Spectrum:
    return hessian_spectrum(module or problem.module, problem.batches, loss, steps=STEPS, **options)


@contextlib.contextmanager
def _default_device(device: torch.device) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def _with_dropout(setting: Setting, problem: Problem) -> Finding:
    """Analyze a loss with dropout: each evaluation draws the same mask, and generators go on from where they were."""
    module = nn.Sequential(problem.module, nn.Dropout(0.3))

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(setting.device)] if setting.is_cuda else [])]

    before = states()
    with cudnn_setting("deterministic", value=True):
        first, second = (_spectrum(problem, module, mode="train", strategy=name) for name in ("graph", "recompute"))
    same = all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    difference = abs(first.lambda_max - second.lambda_max) / second.lambda_max
    return judged(
        "dropout: the same mask in every evaluation, and generators as before",
        same and difference <= ROUNDING and first.verified == second.verified == "yes",
        f"graph kept or recomputed: λ_max differs by {difference:.1e}; generators {'as before' if same else 'CHANGED'}",
    )
