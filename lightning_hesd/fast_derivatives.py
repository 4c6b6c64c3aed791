"""Convolution and batch normalisation whose second derivatives are cheap, in place of PyTorch's while inside.

On the CPU PyTorch differentiates the gradient of a convolution by convolving with whole feature maps, and that of batch
normalisation in about twenty passes over them. With these formulas a Hessian-vector product of ResNet20 takes 2.1
gradients instead of 2.8 (float32, 128 images); values and derivatives are the same to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Geometry = tuple[list[int], list[int], list[int], int]
    """Stride, padding, dilation and groups."""


class FastDerivatives(TorchFunctionMode):
    """Replaces what it can do faster, wherever it is called; everything else goes its usual way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled():
            result = replacement(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors of the CPU, outside autocast and function transforms."""
    if torch.is_autocast_enabled("cpu") or torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001
        return False
    return all(
        t is None or (t.device.type == "cpu" and t.is_floating_point() and t.layout == torch.strided) for t in tensors
    )


def _convolution(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002 - PyTorch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    dimensions = weight.ndim - 2
    if isinstance(padding, str) or input.ndim != weight.ndim or not _is_plain(input, weight, bias):
        return None
    shape = [[n] * dimensions if isinstance(n, int) else [*n] for n in (stride, padding, dilation)]
    geometry = (*(s * dimensions if len(s) == 1 else s for s in shape), groups)
    result: Tensor = _Convolution.apply(input, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result


def _batch_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002 - PyTorch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,  # noqa: FBT001
    momentum: float | None = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None or not _is_plain(input, running_mean, weight, bias):
        return None
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1, *[1] * (input.ndim - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


_REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.batch_norm: _batch_norm,
}


class _Convolution(torch.autograd.Function):
    """y = x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        ctx.has_bias = b is not None
        return _convolve(x, w, b, geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w = ctx.saved_tensors
        of_x, of_w = _ConvolutionBackward.apply(  # type: ignore[no-untyped-call]
            gradient, x, w, (ctx.geometry, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        )
        of_b = gradient.sum([0, *range(2, gradient.ndim)]) if ctx.has_bias else None
        return of_x, of_w, of_b, None


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients of y = x * w with respect to x and w, where wanted, both linear in the gradient of y."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, w: Tensor, options: tuple[Geometry, bool, bool]) -> Any:
        ctx.save_for_backward(gradient, x, w)
        ctx.options = options
        geometry, wants_x, wants_w = options
        of_x, of_w = _backward(gradient, x, w, geometry, [wants_x, wants_w, False])
        return of_x, of_w

    @staticmethod
    def backward(ctx: Any, along_x: Tensor, along_w: Tensor) -> Any:
        gradient, x, w = ctx.saved_tensors
        geometry, wants_x, wants_w = ctx.options
        of_gradient = of_x = of_w = None
        if wants_w:
            of_gradient = _convolve(x, along_w, None, geometry)
            if ctx.needs_input_grad[1]:
                of_x, _ = _backward(gradient, x, along_w, geometry, [True, False, False])
        if wants_x:
            through_x = _convolve(along_x, w, None, geometry)
            of_gradient = through_x if of_gradient is None else of_gradient + through_x
            if ctx.needs_input_grad[2]:
                _, of_w = _backward(gradient, along_x, w, geometry, [False, True, False])
        return of_gradient, of_x, of_w, None


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(gradient: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: list[bool]) -> Any:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    results = torch.ops.aten.convolution_backward(
        gradient, x, w, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return results[:2]
