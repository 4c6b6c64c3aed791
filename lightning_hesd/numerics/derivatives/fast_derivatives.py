"""Replacements for operations whose second derivatives are slow in PyTorch.

On the CPU PyTorch differentiates the gradient of a convolution by convolutions with whole feature maps, and those of
normalization and activation layers in up to thirty passes over them. With these replacements an HVP of ResNet20 takes
the time of 2.0 gradients instead of 2.6, one of a vision transformer 2.0 instead of 2.5 (float32, two threads). Values
and derivatives are the same to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.numerics.derivatives.attention import long_attention, short_attention
from lightning_hesd.numerics.derivatives.autograd_functions import (
    GELU,
    Convolution,
    LayerNorm,
    Linear,
    ReLU,
    Scale,
    bilinear,
)
from lightning_hesd.numerics.derivatives.cross_entropy import Labels, cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LARGE = 100_000
"""Number of elements from which on fewer passes over memory outweigh the cost of a Python function in the graph."""

_LONG = 2**18
"""Number of scores per head from which on attention recomputes the scores instead of storing them."""


def _is_plain(*tensors: Tensor | None, anywhere: bool = False) -> bool:
    """Whether some tensors are ordinary CPU tensors of one dtype, outside autocast, of which one requires grad.

    With `anywhere` all other devices are accepted, too, if the tensors share one.
    """
    present = [t for t in tensors if t is not None]
    device = present[0].device
    return (
        len({t.dtype for t in present}) == 1
        and any(t.requires_grad for t in present)
        and (anywhere or device.type == "cpu")
        and all(
            type(t) in {Tensor, nn.Parameter}
            and t.device == device
            and t.is_floating_point()
            and t.layout == torch.strided
            for t in present
        )
        and not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type))
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
    stride, padding, dilation = (s * dimensions if len(s) == 1 else s for s in shape)
    return bilinear(Convolution(stride, padding, dilation, groups), input, weight, bias)


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
    given = [running_mean, running_var, *(p for p in (weight, bias) if p is not None)]
    fits = all(p is not None and p.shape == input.shape[1:2] for p in given)
    if training or running_mean is None or running_var is None or not fits or not _is_plain(input, *given):
        return None
    is_packed = input.is_contiguous() or (input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last))
    if not is_packed:
        return None  # PyTorch returns a contiguous tensor here, and later operations may rely on that
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1, *[1] * (input.ndim - 2))
    return bilinear(Scale(), input, scale.view(shape), shift.view(shape))


def _layer_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002 - PyTorch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001, FBT001
) -> Tensor | None:
    shape = torch.Size(normalized_shape)
    fits = input.shape[-len(shape) :] == shape and all(p is None or p.shape == shape for p in (weight, bias))
    if not fits or input.numel() < _LARGE or not _is_plain(input, weight, bias):
        return None
    w, b = (None if p is None else p.flatten() for p in (weight, bias))
    rows = LayerNorm.apply(input.reshape(-1, shape.numel()), w, b, eps)  # type: ignore[no-untyped-call]
    return rows.view(input.shape)  # type: ignore[no-any-return]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002 - PyTorch's name
    fits = weight.ndim == 2 and input.ndim >= 2 and (bias is None or bias.shape == weight.shape[:1])
    results = input.numel() // max(1, input.shape[-1]) * len(weight)
    if not fits or max(input.numel(), results) < _LARGE or not _is_plain(input, weight, bias):
        return None
    rows = bilinear(Linear(), input.reshape(-1, input.shape[-1]), weight, bias)
    return rows.view(*input.shape[:-1], len(weight))


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:  # noqa: A002, FBT001 - PyTorch's names
    if inplace or input.numel() < _LARGE or not _is_plain(input):
        return None
    return ReLU.apply(input, None)  # type: ignore[no-any-return, no-untyped-call]


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor | None:  # noqa: A002 - PyTorch's name
    if input.numel() < _LARGE or not _is_plain(input):
        return None
    return GELU.apply(input, approximate)  # type: ignore[no-any-return, no-untyped-call]


def _attention(  # noqa: PLR0917 - PyTorch's order
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001
) -> Tensor | None:
    tensors = query, key, value
    if dropout_p or (is_causal and attn_mask is not None) or min(t.ndim for t in tensors) < 2:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.shape[-2] * key.shape[-2] >= _LONG and _is_plain(*tensors, anywhere=True):
        if attn_mask is not None and not _is_fixed_mask(attn_mask, query):
            return None
        return long_attention(*tensors, attn_mask, scale, causal=is_causal, grouped=enable_gqa)
    special = attn_mask is not None or enable_gqa or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if special or query.numel() < _LARGE or not _is_plain(*tensors):
        return None
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in tensors)
    return short_attention(q, k, v, scale, causal=is_causal).view(*query.shape[:-1], -1)


def _is_fixed_mask(mask: Tensor, query: Tensor) -> bool:
    """Whether a mask of scores is an ordinary tensor that fits the queries, without a gradient."""
    fits = mask.ndim >= 2 and mask.dtype in {torch.bool, query.dtype} and mask.device == query.device
    return fits and type(mask) is Tensor and not mask.requires_grad


def _cross_entropy(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002 - PyTorch's name
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,  # noqa: FBT001
    ignore_index: int = -100,
    reduce: bool | None = None,  # noqa: FBT001
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    is_old = size_average is not None or reduce is not None or reduction not in {"mean", "sum", "none"}
    has_labels = input.ndim > 1 and target.dtype == torch.long and target.shape == input.shape[:1] + input.shape[2:]
    if is_old or not has_labels or input.numel() < _LARGE or not _is_plain(input, weight, anywhere=True):
        return None
    if type(target) is not Tensor or (weight is not None and (weight.requires_grad or len(weight) != input.shape[1])):
        return None
    rows, classes = input, target
    if input.ndim > 2:
        try:  # memory order (samples, positions, classes), as in language models
            rows, classes = input.movedim(1, -1).view(-1, input.shape[1]), target.flatten()
        except RuntimeError:
            rows, classes = input.flatten(2), target.flatten(1)
    labels = Labels(classes, weight, ignore_index, label_smoothing)
    losses = cross_entropy(rows, labels).view(target.shape)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / labels.total_weight(losses.dtype)


SLOW: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    F.cross_entropy: _cross_entropy,
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.gelu: _gelu,
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
}
"""Operation -> its replacement, which takes the same arguments and returns None to leave a call to PyTorch."""
