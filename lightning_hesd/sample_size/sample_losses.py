"""Losses of single samples: the passes over batches that loss differences and subspaces have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.sample_counts import batch_size
from lightning_hesd.numerics.isolation.exact_mode import analysis_state
from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything

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

    Fast is a `loss_fn` that returns one loss per sample (in PyTorch `reduction="none"`): every batch is evaluated as
    it is. From the mean over a batch its terms cannot be had back: where `loss_fn` returns a scalar, each batch is
    taken apart, and every sample evaluated by itself, as slow as batches of one are. Either way a loss must depend on
    its own sample only, so in mode "train" batch normalisation is out of the question.

    Args:
        module: The module, on the device of the batches; it and the random number generators are afterwards as they
            were.
        batches: Batches as `loss_fn` takes them; read once. The length of the first tensor is the number of samples.
        loss_fn: `loss_fn(module, batch)` -> losses of the samples, shape (batch,), or their mean, a scalar.
        mode: Module mode meanwhile: "eval", "train", or "keep" for no change.

    Raises:
        ValueError: If there is no batch, or the number of losses is not that of the samples.
        TypeError: If `loss_fn` does not return a tensor.
        ArithmeticError: If a loss is NaN or infinite; the message names the batch.

    Example:
        >>> model, data = torch.nn.Identity(), torch.tensor([1.0, 2.0, 3.0])
        >>> per_sample_losses(model, [data], lambda m, batch: m(batch) ** 2).tolist()
        [1.0, 4.0, 9.0]
    """
    found = []
    with analysis_state(module, mode) as isolation, torch.no_grad():

        def isolated(module: Any, batch: Any) -> Tensor:
            isolation.restore(None)
            with isolation.evaluation():
                return loss_fn(module, batch)

        for batch in read_batches(batches):
            losses = sample_losses(module, batch, isolated)
            check_finite(losses, batch)
            found.append(losses.cpu().double().numpy())
    return np.concatenate(found)


def mean_loss(loss_fn: SampleLoss) -> Callable[[Any, Any], Tensor]:
    """Return the function of module and batch whose value is the mean of the losses, a scalar.

    It raises a TypeError if `loss_fn` does not return a tensor.
    """
    return lambda module, batch: _checked(loss_fn(module, batch)).mean()


def read_batches(batches: Iterable[Any]) -> list[WeightedBatch]:
    """Read the batches once, each weighing its number of samples.

    Raises:
        ValueError: If there is none.
    """
    with restore_state():  # a data loader draws random numbers
        found = weighted_batches(batches)
    if not found:
        msg = "there are no batches to analyse: `batches` is empty."
        raise ValueError(msg)
    return found


def sample_losses(module: Any, batch: WeightedBatch, loss_fn: SampleLoss) -> Tensor:
    """Return the losses of the samples of one batch, shape (batch,), differentiable if gradients are enabled.

    Call it inside `restore_state` or `analysis_state`: it seeds the global generators, so that whatever is random is
    the same at every call.

    Raises:
        ValueError: If the number of losses is not that of the samples.
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
