"""Indicators of a run, from the spectra of the whole network and of its layers."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from lightning_hesd.spectra.indicators import layer_indicators

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_hesd import Spectrum
    from lightning_hesd.training.history import SpectrumRecord

QUANTITIES = {
    "r_e": "−C_t",
    "lambda_max": "λ_max",
    "growth": "growth of λ_max",
    "trace": "trace",
    "trace_share": "share of the trace",
    "effective_rank": "effective rank",
    "relative_rank": "effective rank / parameters",
    "near_zero_share": "near-zero share",
    "negative_share": "negative share",
}
"""Quantities of a spectrum, with their names in the report. -C_t, so that larger means more negative curvature."""

PLACES = ("whole", "mean", "largest", "first", "last")
"""The whole network; the mean and largest value of its layers; the first and the last layer."""

MEANINGLESS = {
    ("trace_share", "whole"),  # 1
    ("trace_share", "mean"),  # one over the number of layers
    ("r_e", "last"),  # 0, as the loss is convex in the parameters of the last layer
    ("negative_share", "last"),  # 0
}
NAMES = [
    f"{label}, {place}"
    for quantity, label in QUANTITIES.items()
    for place in PLACES
    if (quantity, place) not in MEANINGLESS
]


def indicators(halfway: SpectrumRecord, end: SpectrumRecord) -> dict[str, float]:
    """Return the indicators of a run, by name, from its two analyses."""
    assert halfway.spectrum is not None
    assert end.spectrum is not None
    assert halfway.layers is not None
    assert end.layers is not None
    whole = _of_spectra({"": halfway.spectrum}, {"": end.spectrum})[0]
    layers = _of_spectra(halfway.layers, end.layers)  # in the order of the network
    found: dict[str, float] = {}
    for quantity, label in QUANTITIES.items():
        values = [layer[quantity] for layer in layers]
        by_place = (whole[quantity], statistics.fmean(values), _largest(values), values[0], values[-1])
        found |= {f"{label}, {place}": value for place, value in zip(PLACES, by_place, strict=True)}
    return {name: found[name] for name in NAMES}


def _of_spectra(halfway: Mapping[str, Spectrum], end: Mapping[str, Spectrum]) -> list[dict[str, float]]:
    return [
        {
            **vars(found),
            "r_e": -found.c_t,
            "growth": _growth(halfway[name].lambda_max, found.lambda_max),
            "relative_rank": found.effective_rank / end[name].dimension,
        }
        for name, found in layer_indicators(end).items()
    ]


def _growth(before: float, after: float) -> float:
    """Return the logarithm of the ratio; NaN where one is not positive."""
    return math.log(after / before) if before > 0 and after > 0 else math.nan


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
