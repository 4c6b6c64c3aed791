"""Operations that PyTorch differentiates wrongly or slowly, replaced wherever the user's functions call them."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lightning_hesd.numerics.derivatives.compositions import (
    WITHOUT_FLOAT64,
    WRONG_FORWARD_DERIVATIVE,
    WRONG_SECOND_DERIVATIVE,
    WRONG_THIRD_DERIVATIVE,
)
from lightning_hesd.numerics.derivatives.control_flow import is_control_flow, run_eagerly
from lightning_hesd.numerics.derivatives.fast_derivatives import SLOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_DIFFERENTIATING = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}

_EMBEDDING = {F.embedding, F.embedding_bag}

_ATTENTION_LAYER: Any = F.multi_head_attention_forward
"""A function that reports itself to a mode, but not the operations inside."""

_REPLACED = {
    *_DIFFERENTIATING,
    *_EMBEDDING,
    torch.embedding_renorm_,
    *SLOW,
    *WITHOUT_FLOAT64,
    *WRONG_FORWARD_DERIVATIVE,
    *WRONG_SECOND_DERIVATIVE,
    *WRONG_THIRD_DERIVATIVE,
}

_REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors of replacements for wrong arguments: the call then goes to PyTorch, whose message users know."""

Renormalization = tuple[Tensor, Tensor, float, float]
"""Weights of an embedding, the rows that are used, their maximal norm, and the order of the norm."""


class Replacements(TorchFunctionMode):
    """Replaces operations in this context; all others run as usual.

    Some facts about a loss show only while it is evaluated. If `missed` names one, the loss must be evaluated again.

    Attributes:
        differentiated: Whether the loss contains derivatives of its operations: normalizations are written out.
        vectorized: Whether the loss takes derivatives along many directions at once: no autograd functions are used.
        renormalized: Whether the rows of all embeddings are within their `max_norm`, and need no renormalization.
        missed: Names of those of the three attributes above that are False and should be True.
        renormalizations: Changes in place that embeddings would have made to their weights.
    """

    def __init__(self, *, differentiated: bool = False, vectorized: bool = False, renormalized: bool = False) -> None:
        super().__init__()
        self.differentiated = differentiated
        self.vectorized = vectorized
        self.renormalized = renormalized
        self.missed: set[str] = set()
        self.renormalizations: list[Renormalization] = []
        self._has_compact_norm = False
        self._has_fast_operation = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION_LAYER and {*types} <= {Tensor, nn.Parameter}:
            with self:
                return _reporting_operations(func)(*args, **kwargs)
        if func not in _REPLACED:
            if is_control_flow(func):
                with self:  # for the user's functions that it calls
                    return run_eagerly(func, args, kwargs)
            return func(*args, **kwargs)
        for replacement in self._candidates(func):
            try:
                result = replacement(*args, **kwargs)
            except _REFUSALS:
                continue
            if result is not None:
                self._has_fast_operation |= replacement is SLOW.get(func)
                return result
        if func in _DIFFERENTIATING:
            self._record_differentiation(kwargs)
        elif func in _EMBEDDING and kwargs.get("max_norm") is not None and args[1].is_leaf:
            self._record_renormalization(args[1], args[0], kwargs["max_norm"], kwargs["norm_type"])
            kwargs = {**kwargs, "max_norm": None}
        elif func is torch.embedding_renorm_:
            self._record_renormalization(*args, **kwargs)
            return args[0]
        return func(*args, **kwargs)

    def _candidates(self, func: Any) -> Iterator[Callable[..., Any]]:
        """Yield the functions that may replace a function here, best first."""
        if func in WRONG_SECOND_DERIVATIVE:
            yield WRONG_SECOND_DERIVATIVE[func]
        if func in WITHOUT_FLOAT64:
            yield WITHOUT_FLOAT64[func]
        if func in WRONG_FORWARD_DERIVATIVE and _in_transform():
            yield WRONG_FORWARD_DERIVATIVE[func]
        if func in WRONG_THIRD_DERIVATIVE:
            if self.differentiated or _in_transform():
                yield WRONG_THIRD_DERIVATIVE[func]
            else:
                self._has_compact_norm = True
        if func in SLOW and torch.is_grad_enabled() and not self.vectorized and not _in_transform():
            yield SLOW[func]

    def _record_differentiation(self, options: Mapping[str, Any]) -> None:
        if self._has_compact_norm and options.get("create_graph"):
            self.missed.add("differentiated")
        if self._has_fast_operation and (options.get("is_grads_batched") or _in_transform()):
            self.missed.add("vectorized")

    def _record_renormalization(self, weight: Tensor, rows: Tensor, max_norm: float, norm_type: float) -> None:
        if not self.renormalized:
            self.missed.add("renormalized")
            self.renormalizations.append((weight.detach(), rows.detach(), max_norm, norm_type))


def _in_transform() -> bool:
    """Whether a function transform or forward-mode differentiation is active, which may differentiate any operation."""
    has_interpreter = torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return has_interpreter or forward_ad._current_level >= 0  # noqa: SLF001


def _reporting_operations(function: FunctionType) -> FunctionType:
    """Return a copy of a function of PyTorch that reports the operations inside to modes, and not itself."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
