"""Groups of samples into which a batch was cut: are they what they should be?"""

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
"""By how many of their standard errors the mean of the losses of groups may differ from the loss of their batch."""


def check_groups(groups: Sequence[WeightedBatch], losses: Sequence[Tensor], whole: float) -> None:
    """Check that the losses of groups of samples have the loss of their batch as their mean.

    Args:
        groups: The groups, two at least.
        losses: Their losses.
        whole: The loss of the batch.

    Raises:
        UnsplittableBatchError: If they have not, or do not depend on the group.
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
        msg = f"the loss of {groups[0].label} is the same for all of its parts, and does not depend on what was cut"
        raise UnsplittableBatchError(msg)
