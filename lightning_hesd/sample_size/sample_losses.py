"""Losses of single samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.sample_counts import batch_size
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.numerics.isolation.snapshot import seed_everything

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from torch import nn

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.isolation.modes import Mode, ModuleModes

    SampleLoss = Callable[[Any, Any], Tensor]
    """loss_fn(module, batch) -> losses of the samples, shape (batch,), or their mean, a scalar."""


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
