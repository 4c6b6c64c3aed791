"""Losses of samples at displaced weights w + Uε, and their derivatives with respect to ε."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.sample_size.sample_losses import check_finite, sample_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.isolation.isolation import Isolation
    from lightning_hesd.sample_size.sample_losses import SampleLoss

    Array = NDArray[np.float64]
    LossesAt = Callable[[WeightedBatch, Tensor], Tensor]
    """Batch and ε, shape (D,) -> losses of the samples, shape (batch,)."""


class _LossModule(nn.Module):
    """A loss as a module, so that `functional_call` can replace the parameters, tied ones together."""

    def __init__(self, module: nn.Module, loss_fn: SampleLoss) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: WeightedBatch) -> Tensor:
        return sample_losses(self.module, batch, self.loss_fn)


def displaced_losses(
    module: nn.Module,
    loss_fn: SampleLoss,
    parameters: Sequence[nn.Parameter],
    directions: Tensor,
    isolation: Isolation,
) -> LossesAt:
    """Return the losses of a batch's samples at w + Uε as a function of the batch and ε, (D,) -> (batch,)."""
    names = {p: f"module.{name}" for name, p in module.named_parameters()}
    rows = torch.split(directions.detach(), [p.numel() for p in parameters])
    moved = [(names[p], p.detach(), u.to(p)) for p, u in zip(parameters, rows, strict=True)]
    wrapper = _LossModule(module, loss_fn)

    def losses_at(batch: WeightedBatch, displacement: Tensor) -> Tensor:
        values = {name: p + (u @ displacement.to(p)).view_as(p) for name, p, u in moved}
        isolation.restore(batch.index)
        with isolation.evaluation():
            losses: Tensor = functional_call(wrapper, values, (batch,))
        return losses

    return losses_at


def chunks(batches: Sequence[WeightedBatch], chunk_size: int | None) -> Iterator[WeightedBatch]:
    """Yield the batches in chunks of at most `chunk_size` samples; None: whole."""
    for batch in batches:
        yield from [batch] if chunk_size is None else batch.split(math.ceil(batch.num_samples / chunk_size))


def moments(losses_at: LossesAt, batch: WeightedBatch, dimension: int, sigma: float) -> Array:
    """Return (ℓ + ½σ² tr H, σg, σ²H/√2) of the samples of a batch, shape (batch, 1 + D + D²)."""
    point = torch.zeros(dimension, dtype=torch.float64, requires_grad=True)
    losses = losses_at(batch, point)
    check_finite(losses, batch)
    gradients, hessians = _derivatives(losses, point)
    trace = hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
    shifted = losses.detach().to(gradients) + sigma**2 / 2 * trace
    columns = [shifted[:, None], sigma * gradients, sigma**2 / math.sqrt(2) * hessians.flatten(1)]
    found: Array = torch.cat(columns, dim=1).cpu().double().numpy()
    return found


def _derivatives(losses: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients and Hessians of losses (batch,) at a point (D,), shapes (batch, D) and (batch, D, D).

    Uses reverse mode alone, which every loss with a Hessian supports, whereas some activations have no forward mode.
    All samples are differentiated at once: Jᵀu is linear in u, and the derivative of its i-th element with respect to u
    is column i of J, one element per sample. The columns of J are differentiated in the same way again. This is as fast
    as forward over forward.
    """
    count, dimension = len(losses), len(point)
    options: Any = {"dtype": finest_dtype(losses.device), "device": losses.device}
    gradients, hessians = torch.empty(count, dimension, **options), torch.empty(count, dimension, dimension, **options)
    outer, inner = torch.ones_like(losses, requires_grad=True), torch.ones_like(losses, requires_grad=True)
    total = _gradient(losses, point, outer)
    for i in range(dimension):
        column = _gradient(total[i], outer)
        gradients[:, i] = column.detach()
        row = _gradient(column, point, inner)
        for j in range(i + 1):
            hessians[:, i, j] = hessians[:, j, i] = _gradient(row[j], inner).detach()
    return gradients, hessians


def _gradient(output: Tensor, variable: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the gradient of Σ weights·output with a graph; zeros if it does not depend on the variable."""
    if not output.requires_grad:
        return torch.zeros_like(variable)
    return torch.autograd.grad(output, variable, weights, create_graph=True, materialize_grads=True)[0]
