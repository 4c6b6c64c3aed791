"""Convolution and batch norm with second derivatives written out, so that an HVP makes fewer passes over memory.

Both are bilinear, and a pair of autograd functions: the operation, and its gradient, whose own derivatives are the
expensive part of an HVP. They can be differentiated further, for losses that contain derivatives. All tensors have one
dtype.
"""

# ruff: noqa: D102 - the base classes document the methods
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_hesd.numerics.derivatives.graphs import wanted_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence


class Bilinear(ABC):
    """An operation x * w that is linear in x and in w, for x of shape (samples, channels, ...)."""

    @abstractmethod
    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return x * w + b."""

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Add x * w to total, in place, because allocating memory takes longer than the sum."""
        return total.add_(self.product(x, w, None))

    @abstractmethod
    def gradients(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        """Return the gradients with respect to x and w, where wanted."""

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to b."""
        return gradient.sum([0, *range(2, gradient.ndim)])


class Scale(Bilinear):
    """x · w for each channel: x has shape (samples, channels, ...), w and b have shape (1, channels, 1, ...)."""

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x * w if b is None else torch.addcmul(b, x, w)

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return total.addcmul_(x, w)

    def gradients(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        return gradient * w if wanted[0] else None, self.bias_gradient(gradient * x) if wanted[1] else None

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.sum([0, *range(2, gradient.ndim)], keepdim=True)


@dataclass(frozen=True)
class Convolution(Bilinear):
    """x convolved with the kernels w."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        zeros = [0] * len(self.stride)
        return torch.convolution(x, w, b, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def gradients(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        zeros = [0] * len(self.stride)
        geometry = self.stride, self.padding, self.dilation, False, zeros, self.groups
        return torch.ops.aten.convolution_backward(gradient, x, w, None, *geometry, [*wanted, False])[:2]


def bilinear(operation: Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return x * w + b."""
    return _BilinearFunction.apply(operation, x, w, b)  # type: ignore[no-any-return, no-untyped-call]


class _BilinearFunction(Function):
    """y = x * w + b."""

    @staticmethod
    def forward(ctx: Any, operation: Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.operation = operation
        return operation.product(x, w, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wanted = wanted_gradients(ctx)[1:]
        return None, *_BilinearBackward.apply(ctx.operation, gradient, *ctx.saved_tensors, wanted)  # type: ignore[no-untyped-call]


class _BilinearBackward(Function):
    """The gradients with respect to x, w and b, where wanted, which are linear in the gradient with respect to y."""

    @staticmethod
    def forward(ctx: Any, operation: Bilinear, gradient: Tensor, *inputs: Any) -> Any:
        x, w, wanted = inputs
        ctx.save_for_backward(gradient, x, w)
        ctx.set_materialize_grads(False)
        ctx.operation = operation
        grad_b = operation.bias_gradient(gradient) if wanted[2] else None
        return *operation.gradients(gradient, x, w, wanted[:2]), grad_b

    @staticmethod
    def backward(ctx: Any, tangent_x: Tensor | None, tangent_w: Tensor | None, tangent_b: Tensor | None) -> Any:
        gradient, x, w = ctx.saved_tensors
        operation: Bilinear = ctx.operation
        _, _, needs_x, needs_w, _ = wanted_gradients(ctx)
        grad_gradient = grad_x = grad_w = None
        if tangent_w is not None:
            grad_gradient = operation.product(x, tangent_w, tangent_b)
            if needs_x:
                grad_x, _ = operation.gradients(gradient, x, tangent_w, [True, False])
        if tangent_x is not None:
            if grad_gradient is None:
                grad_gradient = operation.product(tangent_x, w, tangent_b)
            elif torch.is_grad_enabled():
                grad_gradient = grad_gradient + operation.product(tangent_x, w, None)
            else:
                operation.add_product(grad_gradient, tangent_x, w)
            if needs_w:
                _, grad_w = operation.gradients(gradient, tangent_x, w, [False, True])
        if grad_gradient is None:
            grad_gradient = operation.product(x, torch.zeros_like(w), tangent_b)
        return None, grad_gradient, grad_x, grad_w, None
