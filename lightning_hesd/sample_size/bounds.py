"""Bounds on the Hessian of a fully connected ReLU network under cross-entropy, and on increments of its mean loss.

Both the bounds of Kiselev & Grabovoy (2024, arXiv:2409.11995), Theorem 1 and Lemmas 1 and 2, as published, and bounds
that hold in general.

Notation, for one sample: x_0 = x, z_p = W_p x_{p−1} + b_p, x_p = relu(z_p) for p = 1, ..., L, with ‖W_p‖₂ ≤ M_W,
‖b_p‖₂ ≤ M_b and ‖x‖ ≤ M_x. The logits are z_L (the paper's formulas and experiments) or relu(z_L) ("ReLU after each
linear layer"): the bounds hold for both, because the matrices D_p = diag[z_p > 0] have norm at most 1. D_L is the
identity if the logits are z_L. Derivatives are taken between the kinks of the ReLUs.

*Sizes of the layers' inputs.* ‖relu(z)‖ ≤ ‖z‖, so ‖x_p‖ ≤ r_p with r_0 = M_x and r_p = M_W r_{p−1} + M_b; without
biases r_p = M_x M_W^p.

*G-term*, G = JᵀAJ with A = diag π − ππᵀ and π the softmax. By Gershgorin ‖A‖₂ ≤ max 2π_i(1 − π_i) ≤ ½. The logits
depend on layer p by B_p (δW_p x_{p−1} + δb_p) with B_p = D_L W_L D_{L−1} ... W_{p+1} D_p, ‖B_p‖ ≤ M_W^{L−p}. So
J_pJ_pᵀ = (‖x_{p−1}‖² + β) B_pB_pᵀ with β = 1 with biases and 0 without, and

    ‖G‖₂ ≤ ½‖JJᵀ‖₂ = ½‖Σ_p J_pJ_pᵀ‖₂ ≤ ½ Σ_p M_W^{2(L−p)} (r_{p−1}² + β).

*H-term*, R = H − G = Σ_c (π − y)_c ∇²z_c. Between kinks the logits are multilinear in the layers, so only pairs of
different layers p < q count, and b_q, which is added, does not:

    δᵀRδ = 2 Σ_{p<q} (π − y)ᵀ B_q δW_q D_{q−1} W_{q−1} ... W_{p+1} D_p (δW_p x_{p−1} + δb_p),

at most 2 Σ_{p<q} s_p ‖δ_q‖‖δ_p‖ with s_p = √2 M_W^{L−p−1} √(r_{p−1}² + β), since ‖π − y‖ ≤ √2. Hence ‖R‖₂ is at most
the norm of the symmetric L × L matrix with s_p in row p to the right of its diagonal. It does not vanish with G: for
small weights and L = 2 it is M_x√2, and the bound on G goes to zero.

All of these hold for means over samples too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hesd.spectra.validation import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

Kind = Literal["published", "tight"]
Matrix = Literal["ggn", "residual", "hessian"]

_LAYERS = (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout, nn.CrossEntropyLoss)
"""Layers for which the bounds hold, in evaluation mode."""


def hessian_bound(
    input_norm: float,
    weight_norm: float,
    layers: int,
    *,
    kind: Kind = "tight",
    matrix: Matrix = "ggn",
    bias_norm: float | None = None,
) -> float:
    """Bound the spectral norm of the Hessian's terms for a fully connected ReLU network under cross-entropy.

    "published" is Theorem 1 of arXiv:2409.11995, √2 L M_x² M_W^{2L} + √2 M_W²(M_W^{2L} − 1)/(M_W² − 1), at M_W = 1 its
    limit √2 L (M_x² + 1). As printed it bounds neither H nor G in general: it is 2√2 M_W² times the tight bound on G
    with biases of zero, and so holds for G if M_W ≥ 2^(−3/4) = 0.595; but for L = 1 and W → 0 it vanishes, and G does
    not. "tight" is derived in the documentation of this module, and always holds.

    Args:
        input_norm: M_x, largest Euclidean norm of an input.
        weight_norm: M_W, largest spectral norm of a weight matrix.
        layers: L, number of linear layers.
        kind: "published" or "tight".
        matrix: "ggn" for the G-term, "residual" for the H-term, "hessian" for their sum; "published" exists for "ggn"
            only, which its authors take for the Hessian.
        bias_norm: M_b, largest Euclidean norm of a bias vector; None if there are no biases.

    Returns:
        The bound, in units of the loss per squared unit of the weights; infinite if it overflows.

    Raises:
        ValueError: If a norm is negative or not finite, `layers` is less than 1, or there is no "published" bound for
            the arguments.

    Examples:
        >>> round(hessian_bound(1.0, 1.0, 3, kind="published") / 2**0.5, 12)
        6.0
        >>> hessian_bound(2.0, 1.0, 3)
        6.0
    """
    _check_norms(input_norm=input_norm, weight_norm=weight_norm, bias_norm=0.0 if bias_norm is None else bias_norm)
    check_count("layers", layers)
    _check_choices(kind, matrix, bias_norm)
    biased = bias_norm is not None
    with np.errstate(over="ignore"):
        powers = np.float64(weight_norm) ** np.arange(layers + 1)
        if kind == "published":
            return float(math.sqrt(2) * (layers * input_norm**2 * powers[-1] ** 2 + (powers[1:] ** 2).sum()))
        radii = [np.float64(input_norm)]
        for _ in range(layers - 1):
            radii.append(weight_norm * radii[-1] + (bias_norm or 0.0))
        squares = np.array(radii) ** 2 + biased
        ggn = float(powers[layers - 1 :: -1] ** 2 @ squares) / 2
        residual = _residual_bound(powers, np.sqrt(squares))
    return {"ggn": ggn, "residual": residual, "hessian": ggn + residual}[matrix]


def _residual_bound(powers: Array, sizes: Array) -> float:
    """Return the bound on the H-term from the powers of M_W, shape (L + 1,), and √(r_{p−1}² + β), shape (L,)."""
    layers = len(sizes)
    if layers == 1:
        return 0.0
    pairs = math.sqrt(2) * powers[layers - 2 :: -1] * sizes[:-1]
    if not np.isfinite(pairs).all():
        return math.inf
    upper = np.triu(np.ones((layers, layers)), 1)
    upper[:-1] *= pairs[:, None]
    return float(np.linalg.eigvalsh(upper + upper.T)[-1])


def hidden_size_bound(
    input_norm: float, entry_bound: float, hidden_size: int, layers: int, *, kind: Kind = "published"
) -> float:
    """Bound the G-term by the size of the layers: h·M in place of M_W (Lemma 1 of arXiv:2409.11995).

    As ‖W‖₂ ≤ ‖W‖_F ≤ √(rows·columns)·M, h must be the largest dimension of all layers, including inputs and classes.

    Args:
        input_norm: M_x, largest Euclidean norm of an input.
        entry_bound: M, largest absolute value of an entry of a weight matrix.
        hidden_size: h, size of the layers.
        layers: L, number of linear layers.
        kind: "published" or "tight", see `hessian_bound`.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> hidden_size_bound(1.0, 0.25, 4, 2) == hessian_bound(1.0, 1.0, 2, kind="published")
        True
    """
    _check_norms(entry_bound=entry_bound)
    check_count("hidden_size", hidden_size)
    return hessian_bound(input_norm, hidden_size * entry_bound, layers, kind=kind)


def loss_difference_bound(
    sample_sizes: ArrayLike, loss_bound: float, hessian_bound: float, radius: float
) -> NDArray[np.float64]:
    """Bound |L_{k+1}(w) − L_k(w)| by 2/(k + 1)·(M_ℓ + B R²) (Lemma 2 of arXiv:2409.11995).

    It assumes the quadratic model of the loss at w*, and that w* is a minimum of both means (Assumption 1 there). For
    nonnegative losses half of it is a bound, too: then |ℓ_{k+1}(w*) − L_k(w*)| ≤ M_ℓ, and the authors omit the ½ of
    Taylor's formula.

    Args:
        sample_sizes: k, at least 1.
        loss_bound: M_ℓ, largest |ℓ_i(w*)|.
        hessian_bound: B, bound on ‖H_i(w*)‖₂; a bound on the G-term is not enough unless the H-term is zero.
        radius: R, bound on ‖w − w*‖.

    Returns:
        The bounds, in the shape of `sample_sizes`.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> loss_difference_bound([1, 3], loss_bound=1.0, hessian_bound=4.0, radius=0.5).tolist()
        [2.0, 1.0]
    """
    _check_norms(loss_bound=loss_bound, hessian_bound=hessian_bound, radius=radius)
    sizes = np.asarray(sample_sizes, dtype=np.float64)
    if not (sizes >= 1).all():
        msg = f"`sample_sizes` must be at least 1, got {sizes[~(sizes >= 1)].flat[0]}."
        raise ValueError(msg)
    bounds: Array = 2 / (sizes + 1) * (loss_bound + hessian_bound * radius**2)
    return bounds


def network_bound(module: nn.Module, inputs: Tensor, *, kind: Kind = "tight", matrix: Matrix = "hessian") -> float:
    """Return `hessian_bound` with the norms measured on a network and its inputs.

    Args:
        module: A fully connected ReLU network: layers of `nn.Linear`, each applied to the output of the one before.
            Skip connections and functional activations cannot be detected; with them the bound is not valid.
        inputs: Inputs, shape (N, ...).
        kind: "published", for networks without biases only, or "tight".
        matrix: "ggn", "residual" or "hessian".

    Raises:
        ValueError: If the module is another kind of network, or there is no "published" bound for it.
    """
    linear = _linear_layers(module)
    biased = any(layer.bias is not None for layer in linear)
    return hessian_bound(
        input_norm(inputs),
        weight_norm(module),
        len(linear),
        kind=kind,
        matrix=matrix,
        bias_norm=bias_norm(module) if biased else None,
    )


def weight_norm(module: nn.Module) -> float:
    """Return M_W, the largest spectral norm of the weight matrices of a fully connected ReLU network."""
    return max(
        float(torch.linalg.matrix_norm(layer.weight.detach().cpu().double(), 2)) for layer in _linear_layers(module)
    )


def bias_norm(module: nn.Module) -> float:
    """Return M_b, the largest Euclidean norm of the biases of a fully connected ReLU network; 0 without biases."""
    biases = [layer.bias for layer in _linear_layers(module) if layer.bias is not None]
    return max((float(torch.linalg.vector_norm(bias.detach().cpu().double())) for bias in biases), default=0.0)


def input_norm(inputs: Tensor) -> float:
    """Return M_x, the largest Euclidean norm of inputs of shape (N, ...).

    Raises:
        ValueError: If there is no input.
    """
    if inputs.ndim < 2 or not len(inputs):
        msg = f"`inputs` must have shape (N, ...) with N at least 1, got {tuple(inputs.shape)}."
        raise ValueError(msg)
    return float(torch.linalg.vector_norm(inputs.detach().cpu().double().flatten(1), dim=1).max())


def _linear_layers(module: nn.Module) -> Sequence[nn.Linear]:
    """Return the linear layers.

    Raises:
        ValueError: If there is no linear layer, if one occurs twice, or if there are layers of other kinds.
    """
    found = [(name, part) for name, part in module.named_modules(remove_duplicate=False) if not list(part.children())]
    for name, part in found:
        if type(part) not in _LAYERS:
            allowed = ", ".join(layer.__name__ for layer in _LAYERS)
            msg = f"`module` must consist of {allowed} for these bounds, got {type(part).__name__} at {name!r}."
            raise ValueError(msg)
    linear = [part for _, part in found if isinstance(part, nn.Linear)]
    if not linear or len({id(layer.weight) for layer in linear}) < len(linear):
        msg = f"`module` must have linear layers, each with weights of its own, got {len(linear)} layers."
        raise ValueError(msg)
    return linear


def _check_norms(**norms: float) -> None:
    for name, value in norms.items():
        if not 0 <= value < math.inf:
            msg = f"`{name}` must be finite and not negative, got {value!r}."
            raise ValueError(msg)


def _check_choices(kind: Kind, matrix: Matrix, bias_norm: float | None) -> None:
    check_choice("kind", kind, get_args(Kind))
    check_choice("matrix", matrix, get_args(Matrix))
    if kind == "published" and (matrix != "ggn" or bias_norm):
        msg = (
            f"the published bound exists for `matrix='ggn'` without biases only, got `matrix={matrix!r}`, "
            f"`bias_norm={bias_norm!r}`: use `kind='tight'`."
        )
        raise ValueError(msg)
