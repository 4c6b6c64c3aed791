"""Evaluation of a loss without its casts to less precise floating-point types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class WithoutCasts(TorchFunctionMode):
    """Runs PyTorch's functions with `dtype` wherever their arguments name a less precise floating-point type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function with the more precise type."""
        if func in _CASTS:
            return args[0].to(self._dtype)
        return func(*map(self._precise, args), **{name: self._precise(value) for name, value in (kwargs or {}).items()})

    def _precise(self, value: Any) -> Any:
        """Return an argument, or the more precise type in the place of another."""
        is_type = isinstance(value, torch.dtype) and value.is_floating_point
        return self._dtype if is_type and torch.finfo(value).eps > torch.finfo(self._dtype).eps else value
