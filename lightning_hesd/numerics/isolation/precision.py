"""Evaluation of a loss in one precision, whatever its data, its constants and its casts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class InPrecision(TorchFunctionMode):
    """Runs PyTorch's functions with `dtype` in the place of less precise floating-point types.

    Arguments of such a type are cast, and a type that is an argument, as in `x.to(torch.float32)`, is replaced. What is
    changed in place keeps its type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function in the precision."""
        if func in _CASTS:
            return args[0].to(self._dtype)
        kwargs = dict(kwargs or {})
        if _changes_arguments(func, kwargs):
            return func(*args, **kwargs)
        return func(*tree_map(self._precise, args), **tree_map(self._precise, kwargs))

    def _precise(self, value: Any) -> Any:
        """Return a tensor in the precision, the type in the place of a less precise one, and others as they are."""
        if isinstance(value, Tensor) and self._is_less_precise(value.dtype):
            return value.to(self._dtype)
        return self._dtype if isinstance(value, torch.dtype) and self._is_less_precise(value) else value

    def _is_less_precise(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(self._dtype).eps


def _changes_arguments(func: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether a function changes a tensor in place, or reads or sets an attribute of one."""
    name = getattr(func, "__name__", "")
    return (
        name in {"__get__", "__set__", "__setitem__"} or (name.endswith("_") and name[-2:] != "__") or "out" in options
    )
