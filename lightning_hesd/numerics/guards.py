"""The state in which second derivatives are exact: what is switched off for the analysis, and put back afterwards."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hesd.numerics.snapshot import preserved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Mode = Literal["eval", "train", "keep"]


@contextlib.contextmanager
def analysis_state(module: nn.Module, mode: Mode = "eval", analysed: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Bring `module` and PyTorch into the state for exact second derivatives; put everything back on leaving.

    Gradients are enabled; autocast and TF32 are off, and so is what has no second derivative: fused attention, compiled
    code (it runs eagerly) and, for recurrent networks, cuDNN (in evaluation mode it has not even a first one). The
    gradients the user accumulated, and hooks on parameters, are set aside.

    Args:
        module: The module to analyse.
        mode: Module mode meanwhile; "keep" leaves every submodule in the mode it is in.
        analysed: Parameters that require grad meanwhile, even if they are frozen.

    Raises:
        ValueError: If a norm would wait for other processes.
    """
    parameters = list(module.parameters())
    gradients = [p.grad for p in parameters]
    # Autograd would call hooks of parameters for every gradient, and the spectrum would be that of what they return.
    hooked = {p: p._backward_hooks for p in parameters if p._backward_hooks}  # noqa: SLF001
    device_types = {p.device.type for p in parameters} | {"cpu"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved(module))
        stack.enter_context(_unfrozen(analysed))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_full_float32_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(_without_cudnn())
        try:
            for p in parameters:
                p.grad = None
            for p in hooked:
                p._backward_hooks = None  # noqa: SLF001
            if mode != "keep":
                module.train(mode == "train")
            _check_norms(module)
            yield
        finally:
            for p, grad in zip(parameters, gradients, strict=True):
                p.grad = grad
            for p, hooks in hooked.items():
                p._backward_hooks = hooks  # noqa: SLF001


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
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
