"""The scalars of a record, as every logger gets them, by way of Lightning."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from lightning_hesd.criteria import MP_THRESHOLD
from lightning_hesd.indicators import layer_indicators

if TYPE_CHECKING:
    from lightning_hesd.history import SpectrumRecord
    from lightning_hesd.spectrum import Spectrum


def scalars(record: SpectrumRecord, name: str) -> dict[str, float]:
    """Return what is logged as scalars, without those that are undefined (NaN)."""
    values = {"c_t_threshold": MP_THRESHOLD} if record.spectra else {}
    if record.assessment is not None:
        values["delta_r_e"] = record.assessment.delta_r_e
        values["delta_k_h05"] = record.assessment.delta_k_h05
        values["verdict"] = record.assessment.value
    if record.stability_ratio is not None:
        values["stability_ratio"] = record.stability_ratio
    keyed = {f"{name}/{key}": value for key, value in values.items()}
    for suffix, spectrum in record.spectra.items():
        keyed |= {f"{name}{suffix}/{key}": value for key, value in _scalars(spectrum).items()}
    for layer, indicators in layer_indicators(record.layers or {}).items():
        keyed |= {f"{name}/layer/{layer}/{key}": value for key, value in asdict(indicators).items()}
    return {key: value for key, value in keyed.items() if not math.isnan(value)}


def _scalars(spectrum: Spectrum) -> dict[str, float]:
    low, high = spectrum.c_t_interval
    return {
        "c_t": spectrum.c_t,
        "c_t_low": low,
        "c_t_high": high,
        "mp": math.nan if spectrum.hesd_type is None else float(spectrum.hesd_type == "MP"),
        "lambda_max": spectrum.lambda_max,
        "lambda_min": spectrum.lambda_min,
        "trace": spectrum.trace,
        # With a tolerance the number of steps varies, and K_H05 with it.
        "k_h05": spectrum.k_h(0.5) if spectrum.tolerance is None else math.nan,
        "c_t_sampling_error": math.nan if spectrum.c_t_sampling_error is None else spectrum.c_t_sampling_error,
        "loss": spectrum.loss,
        "seconds": spectrum.seconds,
    }
