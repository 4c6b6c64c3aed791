"""Operations with second derivatives written out, so that a Hessian-vector product passes over memory less often.

Each is a pair of functions of autograd: one for the operation, one for its gradient, whose own derivatives are what
costs. All but the layer norm can be differentiated further, for losses that contain derivatives. All tensors have one
type.
"""

# ruff: noqa: D102 - what the methods of the bilinear operations do is said once, by their protocol
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Bilinear(Protocol):
    """x * w, an operation linear in x and in w."""

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return x * w + b."""

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Add x * w to total, in place: fresh memory costs more than the sum."""

    def transposed(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        """Return the gradients with respect to x and w, where wanted."""

    def of_bias(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to b."""


class Linear:
    """x wᵀ, for x of shape (rows, inputs) and w of shape (outputs, inputs)."""

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x @ w.T if b is None else torch.addmm(b, x, w.T)

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return total.addmm_(x, w.T)

    def transposed(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        return gradient @ w if wanted[0] else None, gradient.T @ x if wanted[1] else None

    def of_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum(0)


class Scale:
    """x · w for each channel: x has shape (samples, channels, ...), w and b have shape (1, channels, 1, ...)."""

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x * w if b is None else torch.addcmul(b, x, w)

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return total.addcmul_(x, w)

    def transposed(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        return gradient * w if wanted[0] else None, self.of_bias(gradient * x) if wanted[1] else None

    def of_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum([0, *range(2, gradient.ndim)], keepdim=True)


@dataclass(frozen=True)
class Convolution:
    """x convolved with the kernels w."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        zeros = [0] * len(self.stride)
        return torch.convolution(x, w, b, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def add_product(self, total: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return total.add_(self.product(x, w, None))

    def transposed(self, gradient: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Any:
        zeros = [0] * len(self.stride)
        geometry = self.stride, self.padding, self.dilation, False, zeros, self.groups
        return torch.ops.aten.convolution_backward(gradient, x, w, None, *geometry, [*wanted, False])[:2]

    def of_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum([0, *range(2, gradient.ndim)])


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
        wanted = ctx.needs_input_grad[1:]
        return None, *_BilinearBackward.apply(ctx.operation, gradient, *ctx.saved_tensors, wanted)  # type: ignore[no-untyped-call]


class _BilinearBackward(Function):
    """The gradients of y = x * w + b with respect to x, w and b, where wanted, all linear in the gradient of y."""

    @staticmethod
    def forward(ctx: Any, operation: Bilinear, gradient: Tensor, *inputs: Any) -> Any:
        x, w, wanted = inputs
        ctx.save_for_backward(gradient, x, w)
        ctx.set_materialize_grads(False)
        ctx.operation = operation
        of_b = operation.of_bias(gradient) if wanted[2] else None
        return *operation.transposed(gradient, x, w, wanted[:2]), of_b

    @staticmethod
    def backward(ctx: Any, along_x: Tensor | None, along_w: Tensor | None, along_b: Tensor | None) -> Any:
        gradient, x, w = ctx.saved_tensors
        operation: Bilinear = ctx.operation
        _, _, needs_x, needs_w, _ = ctx.needs_input_grad
        of_gradient = of_x = of_w = None
        if along_w is not None:
            of_gradient = operation.product(x, along_w, along_b)
            of_x, _ = operation.transposed(gradient, x, along_w, [needs_x, False])
        if along_x is not None:
            if of_gradient is None:
                of_gradient = operation.product(along_x, w, along_b)
            elif torch.is_grad_enabled():
                of_gradient = of_gradient + operation.product(along_x, w, None)
            else:
                operation.add_product(of_gradient, along_x, w)
            _, of_w = operation.transposed(gradient, along_x, w, [False, needs_w])
        if of_gradient is None:
            of_gradient = operation.product(x, torch.zeros_like(w), along_b)
        return None, of_gradient, of_x, of_w, None


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Return the standardised rows of x, times w plus b, for x of shape (rows, width)."""
    return _LayerNorm.apply(x, w, b, eps)  # type: ignore[no-any-return, no-untyped-call]


class _LayerNorm(Function):
    """y = w · x̂ + b over the rows of x, with x̂ = (x - mean) · rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], w, b, eps)
        ctx.save_for_backward(x, w, b, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:3])
        x, w, b, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_LayerNormBackward.apply(gradient, x, w, b, mean, rstd, wanted), None  # type: ignore[no-untyped-call]
        kernel = torch.ops.aten.native_layer_norm_backward
        return *kernel(gradient, x, x.shape[1:], mean, rstd, w, b, wanted), None, None


class _LayerNormBackward(Function):
    """The gradients of y = w · x̂ + b with respect to x, w and b, where wanted.

    The first is rstd · P(w · gradient), where P subtracts from each row its parts along 1 and x̂. P is symmetric, and
    dx̂ = rstd · P(dx), so the derivatives of the gradients are made of P as well, for which PyTorch has a fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, *others: Any) -> Any:
        w, b, mean, rstd, wanted = others
        standard = (x - mean) * rstd
        slope = row_sum(gradient if w is None else gradient * w, standard) / x.shape[1]
        ctx.save_for_backward(gradient, x, w, b, mean, rstd, standard, slope)
        return torch.ops.aten.native_layer_norm_backward(gradient, x, x.shape[1:], mean, rstd, w, b, wanted)

    @staticmethod
    @once_differentiable  # the derivative of what follows would take mean and rstd for constants
    def backward(ctx: Any, along_x: Tensor | None, along_w: Tensor | None, along_b: Tensor | None) -> Any:
        gradient, x, w, _, mean, rstd, standard, slope = ctx.saved_tensors
        kernel, shape = torch.ops.aten.native_layer_norm_backward, x.shape[1:]

        def project(rows: Tensor) -> Tensor:
            """Return rstd · P(rows)."""
            projected: Tensor = kernel(rows, x, shape, mean, rstd, None, None, [True, False, False])[0]
            return projected

        along_x = torch.zeros_like(x) if along_x is None else along_x
        along_w = x.new_zeros(x.shape[1:]) if along_w is None else along_w
        along_b = x.new_zeros(x.shape[1:]) if along_b is None else along_b
        weight = x.new_ones(x.shape[1:]) if w is None else w
        projected = project(along_x)
        of_gradient = torch.addcmul(along_b, projected, weight).addcmul_(along_w, standard)
        of_w = gradient * projected
        of_rstd = (of_w @ weight).unsqueeze(1) * (rstd / x.shape[1])
        turn = torch.addcmul(along_w, row_sum(along_x, standard) * (rstd / x.shape[1]), weight, value=-1)
        turn = turn.mul_(gradient).addcmul_(along_x, rstd * slope, value=-1)
        of_x = project(turn).addcmul_(standard, of_rstd, value=-1)
        return of_gradient, of_x, None if w is None else of_w.sum(0), None, None, None, None


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return _ReLU.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _ReLU(Function):
    """y = max(x, 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _ReLUBackward.apply(gradient, *ctx.saved_tensors)  # type: ignore[no-untyped-call]


class _ReLUBackward(Function):
    """The gradient where y > 0. PyTorch's own fills and adds zeros for its derivative with respect to x."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(gradient, y, 0)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> Any:
        return _ReLUBackward.apply(along, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


def gelu(x: Tensor, approximate: str) -> Tensor:
    """Return x Φ(x), or its approximation by tanh."""
    return _GELU.apply(x, approximate)  # type: ignore[no-any-return, no-untyped-call]


class _GELU(Function):
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
    """The gradient with respect to x; its own derivative with respect to x is evaluated once, not in every product."""

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
    def backward(ctx: Any, along: Tensor) -> Any:
        gradient, x, second = ctx.saved_tensors
        slope = functools.partial(torch.ops.aten.gelu_backward, approximate=ctx.approximate)
        if torch.is_grad_enabled():
            return *differentiate(lambda g, x: [slope(g, x)], (gradient, x), [along]), None
        return slope(along, x), along * second, None


def row_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a · b over the last dimension, which is kept."""
    return (a * b).sum(-1, keepdim=True)


def differentiate(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], along: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return PyTorch's own derivatives of a function's results, for a loss that holds derivatives itself."""
    # An input may depend on another; views cut that path, which is the business of the graph outside.
    cut = [None if i is None else i.view_as(i) for i in inputs]
    pairs = [(o, a) for o, a in zip(function(*cut), along, strict=True) if o is not None and a is not None]
    free = [i for i in cut if i is not None and i.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, free, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if i is not None and i.requires_grad else None for i in cut]
