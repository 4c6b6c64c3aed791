"""Differences between devices: floating-point dtypes, random number generators and cached memory."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

_HAVE_FLOAT64 = {"cpu", "cuda"}

_KINDS = ("cuda", "xpu", "mps", "mtia")
"""Accelerators that PyTorch itself knows; others register a name."""


def finest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that does not compute in float64, such as Apple's MPS."""
    if device.type in _HAVE_FLOAT64:
        return torch.float64
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):  # some refuse the dtype, others arithmetic
        return torch.float32
    return torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64: on its device, or on the CPU if the device does not compute in float64."""
    return tensor.double() if finest_dtype(tensor.device) is torch.float64 else tensor.cpu().double()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; float64 becomes float32 if the device does not compute in float64."""
    return tensor.to(device, finest_dtype(device) if tensor.dtype is torch.float64 else tensor.dtype)


def accelerators() -> list[Any]:
    """Return PyTorch's module of each kind of accelerator that this process uses, such as `torch.cuda`.

    An accelerator that is not initialized has drawn no random numbers. Access to its generators would initialize it,
    which takes memory and fails in forked processes.
    """
    own: Any = torch._C  # noqa: SLF001
    modules = [getattr(torch, name, None) for name in (*_KINDS, own._get_privateuse1_backend_name())]  # noqa: SLF001
    return [module for module in modules if module is not None and _is_in_use(module)]


def release_memory() -> None:
    """Free the memory of a failed analysis, so that training has as much as before."""
    gc.collect()
    for module in accelerators():
        if hasattr(module, "empty_cache"):
            module.empty_cache()


def _is_in_use(module: Any) -> bool:
    if not hasattr(module, "get_rng_state") or not module.is_available():
        return False
    return bool(module.is_initialized()) if hasattr(module, "is_initialized") else True
