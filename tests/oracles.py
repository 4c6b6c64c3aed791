"""Slow and obvious answers to compare with: dense Hessians by PyTorch alone."""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import cases


def dense_hessian(
    module: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    weights: Sequence[float] | None = None,
    parameters: Callable[[str, nn.Parameter], bool] | None = None,
    train: bool = False,
) -> Tensor:
    """Return the Hessian of the weighted mean loss, shape (n, n), in float64.

    With respect to the parameters that require grad, tied ones once, in the order of `named_parameters`. `weights`
    default to the lengths of the first tensor of each batch.
    """
    wrapper = _LossModule(copy.deepcopy(module), loss_fn).double().train(train)
    chosen = {
        name: p
        for name, p in wrapper.named_parameters()
        if p.requires_grad and (parameters is None or parameters(name.removeprefix("module."), p))
    }
    weights = weights or [float(len(batch[0])) for batch in batches]
    batches = [tuple(part.double() if part.is_floating_point() else part for part in batch) for batch in batches]

    def mean_loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in chosen.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(chosen.items(), parts, strict=True)}
        losses = [weight * functional_call(wrapper, values, (b,)) for weight, b in zip(weights, batches, strict=True)]
        return torch.stack(losses).sum() / sum(weights)

    point = torch.cat([p.detach().flatten() for p in chosen.values()])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(mean_loss, point, vectorize=True)


def dense_gauss_newton(module: nn.Module, batches: Sequence[Any], output_loss: Callable[[Any, Any], Tensor]) -> Tensor:
    """Return Jᵀ (∂²L/∂o²) J of the mean loss, from Jacobians and Hessians written out, shape (n, n)."""
    chosen = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    terms = []
    for batch in batches:

        def outputs(*values: Tensor, batch: Any = batch) -> Tensor:
            return functional_call(module, dict(zip(chosen, values, strict=True)), (batch[0],)).flatten()

        def loss(flat: Tensor, batch: Any = batch) -> Tensor:
            return output_loss(flat.view(module(batch[0]).shape), batch)

        parts = torch.autograd.functional.jacobian(outputs, tuple(chosen.values()), vectorize=True)
        jacobian = torch.cat([part.flatten(1) for part in parts], dim=1)
        curvature = torch.autograd.functional.hessian(loss, outputs(*chosen.values()), vectorize=True)
        terms.append(len(batch[0]) * jacobian.T @ curvature @ jacobian)
    return sum(terms) / sum(len(batch[0]) for batch in batches)


def eigenvalues(*problem: Any, **options: Any) -> np.ndarray:
    """Return the eigenvalues of the dense Hessian, ascending; the arguments are those of `dense_hessian`."""
    return torch.linalg.eigvalsh(dense_hessian(*problem, **options)).numpy()


@functools.cache
def case_hessian(name: str) -> Tensor:
    """Return the dense Hessian of a problem of `cases` in float64, which is computed only once: do not write to it."""
    return dense_hessian(*cases.make(name))


@functools.cache
def case_eigenvalues(name: str) -> np.ndarray:
    """Return the eigenvalues of this Hessian, ascending."""
    return torch.linalg.eigvalsh(case_hessian(name)).numpy()


def cross_entropy_hessians(module: nn.Module, x: Tensor, y: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return the Hessians of the losses of all x[i], which are samples or batches, shape (len(x), n, n)."""
    parameters = dict(module.named_parameters())

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(module, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # PyTorch's own
        return torch.func.vmap(torch.func.hessian(loss), (None, 0, 0), chunk_size=chunk_size)(flat, x, y)


def hausdorff(first: Any, second: Any) -> float:
    """Return the largest distance from a value of one set to the nearest of the other: multiplicities do not count."""
    distances = np.abs(np.asarray(first)[:, None] - np.asarray(second)[None, :])
    return max(float(distances.min(axis=0).max()), float(distances.min(axis=1).max()))


class _LossModule(nn.Module):
    """Makes a loss a module, so that `functional_call` can replace the parameters, tied ones together."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.module, batch)
