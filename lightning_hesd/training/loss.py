"""The loss of a LightningModule as a function of module and batch: the loss of its `training_step`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_hesd.numerics.inputs.batches import SkippedBatchError, position_in_epoch
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl

    from lightning_hesd.numerics.analysis.evaluation import LossFunction


def check_loss_source(pl_module: pl.LightningModule, loss_fn: LossFunction | None) -> None:
    """Check that the module has a loss to analyze.

    Raises:
        MisconfigurationException: If there is no `loss_fn`, and `training_step` does not return the loss of a batch.
    """
    if loss_fn is not None:
        return
    if not pl_module.automatic_optimization:
        msg = (
            f"{type(pl_module).__name__} uses manual optimization, so calling its `training_step` for the analysis "
            "would change the weights: pass `loss_fn=` to HessianSpectrumCallback, a function (module, batch) -> mean "
            "loss over the batch."
        )
        raise MisconfigurationException(msg)
    if _fetches_batches(pl_module):
        msg = (
            f"the `training_step` of {type(pl_module).__name__} takes a `dataloader_iter` instead of a batch: pass "
            "`loss_fn=` to HessianSpectrumCallback, a function (module, batch) -> mean loss over the batch."
        )
        raise MisconfigurationException(msg)


def check_gets_batches(pl_module: pl.LightningModule) -> None:
    """Check that `training_step` takes a batch, so that batches can be kept for analyses.

    Raises:
        MisconfigurationException: If it fetches its batches itself.
    """
    if _fetches_batches(pl_module):
        msg = (
            f"the `training_step` of {type(pl_module).__name__} takes a `dataloader_iter` instead of a batch, and no "
            "samples can be drawn from the training dataloader: pass `dataloader=` to HessianSpectrumCallback, a "
            "loader or a list of batches."
        )
        raise MisconfigurationException(msg)


def _fetches_batches(pl_module: pl.LightningModule) -> bool:
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


def make_loss_fn(
    trainer: pl.Trainer, loss_fn: LossFunction | None, evaluating: Callable[[], AbstractContextManager[None]]
) -> LossFunction:
    """Return `loss_fn`, or the loss of `training_step`, evaluated at the trainer's precision but without autocast.

    Each evaluation takes place in a context that `evaluating` makes.
    """
    compute = loss_fn or _training_step_loss
    precision = trainer.precision_plugin
    # The forward context of mixed precision is autocast; other precisions set the dtype of new tensors in it.
    is_mixed = isinstance(precision, lightning_types("plugins.MixedPrecision"))
    context = contextlib.nullcontext if is_mixed else precision.forward_context

    def loss(module: pl.LightningModule, batch: Any) -> Tensor:
        is_compared = torch.get_default_dtype() == torch.float64  # the comparison of loss and derivatives is in float64
        with evaluating(), contextlib.nullcontext() if is_compared else context():
            return compute(module, batch)

    return loss


def _training_step_loss(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    arguments = [batch]
    if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
        arguments.append(position_in_epoch())
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_idx", explicit=True):
        arguments.append(0)
    output = pl_module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss
    name = type(pl_module).__name__
    if output is None:
        msg = (
            f"the `training_step` of {name} returned None for batch {position_in_epoch()} of the epoch: it is skipped."
        )
        raise SkippedBatchError(msg)
    found = f"a {type(output).__name__} without 'loss'" if isinstance(output, Mapping) else type(output).__name__
    msg = (
        f"the `training_step` of {name} must return the loss as a tensor, or a dict with 'loss', got {found}: return "
        "it, or pass `loss_fn=` to HessianSpectrumCallback."
    )
    raise MisconfigurationException(msg)
