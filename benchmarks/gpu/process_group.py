"""Training and communication in a process group of one process: NCCL on a GPU, Gloo elsewhere."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.gpu.finding import Finding, Setting, judged
from benchmarks.gpu.training import callback_batch, callback_of, differing, same_spectrum, train
from lightning_hesd.numerics.collectives import DistributedCollectives

if TYPE_CHECKING:
    from collections.abc import Iterator


def process_group(setting: Setting) -> Iterator[Finding]:
    """Train and communicate in a process group of one process."""
    backend = "nccl" if setting.is_cuda else "gloo"
    callback = callback_of(dataloader=[callback_batch(setting)])
    with _clean_environment():
        try:
            plain = train(setting, None, strategy=DDPStrategy(process_group_backend=backend))
            watched = train(setting, callback, strategy=DDPStrategy(process_group_backend=backend))
            failures = _failing_collectives(setting)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    changed = differing(plain, watched)
    yield judged(
        f"ddp, one process, {backend}: training is the same to the last bit with the callback",
        not changed,
        f"{changed} of {len(plain.state)} values of the final state differ",
    )
    yield same_spectrum(
        f"ddp, one process, {backend}: the spectrum is that without a process group", setting, callback, watched
    )
    yield judged(
        f"{backend}: sums, maxima and broadcasts of the package's collectives",
        not failures,
        ", ".join(failures) or "float32, float64, bfloat16, integers, numbers, objects, functions",
    )


def _failing_collectives(setting: Setting) -> list[str]:
    """Return the names of the collectives that fail, or return something else than a process alone has."""
    group = DistributedCollectives(setting.device)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
    tensors = [torch.arange(4, device=place).to(dtype) for dtype in dtypes for place in (setting.device, "cpu")]
    cases: dict[str, bool] = {f"sum of {t.dtype} on {t.device}": torch.equal(group.sum(t.clone()), t) for t in tensors}
    cases["sum_values"] = group.sum_values([1.5, 1e-300]) == [1.5, 1e-300]
    cases["max"] = group.max(2.5) == 2.5
    cases["any"] = group.any(flag=True) and not group.any(flag=False)
    cases["broadcast"] = group.broadcast({"a": [1, None]}) == {"a": [1, None]}
    cases["run_together"] = group.run_together(lambda: 3) == 3
    return [name for name, holds in cases.items() if not holds]


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Restore the environment variables, to which Lightning adds those of its process group."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
