"""The records of a SharpnessMonitor: as scalars to log, as a tensor in a checkpoint, and when they give an alarm."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from lightning_hesd.training.history import is_plain_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class TrackedRecord:
    """The sharpness after an optimizer step: tracked, not verified.

    Attributes:
        global_step: Optimizer steps so far.
        products: Hessian-vector products of this measurement.
        tracked_lambda_max: Largest Ritz value of the Hessian of the monitor's samples, a lower bound of their λ_max.
        batch_sharpness: gᵀHg/‖g‖² with the gradient g of these samples; None if g is 0.
        tracked_stability_ratio: Largest Ritz value of the preconditioned Hessian over the optimizer's stability
            threshold; None if one of them is unknown, as in the first steps of an adaptive optimizer.
        calibration: λ_max of the last full analysis over the tracked value at the same weights; None: there was none.
        headroom: 1 over the tracked stability ratio, which is multiplied by `calibration` if there is one; None if it
            is unknown or not positive.
    """

    global_step: int
    products: int
    tracked_lambda_max: float
    batch_sharpness: float | None
    tracked_stability_ratio: float | None
    calibration: float | None
    headroom: float | None

    def scalars(self, name: str) -> dict[str, float]:
        """Return the values to log, with the monitor's name before their keys."""
        values = {f"{name}/{key}": value for key, value in asdict(self).items() if value is not None}
        del values[f"{name}/global_step"], values[f"{name}/products"]
        return values


def packed(records: Sequence[TrackedRecord]) -> Tensor:
    """Return records as a tensor for checkpoints: a row for each, a column for each field, NaN for None."""
    rows = [[math.nan if value is None else float(value) for value in astuple(record)] for record in records]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(fields(TrackedRecord)))


def unpacked(rows: Any) -> list[TrackedRecord]:
    """Return the records of a tensor from a checkpoint.

    Raises:
        ValueError: If it is no such tensor.
    """
    columns = len(fields(TrackedRecord))
    if not is_plain_tensor(rows) or rows.shape[1:] != (columns,):
        msg = f"`records` of a SharpnessMonitor must be a float64 tensor of {columns} columns, got {rows!r:.80}"
        raise ValueError(msg)
    records = []
    for row in rows.tolist():
        step, products, *values = row
        if not (math.isfinite(step) and math.isfinite(products)):
            msg = f"`global_step` and `products` of a tracked record must be finite, got {step} and {products}"
            raise ValueError(msg)
        present: list[Any] = [None if math.isnan(value) else value for value in values]
        records.append(TrackedRecord(int(step), int(products), *present))
    return records


def gives_alarm(records: Sequence[TrackedRecord], headroom: float) -> bool:
    """Return whether two records in succession have less headroom than this.

    One is not enough: a single step may pass a sharp place.
    """
    known = [record.headroom for record in records if record.headroom is not None]
    return any(max(pair) < headroom for pair in pairwise(known))
