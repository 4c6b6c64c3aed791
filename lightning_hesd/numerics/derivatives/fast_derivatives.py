"""Replacements for operations whose second derivatives are slow in PyTorch, or need much memory.

On the CPU PyTorch differentiates the gradient of a convolution by convolutions with whole feature maps, and that of
batch norm in many passes over them. Attention with long contexts stores scores of every pair of tokens, and a
cross-entropy over a large vocabulary several copies of the logits. Values and derivatives of the replacements are the
same to rounding. Each gains at least a tenth of the time of some product (benchmarks/results/replacements.md,
language_models.md); replacements that gained less are not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.numerics.derivatives.attention import long_attention
from lightning_hesd.numerics.derivatives.bilinear import Convolution, Scale, bilinear
from lightning_hesd.numerics.derivatives.cross_entropy import Labels, cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LARGE = 100_000
"""Number of logits from which on fewer passes over memory outweigh the cost of a Python function in the graph."""

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
    if query.shape[-2] * key.shape[-2] < _LONG or not _is_plain(*tensors, anywhere=True):
        return None
    if attn_mask is not None and not _is_fixed_mask(attn_mask, query):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return long_attention(*tensors, attn_mask, scale, causal=is_causal, grouped=enable_gqa)


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
    F.scaled_dot_product_attention: _attention,
}
"""Operation -> its replacement, which takes the same arguments and returns None to leave a call to PyTorch."""
