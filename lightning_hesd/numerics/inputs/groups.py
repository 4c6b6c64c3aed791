"""Check of the groups of samples into which a batch was cut: their mean loss must be the loss of the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_hesd.numerics.inputs.batches import WeightedBatch

SHARE_OF_SCATTER = 0.1
"""Largest difference between the mean loss of the groups and the loss of their batch, in standard errors."""


def check_groups(groups: Sequence[WeightedBatch], losses: Sequence[Tensor], whole: float) -> None:
    """Check that the mean loss of groups of samples is the loss of their batch.

    Args:
        groups: At least two groups.
        losses: The loss of each group.
        whole: The loss of the batch.

    Raises:
        UnsplittableBatchError: If it is not, or all groups have the same loss.
    """
    values = np.array([loss.item() for loss in losses])
    weights = np.array([group.weight for group in groups])
    rounding = 64 * torch.finfo(losses[0].dtype).eps * float(np.abs(values).max())
    scatter = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if abs(np.average(values, weights=weights) - whole) > SHARE_OF_SCATTER * scatter + rounding:
        msg = (
            f"the losses of groups of samples have the mean {np.average(values, weights=weights):.6g}, that of the "
            f"whole {groups[0].label} is {whole:.6g}: the loss is not a mean over samples (it may use statistics of "
            "the batch)"
        )
        raise UnsplittableBatchError(msg)
    if (values == values[0]).all():
        msg = (
            f"the loss of {groups[0].label} is the same for all of its groups of samples: it does not depend on the "
            "values that were cut"
        )
        raise UnsplittableBatchError(msg)
