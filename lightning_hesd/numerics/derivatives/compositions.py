"""Operations composed of elementary ones, whose derivatives are correct to every order in PyTorch.

PyTorch's own formulas take some intermediate results for constants when they are differentiated in turn: the norms of
`torch._weight_norm` in its second derivative, mean and variance of layer, batch and instance norms in their third, and
the factors of a matrix in derivatives of forward-mode derivatives.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Replacement = Callable[..., Any]
    """Takes the arguments of an operation, and returns None to leave a call to PyTorch."""


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor | None:  # noqa: A002, FBT001 - PyTorch's names
    return F.relu6(input + 3) / 6 if input.is_floating_point() and not inplace else None


def _prelu(input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
    by_channel = weight.numel() > 1 and input.dim() > 1
    slope = weight.view(1, -1, *[1] * (input.dim() - 2)) if by_channel else weight
    return torch.where(input > 0, input, slope * input)


def _layer_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002 - PyTorch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001, FBT001
) -> Tensor | None:
    shape = torch.Size(normalized_shape)
    if input.shape[-len(shape) :] != shape or any(p is not None and p.shape != shape for p in (weight, bias)):
        return None
    return _affine(_standardized(input, range(-len(shape), 0), eps), weight, bias).to(input.dtype)


def _norm_by_channel(norm: Callable[..., Tensor], switch: str, *over_samples: int) -> Replacement:
    """Return the replacement of a norm of shape (samples, channels, ...), by the statistics of its input.

    `switch` names the argument without which the norm uses running statistics, and is not replaced. `over_samples` is 0
    if the statistics are over samples, too.
    """
    signature = inspect.signature(norm)

    def replacement(*args: Any, **kwargs: Any) -> Tensor | None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if not call.arguments[switch]:
            return None
        with torch.no_grad():  # updates the running statistics, and checks the arguments
            norm(*args, **kwargs)
        x, weight, bias, eps = (call.arguments[name] for name in ("input", "weight", "bias", "eps"))
        shape = (1, -1, *[1] * (x.ndim - 2))
        weight, bias = (None if p is None else p.view(shape) for p in (weight, bias))
        return _affine(_standardized(x, [*over_samples, *range(2, x.ndim)], eps), weight, bias).to(x.dtype)

    return replacement


_batch_norm = _norm_by_channel(F.batch_norm, "training", 0)
_instance_norm = _norm_by_channel(F.instance_norm, "use_input_stats")


def _reordered(replacement: Replacement) -> Replacement:
    """Return the replacement of the norm in `torch`, given that of the norm in `torch.nn.functional`."""
    return lambda x, weight, bias, mean, variance, *rest: replacement(x, mean, variance, weight, bias, *rest[:3])


def _standardized(x: Tensor, dimensions: Sequence[int], eps: float) -> Tensor:
    """Return (x - mean) / √(variance + eps), in float32 or higher, as PyTorch's kernels compute it."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = x - x.mean(list(dimensions), keepdim=True)
    return centered * (centered.square().mean(list(dimensions), keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _of_factors(function: Callable[[Tensor, Tensor], Any]) -> Replacement:
    """Return the replacement that is a function of the determinant of P and the diagonal of U in input = P L U."""

    def replacement(input: Tensor) -> Any:  # noqa: A002 - PyTorch's name
        if input.is_complex():
            return None
        p, _, u = torch.linalg.lu(input)
        return function(torch.linalg.det(p), u.diagonal(dim1=-2, dim2=-1))

    return replacement


@_of_factors
def _determinant(sign: Tensor, diagonal: Tensor) -> Tensor:
    return sign * diagonal.prod(-1)


@_of_factors
def _log_determinant(sign: Tensor, diagonal: Tensor) -> Tensor:
    negative = sign * diagonal.sign().prod(-1) < 0
    return torch.where(negative, torch.nan, diagonal.abs().log().sum(-1))


def _signed_log_determinant(kind: Callable[[tuple[Tensor, Tensor]], Any]) -> Replacement:
    return _of_factors(lambda sign, u: kind((sign * u.sign().prod(-1), u.abs().log().sum(-1))))


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:  # noqa: N803 - PyTorch's names
    is_vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    factors, pivots = torch.linalg.lu_factor(A)
    solution = torch.linalg.lu_solve(factors, pivots, B.unsqueeze(-1) if is_vector else B, left=left)
    return cast("Tensor", solution.squeeze(-1) if is_vector else solution)


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None, **others: Any) -> Tensor | None:
    """Multiply rows up to each offset by the matrix of their group, as a mixture of experts does."""
    if mat_a.dtype != torch.float64 or offs is None or mat_b.ndim != 3 or any(v is not None for v in others.values()):
        return None
    starts = [0, *offs.tolist()]
    rows = [mat_a[start:end] @ matrix for start, end, matrix in zip(starts, offs.tolist(), mat_b, strict=False)]
    return torch.cat([*rows, mat_a.new_zeros(len(mat_a) - starts[-1], mat_b.shape[-1])])


WRONG_SECOND_DERIVATIVE: dict[Any, Replacement] = {
    torch._weight_norm: _weight_norm,  # noqa: SLF001 - which both APIs of weight normalization call
    F.hardsigmoid: _hardsigmoid,  # no second derivative in PyTorch
    torch.prelu: _prelu,  # asymmetric at zero
    Tensor.prelu: _prelu,
}
"""Operations that are replaced in every loss."""

WITHOUT_FLOAT64: dict[Any, Replacement] = {}
"""Operations that PyTorch has in less precise types only, replaced in float64."""

if hasattr(torch, "_grouped_mm"):  # not in old releases
    WITHOUT_FLOAT64[torch._grouped_mm] = _grouped_mm  # noqa: SLF001 - which `F.grouped_mm` calls

WRONG_THIRD_DERIVATIVE: dict[Any, Replacement] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _reordered(_batch_norm),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _reordered(_instance_norm),
}
"""Operations that are replaced in losses that contain derivatives of them."""

WRONG_FORWARD_DERIVATIVE: dict[Any, Replacement] = {
    torch.det: _determinant,
    torch.linalg.det: _determinant,
    Tensor.det: _determinant,
    torch.logdet: _log_determinant,
    Tensor.logdet: _log_determinant,
    torch.slogdet: _signed_log_determinant(torch.return_types.slogdet),
    Tensor.slogdet: _signed_log_determinant(torch.return_types.slogdet),
    torch.linalg.slogdet: _signed_log_determinant(torch.return_types.linalg_slogdet),  # type: ignore[attr-defined]
    torch.linalg.solve: _solve,
}
"""Operations that are replaced inside function transforms and forward-mode differentiation."""
