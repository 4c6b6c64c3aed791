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
    WRONG_FORWARD_DERIVATIVE,
    WRONG_SECOND_DERIVATIVE,
    WRONG_THIRD_DERIVATIVE,
)
from lightning_hesd.numerics.derivatives.control_flow import is_control_flow, run_plainly
from lightning_hesd.numerics.derivatives.fast_derivatives import SLOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_DIFFERENTIATING = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}

_EMBEDDING = {F.embedding, F.embedding_bag}

_ATTENTION_LAYER: Any = F.multi_head_attention_forward
"""A function of Python that reports itself, but not the operations inside, to a mode."""

_CONCERNED = {
    *_DIFFERENTIATING,
    *_EMBEDDING,
    torch.embedding_renorm_,
    *SLOW,
    *WRONG_FORWARD_DERIVATIVE,
    *WRONG_SECOND_DERIVATIVE,
    *WRONG_THIRD_DERIVATIVE,
}

_REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What replacements raise for wrong arguments, which PyTorch refuses in its own words. Others are signals to others."""

Renormalization = tuple[Tensor, Tensor, float, float]
"""Weights of an embedding, the rows that are used, the norm they may have, and the order of the norm."""


class Replacements(TorchFunctionMode):
    """Replaces operations while inside; everything else goes its usual way.

    Some facts about a loss show only while it is evaluated. If `missed` names one, it has to be evaluated once more.

    Attributes:
        differentiated: Whether the loss contains derivatives of its operations: norms are written out.
        vectorized: Whether it takes derivatives along many directions at once: functions of autograd are not used.
        renormalized: Whether all embeddings are within their `max_norm`: they are left as they are.
        missed: Which of these were false and should be true.
        renormalizations: What embeddings would have done to their weights, in place.
    """

    def __init__(self, *, differentiated: bool = False, vectorized: bool = False, renormalized: bool = False) -> None:
        super().__init__()
        self.differentiated = differentiated
        self.vectorized = vectorized
        self.renormalized = renormalized
        self.missed: set[str] = set()
        self.renormalizations: list[Renormalization] = []
        self._kept_a_norm = False
        self._is_fast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION_LAYER and {*types} <= {Tensor, nn.Parameter}:
            with self:
                return _unwatched(func)(*args, **kwargs)
        if func not in _CONCERNED:
            if is_control_flow(func):
                with self:  # the functions that it calls are the user's
                    return run_plainly(func, args, kwargs)
            return func(*args, **kwargs)
        for replacement in self._candidates(func):
            try:
                result = replacement(*args, **kwargs)
            except _REFUSALS:
                continue
            if result is not None:
                self._is_fast |= replacement is SLOW.get(func)
                return result
        if func in _DIFFERENTIATING:
            self._note_derivatives(kwargs)
        elif func in _EMBEDDING and kwargs.get("max_norm") is not None and args[1].is_leaf:
            self._note_renormalization(args[1], args[0], kwargs["max_norm"], kwargs["norm_type"])
            kwargs = {**kwargs, "max_norm": None}
        elif func is torch.embedding_renorm_:
            self._note_renormalization(*args, **kwargs)
            return args[0]
        return func(*args, **kwargs)

    def _candidates(self, func: Any) -> Iterator[Callable[..., Any]]:
        """Yield what may replace a function here, best first."""
        if func in WRONG_SECOND_DERIVATIVE:
            yield WRONG_SECOND_DERIVATIVE[func]
        if func in WRONG_FORWARD_DERIVATIVE and _in_transform():
            yield WRONG_FORWARD_DERIVATIVE[func]
        if func in WRONG_THIRD_DERIVATIVE:
            if self.differentiated or _in_transform():
                yield WRONG_THIRD_DERIVATIVE[func]
            else:
                self._kept_a_norm = True
        if func in SLOW and torch.is_grad_enabled() and not self.vectorized and not _in_transform():
            yield SLOW[func]

    def _note_derivatives(self, options: Mapping[str, Any]) -> None:
        if self._kept_a_norm and options.get("create_graph"):
            self.missed.add("differentiated")
        if self._is_fast and (options.get("is_grads_batched") or _in_transform()):
            self.missed.add("vectorized")

    def _note_renormalization(self, weight: Tensor, rows: Tensor, max_norm: float, norm_type: float) -> None:
        if not self.renormalized:
            self.missed.add("renormalized")
            self.renormalizations.append((weight.detach(), rows.detach(), max_norm, norm_type))


def _in_transform() -> bool:
    """Whether a function transform or forward-mode differentiation is going on, which may differentiate anything."""
    has_interpreter = torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return has_interpreter or forward_ad._current_level >= 0  # noqa: SLF001


def _unwatched(function: FunctionType) -> FunctionType:
    """Return a function of PyTorch that reports the operations inside to modes, in place of itself."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
