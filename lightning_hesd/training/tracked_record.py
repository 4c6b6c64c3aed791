"""The records of a SharpnessMonitor: as scalars to log, as numbers in a checkpoint, and when they give an alarm."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        headroom: Stability threshold over the tracked value, this times `calibration` if there is one; None if the
            threshold is unknown, or the tracked value not positive.
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

    def numbers(self) -> list[float]:
        """Return the fields as numbers, NaN for None."""
        return [math.nan if value is None else float(value) for value in astuple(self)]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> TrackedRecord:
        """Return the record with these numbers, in the order of the fields.

        Raises:
            ValueError: If their number is not that of the fields, or a value that every record has is missing.
        """
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = dict(zip(names, (None if math.isnan(n) else n for n in numbers), strict=True))
        for key in ("global_step", "products"):
            if values[key] is None:
                msg = f"`{key}` of a tracked record is missing"
                raise ValueError(msg)
            values[key] = int(values[key])
        return cls(**values)


NUMBERS = len(fields(TrackedRecord))
"""Numbers of a record."""


def gives_alarm(records: Sequence[TrackedRecord], headroom: float) -> bool:
    """Return whether two records in succession have less headroom than this.

    One is not enough: a single step may pass a sharp place.
    """
    known = [record.headroom for record in records if record.headroom is not None]
    return any(max(pair) < headroom for pair in pairwise(known))
