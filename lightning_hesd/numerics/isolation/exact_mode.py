"""The state in which second derivatives are exact: what is switched off for the analysis, and put back afterwards."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hesd.numerics.derivatives.hooks import no_hooks_in_backward
from lightning_hesd.numerics.devices import accelerators
from lightning_hesd.numerics.isolation.isolation import Isolation
from lightning_hesd.numerics.isolation.modes import set_mode
from lightning_hesd.numerics.isolation.snapshot import Snapshot, restored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lightning_hesd.numerics.isolation.modes import Mode, ModuleModes


@contextlib.contextmanager
def analysis_state(
    module: nn.Module,
    mode: Mode | ModuleModes = "eval",
    analysed: Sequence[nn.Parameter] = (),
    others: Sequence[object] = (),
) -> Iterator[Isolation]:
    """Bring `module` and PyTorch into the state for exact second derivatives; put everything back on leaving.

    Gradients are enabled; autocast and TF32 are off, and so is what has no second derivative: fused attention, compiled
    code (it runs eagerly) and, for recurrent networks, cuDNN (in evaluation mode it has not even a first one). The
    gradients the user accumulated are set aside, and so are hooks: on parameters all of them, elsewhere in the
    differentiation of the analysis (see `hooks`).

    Args:
        module: The module to analyse.
        mode: Module mode meanwhile; "keep" leaves every submodule in the mode it is in.
        analysed: Parameters that require grad meanwhile, even if they are frozen.
        others: Other objects that the user's functions may change.

    Yields:
        What keeps evaluations of the user's functions apart.

    Raises:
        ValueError: If a norm would wait for other processes.
    """
    snapshot = Snapshot(module, others=others)
    isolation = Isolation(module, others, analysed, snapshot)
    device_types = {p.device.type for p in module.parameters()} | {"cpu"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored(snapshot))
        snapshot.set_gradients_aside()
        stack.enter_context(_unfrozen(analysed))
        stack.enter_context(isolation.hooks.passed_by())
        stack.enter_context(isolation.power_iterations.kept())
        stack.enter_context(no_hooks_in_backward(list(module.parameters())))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_autocast(device_types))
        stack.enter_context(_full_float32_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(_without_cudnn())
        set_mode(module, mode)
        _check_norms(module)
        yield isolation


@contextlib.contextmanager
def _without_autocast(device_types: Iterable[str]) -> Iterator[None]:
    """Switch autocast off, and let contexts that would switch it on leave it off."""
    enter = torch.autocast.__enter__

    def enter_disabled(self: torch.autocast) -> object:
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)  # type: ignore[no-untyped-call]
        finally:
            self._enabled = wanted

    with contextlib.ExitStack() as stack:
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def _check_norms(module: nn.Module) -> None:
    """Refuse norms that wait for the statistics of other processes, whose batches are others, or none at all.

    Raises:
        ValueError: If there is one.
    """
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if alone or torch.distributed.get_world_size() == 1:
        return
    if any(isinstance(m, nn.SyncBatchNorm) and m.training for m in module.modules()):
        msg = (
            "SyncBatchNorm in training mode waits for the batches of all processes, and an analysis deals them out "
            "unevenly: analyse with mode='eval'."
        )
        raise ValueError(msg)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = before


@contextlib.contextmanager
def _unfrozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad = True
        yield
    finally:
        for p in frozen:
            p.requires_grad = False


def release_memory() -> None:
    """Give back what a failed analysis held, so that training finds the memory it had."""
    gc.collect()
    for module in accelerators():
        if hasattr(module, "empty_cache"):
            module.empty_cache()


@contextlib.contextmanager
def _full_float32_precision() -> Iterator[None]:
    """Switch TF32 and its kin off for matrix products and convolutions."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    flag, off = "allow_tf32", False
    if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9; mixing the old flags with the new ones is an error there
        backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
        cpu: Any = torch.backends.mkldnn  # its type knows none of these
        backends += [cpu.matmul, cpu.conv, cpu.rnn]
        flag, off = "fp32_precision", "ieee"  # type: ignore[assignment]
    before = [getattr(backend, flag) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, flag, off)
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, flag, value)
