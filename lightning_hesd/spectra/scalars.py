"""The scalars of a record, as every logger gets them, by way of Lightning, and as tables have them in their columns."""

from __future__ import annotations

import math
from dataclasses import asdict
from operator import attrgetter
from typing import TYPE_CHECKING

from lightning_hesd.spectra.criteria import MP_THRESHOLD
from lightning_hesd.spectra.indicators import layer_indicators

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum

SPECTRUM_SCALARS: dict[str, Callable[[Spectrum], float | None]] = {
    "c_t": attrgetter("c_t"),
    "c_t_low": lambda spectrum: spectrum.c_t_interval[0],
    "c_t_high": lambda spectrum: spectrum.c_t_interval[1],
    "verified": lambda spectrum: float(spectrum.verified == "yes"),
    "mp": lambda spectrum: None if spectrum.hesd_type is None else float(spectrum.hesd_type == "MP"),
    "lambda_max": attrgetter("lambda_max"),
    "lambda_min": attrgetter("lambda_min"),
    "trace": attrgetter("trace"),
    # With a tolerance the number of steps varies, and K_H05 with it.
    "k_h05": lambda spectrum: spectrum.k_h(0.5) if spectrum.tolerance is None else None,
    "c_t_sampling_error": attrgetter("c_t_sampling_error"),
    "loss": attrgetter("loss"),
    "seconds": attrgetter("seconds"),
}
"""What is logged of each spectrum; None or NaN where it is undefined."""


def scalars(record: SpectrumRecord, name: str) -> dict[str, float]:
    """Return what is logged as scalars, without those that are undefined (NaN)."""
    values = {"c_t_threshold": MP_THRESHOLD} if record.spectra else {}
    keyed = {f"{name}/{key}": value for key, value in (values | comparison_scalars(record)).items()}
    for suffix, spectrum in record.spectra.items():
        keyed |= {f"{name}{suffix}/{key}": value for key, value in spectrum_scalars(spectrum).items()}
    for layer, indicators in layer_indicators(record.layers or {}).items():
        keyed |= {f"{name}/layer/{layer}/{key}": value for key, value in asdict(indicators).items()}
    return {key: value for key, value in keyed.items() if not math.isnan(value)}


def comparison_scalars(record: SpectrumRecord) -> dict[str, float]:
    """Return what compares the spectra of a record with each other and with thresholds; NaN: undefined."""
    values = {}
    if record.assessment is not None:
        values["delta_r_e"] = record.assessment.delta_r_e
        values["delta_k_h05"] = record.assessment.delta_k_h05
        values["verdict"] = record.assessment.value
    if record.stability_ratio is not None:
        values["stability_ratio"] = record.stability_ratio
    return values


def spectrum_scalars(spectrum: Spectrum) -> dict[str, float]:
    """Return what is logged of a spectrum; NaN: undefined."""
    values = {key: value(spectrum) for key, value in SPECTRUM_SCALARS.items()}
    return {key: math.nan if value is None else value for key, value in values.items()}
