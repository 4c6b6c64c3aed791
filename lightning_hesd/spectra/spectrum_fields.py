"""The values that the fields of a spectrum may have, checked where a spectrum is read from a file or a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.spectra.validation import at_least, check_fields, each, number, of, optional, text, within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_hesd.spectra.validation import Check

ARRAYS = ("nodes", "weights", "residuals")
"""The fields that are arrays."""

MAX_SIZE = 1e150
"""Largest absolute value of a node, so that its square is finite."""

SAMPLING = (
    *("c_t_sampling_error", "c_t_sampling_bias", "lambda_min_sampling_error", "lambda_max_sampling_error"),
    *("lambda_min_sampling_bias", "lambda_max_sampling_bias"),
)

REQUIRED: dict[str, Check] = {
    **dict.fromkeys(ARRAYS, of(np.ndarray)),
    "steps_per_probe": each(at_least(0)),
    "dimension": at_least(1),
    "num_samples": at_least(0),
    "loss": number,
    "rounding": within(0.0, MAX_SIZE),
    "matvecs": at_least(0),
    "seconds": number,
}
OPTIONAL: dict[str, Check] = {
    **dict.fromkeys(("matrix", "probe", "mode", "strategy", "strategy_reason", "basis"), text),
    "seed": of(int),
    "confidence": within(1e-9, 1 - 1e-9),
    "tolerance": optional(lambda value: value in {"type", "auto"} if text(value) else within(0.0, MAX_SIZE)(value)),
    "reason": optional(text),
    "verified": lambda value: text(value) and value in {"yes", "no", "unknown"},
    "verification": text,
    **dict.fromkeys(("predicted_memory", "sampling_groups"), optional(at_least(0))),
    **dict.fromkeys(("asymmetry", "gradient_equivalents", *SAMPLING), optional(number)),
}


def check_spectrum(values: Mapping[str, Any]) -> None:
    """Check the fields of a spectrum by name, each by itself.

    Raises:
        ValueError: If a field is missing, is unknown, or has another kind of value.
    """
    given = {name: check for name, check in OPTIONAL.items() if name in values}
    check_fields(values, {**REQUIRED, **given}, "a spectrum")
    unknown = set(values) - set(REQUIRED) - set(OPTIONAL)
    if unknown:
        msg = f"a spectrum has no field {min(map(str, unknown))!r:.80}"
        raise ValueError(msg)


def check_rules(nodes: Any, weights: Any, residuals: Any, steps_per_probe: tuple[int, ...]) -> None:
    """Check that arrays of shape (probes, steps) are quadrature rules with so many nodes.

    Raises:
        ValueError: If they are not.
    """
    present = ~np.isnan(nodes)
    conditions = (
        present.sum(axis=1) == steps_per_probe,
        present[:, :-1] >= present[:, 1:],  # the padding comes last
        np.abs(nodes[present]) <= MAX_SIZE,
        weights >= 0,
        np.abs(weights.sum(axis=1) - np.minimum(steps_per_probe, 1)) <= 1e-6,
        (residuals >= 0) & (residuals <= MAX_SIZE),
    )
    if not all(np.all(condition) for condition in conditions):
        msg = "its nodes, weights and residuals are no quadrature rules of so many steps"
        raise ValueError(msg)
