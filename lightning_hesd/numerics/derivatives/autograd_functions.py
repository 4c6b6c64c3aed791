"""Operations with second derivatives written out, so that an HVP makes fewer passes over memory.

Each is a pair of autograd functions: the operation, and its gradient, whose own derivatives are the expensive part of
an HVP. All but layer norm can be differentiated further, for losses that contain derivatives. All tensors have one
dtype.
"""

# ruff: noqa: D102 - the base classes document the methods
from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_hesd.numerics.derivatives.graphs import wanted_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class LayerNorm(Function):
    """y = w · x̂ + b over the rows of x, shape (rows, width), with x̂ = (x - mean) · rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], w, b, eps)
        ctx.save_for_backward(x, w, b, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wanted = wanted_gradients(ctx)[:3]
        x, w, b, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_LayerNormBackward.apply(gradient, x, w, b, mean, rstd, wanted), None  # type: ignore[no-untyped-call]
        kernel = torch.ops.aten.native_layer_norm_backward
        return *kernel(gradient, x, x.shape[1:], mean, rstd, w, b, wanted), None, None


class _LayerNormBackward(Function):
    """The gradients of y = w · x̂ + b with respect to x, w and b, where wanted.

    The gradient with respect to x is rstd · P(w · gradient), where P subtracts from each row its components along 1 and
    x̂. P is symmetric, and dx̂ = rstd · P(dx), so the derivatives of the gradients consist of P, too, for which PyTorch
    has a fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, *others: Any) -> Any:
        w, b, mean, rstd, wanted = others
        standard = (x - mean) * rstd
        slope = row_sum(gradient if w is None else gradient * w, standard) / x.shape[1]
        ctx.save_for_backward(gradient, x, w, b, mean, rstd, standard, slope)
        return torch.ops.aten.native_layer_norm_backward(gradient, x, x.shape[1:], mean, rstd, w, b, wanted)

    @staticmethod
    @once_differentiable  # a further derivative would take mean and rstd for constants
    def backward(ctx: Any, tangent_x: Tensor | None, tangent_w: Tensor | None, tangent_b: Tensor | None) -> Any:
        gradient, x, w, _, mean, rstd, standard, slope = ctx.saved_tensors
        kernel, shape = torch.ops.aten.native_layer_norm_backward, x.shape[1:]

        def project(rows: Tensor) -> Tensor:
            """Return rstd · P(rows)."""
            projected: Tensor = kernel(rows, x, shape, mean, rstd, None, None, [True, False, False])[0]
            return projected

        tangent_x = torch.zeros_like(x) if tangent_x is None else tangent_x
        tangent_w = x.new_zeros(x.shape[1:]) if tangent_w is None else tangent_w
        tangent_b = x.new_zeros(x.shape[1:]) if tangent_b is None else tangent_b
        weight = x.new_ones(x.shape[1:]) if w is None else w
        projected = project(tangent_x)
        grad_gradient = torch.addcmul(tangent_b, projected, weight).addcmul_(tangent_w, standard)
        grad_w = gradient * projected
        grad_rstd = (grad_w @ weight).unsqueeze(1) * (rstd / x.shape[1])
        inner = torch.addcmul(tangent_w, row_sum(tangent_x, standard) * (rstd / x.shape[1]), weight, value=-1)
        inner = inner.mul_(gradient).addcmul_(tangent_x, rstd * slope, value=-1)
        grad_x = project(inner).addcmul_(standard, grad_rstd, value=-1)
        return grad_gradient, grad_x, None if w is None else grad_w.sum(0), None, None, None, None


class ReLU(Function):
    """x where y > 0 and 0 elsewhere, with y = max(x, 0) if it is None.

    With the same y, this is also the map of gradients, and of their derivatives. PyTorch's version of that map also
    makes and adds zeros for the derivative with respect to x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        result: Tensor = x.relu() if y is None else torch.ops.aten.threshold_backward(x, y, 0)
        ctx.save_for_backward(result if y is None else y)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ReLU.apply(gradient, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class GELU(Function):
    """y = x Φ(x), or its approximation by tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return torch.ops.aten.gelu(x, approximate=approximate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _GELUBackward.apply(gradient, x, ctx.approximate), None  # type: ignore[no-untyped-call]
        return torch.ops.aten.gelu_backward(gradient, x, approximate=ctx.approximate), None


class _GELUBackward(Function):
    """The gradient with respect to x; its own derivative with respect to x is evaluated once, and not in every HVP."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            result = torch.ops.aten.gelu_backward(gradient.detach(), at, approximate=approximate)
            (second,) = torch.autograd.grad(result, at, torch.ones_like(result))
        ctx.save_for_backward(gradient, x, second)
        ctx.approximate = approximate
        return result.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        gradient, x, second = ctx.saved_tensors
        derivative = functools.partial(torch.ops.aten.gelu_backward, approximate=ctx.approximate)
        if torch.is_grad_enabled():
            return *differentiate(lambda g, x: [derivative(g, x)], (gradient, x), [tangent]), None
        return derivative(tangent, x), tangent * second, None


def row_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a · b over the last dimension, which is kept."""
    return (a * b).sum(-1, keepdim=True)


def differentiate(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return a function's gradients with respect to its inputs, given cotangents of its results, by PyTorch's formulas.

    They can be differentiated further, for a loss that contains derivatives.
    """
    # One input may depend on another. Views cut that path, which the graph outside accounts for.
    cut = [None if i is None else i.view_as(i) for i in inputs]
    pairs = [(o, c) for o, c in zip(function(*cut), cotangents, strict=True) if o is not None and c is not None]
    free = [i for i in cut if i is not None and i.requires_grad]
    outputs, of_outputs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, free, of_outputs, create_graph=True, allow_unused=True))
    return [next(found) if i is not None and i.requires_grad else None for i in cut]


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


class Linear(Bilinear):
    """x wᵀ, for x of shape (rows, inputs) and w of shape (outputs, inputs)."""

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x @ w.T if b is None else torch.addmm(b, x, w.T)

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return total.addmm_(x, w.T)

    def gradients(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        return gradient @ w if wanted[0] else None, gradient.T @ x if wanted[1] else None


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
