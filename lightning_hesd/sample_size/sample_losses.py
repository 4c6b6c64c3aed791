"""Losses of single samples, at the weights w and at displaced weights w + Uε, and their derivatives there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.sample_counts import batch_size
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.numerics.isolation.snapshot import seed_everything

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.isolation.exact_mode import Isolation
    from lightning_hesd.numerics.isolation.modes import Mode, ModuleModes

    SampleLoss = Callable[[Any, Any], Tensor]
    """loss_fn(module, batch) -> losses of the samples, shape (batch,), or their mean, a scalar."""

    LossesAt = Callable[[WeightedBatch, Tensor], Tensor]
    """Batch and ε, shape (D,) -> losses of the samples, shape (batch,)."""


def per_sample_losses(
    module: nn.Module, batches: Iterable[Any], loss_fn: SampleLoss, *, mode: Mode | ModuleModes = "eval"
) -> NDArray[np.float64]:
    """Return the loss of every sample, shape (N,), in the order of the batches, in one pass without gradients.

    If `loss_fn` returns one loss per sample (in PyTorch `reduction="none"`), each batch is evaluated once. If it
    returns a scalar, each batch is split and every sample evaluated by itself, which is as slow as batches of one. In
    both cases a loss must depend on its own sample only, which batch normalization in mode "train" violates.

    Args:
        module: As for `loss_differences`.
        batches: As for `loss_differences`; the length of the first tensor is the number of samples.
        loss_fn: As for `loss_differences`.
        mode: As for `loss_differences`.

    Raises:
        ValueError: If there is no batch, or the number of losses differs from that of the samples.
        TypeError: If `loss_fn` does not return a tensor.
        ArithmeticError: If a loss is NaN or infinite; the message names the batch.

    Examples:
        >>> model, data = torch.nn.Identity(), torch.tensor([1.0, 2.0, 3.0])
        >>> per_sample_losses(model, [data], lambda m, batch: m(batch) ** 2).tolist()
        [1.0, 4.0, 9.0]
    """
    with exact_mode(module, mode) as isolation, torch.no_grad():

        def isolated(module: Any, batch: Any) -> Tensor:
            isolation.restore(None)
            with isolation.evaluation():
                return loss_fn(module, batch)

        return all_losses(lambda batch: sample_losses(module, batch, isolated), read_batches(batches))


def all_losses(losses_of: Callable[[WeightedBatch], Tensor], batches: Iterable[WeightedBatch]) -> NDArray[np.float64]:
    """Return the losses of all samples, shape (N,), given a function from a batch to those of its samples.

    Raises:
        ArithmeticError: If a loss is NaN or infinite.
    """
    found = []
    for batch in batches:
        losses = losses_of(batch)
        check_finite(losses, batch)
        found.append(losses.cpu().double().numpy())
    return np.concatenate(found)


def mean_loss(loss_fn: SampleLoss) -> Callable[[Any, Any], Tensor]:
    """Return the function (module, batch) -> mean of the losses; it raises a TypeError if these are no tensor."""
    return lambda module, batch: _checked(loss_fn(module, batch)).mean()


def read_batches(batches: Iterable[Any]) -> list[WeightedBatch]:
    """Read the batches once, each weighing its number of samples.

    Raises:
        ValueError: If there is no batch.
    """
    found = weighted_batches(batches)
    if not found:
        msg = "there are no batches to analyze: `batches` is empty."
        raise ValueError(msg)
    return found


def sample_losses(module: Any, batch: WeightedBatch, loss_fn: SampleLoss) -> Tensor:
    """Return the losses of the samples of one batch, shape (batch,), differentiable if gradients are enabled.

    Call it inside `restore_state` or `exact_mode`: it seeds the global generators, so that every call draws the same
    random numbers.

    Raises:
        ValueError: If the number of losses differs from that of the samples.
        TypeError: If `loss_fn` does not return a tensor.
    """
    seed_everything(1 + batch.index)
    with batch.evaluated():
        return _losses(module, batch.copy(), loss_fn)


def _losses(module: Any, batch: WeightedBatch, loss_fn: SampleLoss) -> Tensor:
    size = int(batch_size(batch.data))
    losses = _checked(loss_fn(module, batch.data))
    if losses.ndim == 0 and size > 1:
        return torch.cat([_losses(module, sample, loss_fn) for sample in batch.split(size)])
    if losses.ndim and losses.shape != (size,):
        msg = (
            f"`loss_fn` must return one loss per sample, shape ({size},) for batch {batch.index}, or their mean, a "
            f"scalar; got shape {tuple(losses.shape)}."
        )
        raise ValueError(msg)
    return losses.reshape(size)


def _checked(losses: Any) -> Tensor:
    if isinstance(losses, Tensor):
        return losses
    msg = f"`loss_fn` must return a tensor, got {type(losses).__name__}."
    raise TypeError(msg)


def check_finite(losses: Tensor, batch: WeightedBatch) -> None:
    """Check the losses of a batch.

    Raises:
        ArithmeticError: If one is NaN or infinite.
    """
    wrong = losses[~losses.isfinite()]
    if len(wrong):
        msg = f"the loss of a sample of batch {batch.index} is {float(wrong[0])}."
        raise ArithmeticError(msg)


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


def moments(losses_at: LossesAt, batch: WeightedBatch, dimension: int, sigma: float) -> NDArray[np.float64]:
    """Return (ℓ + ½σ² tr H, σg, σ²H/√2) of the samples of a batch, shape (batch, 1 + D + D²)."""
    point = torch.zeros(dimension, dtype=torch.float64, requires_grad=True, device="cpu")
    losses = losses_at(batch, point)
    check_finite(losses, batch)
    gradients, hessians = _derivatives(losses, point)
    trace = hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
    shifted = losses.detach().to(gradients) + sigma**2 / 2 * trace
    columns = [shifted[:, None], sigma * gradients, sigma**2 / math.sqrt(2) * hessians.flatten(1)]
    found: NDArray[np.float64] = torch.cat(columns, dim=1).cpu().double().numpy()
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
