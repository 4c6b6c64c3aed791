"""Payloads from their texts, which may be of unknown origin: every field that readers rely on is checked."""

from __future__ import annotations

import math
from types import NoneType
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.payload import SHOWN_OF_CURVATURE
from lightning_hesd.spectra.scalars import LAYER_SCALARS
from lightning_hesd.spectra.validation import (
    check_fields,
    check_version,
    each,
    each_named,
    each_of,
    having,
    integer,
    number,
    of,
    one_line,
    optional,
    parsed,
    text,
    version_in,
    within,
)

if TYPE_CHECKING:
    from lightning_hesd.spectra.validation import Fields


class PayloadError(ValueError):
    """A payload cannot be read; the message says why."""


LINE_FIELDS: Fields = {"distances": each_of(int, float), "losses": each_of(int, float, NoneType)}
SPECTRUM_FIELDS: Fields = {
    **dict.fromkeys(("nodes", "weights", "left", "right"), each_of(int, float)),
    **dict.fromkeys(("lambda_min", "lambda_max"), number),
    **dict.fromkeys(("sigma", "loss", "c_t", "c_t_low", "c_t_high"), optional(number)),
    **dict.fromkeys(("lambda_min_error", "lambda_max_error", "trace_error"), optional(number)),
    **dict.fromkeys(("type", "matrix", "sampling_reason"), optional(text)),
    "cumulative_band": optional(having(dict.fromkeys(("points", "low", "high"), each_of(int, float)))),
    "losses_along": optional(having(dict.fromkeys(("lambda_min", "lambda_max"), having(LINE_FIELDS)))),
}
FINDING_FIELDS: Fields = dict.fromkeys(("key", "title", "evidence", "confidence", "action"), text)
REFERENCE_FIELDS: Fields = {
    "among": text,
    "reason": optional(text),
    "source": text,
    "quantities": each(having(dict.fromkeys(("key", "title", "value", "usual", "seen", "answer"), text))),
}
RECORD_FIELDS: Fields = {
    "epoch": integer,
    "global_step": integer,
    "error": optional(text),
    "spectra": of(dict),
    "thresholds": each_named(number),
    "assessment": optional(
        having(
            {"verdict": text, "reasons": each_of(str), **dict.fromkeys(("delta_r_e", "delta_k_h05"), optional(number))}
        )
    ),
    **dict.fromkeys(("metrics", "gradients", "scores"), each_named(optional(number))),
    "layers": of(dict),
    "findings": each(having(FINDING_FIELDS)),
    "reference": lambda value: value == {} or having(REFERENCE_FIELDS)(value),
}
SELECTION_FIELDS: Fields = {
    "key": text,
    "rule": text,
    "epoch": integer,
    "global_step": integer,
    "tolerance": within(0.0, math.inf),
    "require_mp": of(bool),
    "train_metric": optional(text),
    "train_metric_mode": text,
    "metric": number,
    "criterion": optional(number),
    "mainly_positive": of(bool),
    "pick": optional(having({"epoch": integer, "global_step": integer, "path": optional(text)})),
    "rivals": each(integer),
}
"""Checks of the fields that readers rely on."""


def read_payload(source: str | bytes, fields: Fields = RECORD_FIELDS) -> dict[str, Any]:
    """Return a payload from its text, which may be of unknown origin; `fields`: the fields it must have.

    Raises:
        PayloadError: If it is damaged, or of another version.
    """
    try:
        payload: dict[str, Any] = parsed(source)
        version = version_in(payload, "version")
    except ValueError as error:
        msg = f"this is no payload of lightning_hesd, or it is damaged ({one_line(error)})."
        raise PayloadError(msg) from error
    try:
        check_version(version, "the payload")
        check_fields(payload, fields, "the payload")
        for spectrum in payload["spectra"].values() if "spectra" in fields else ():
            _check_spectrum(spectrum)
        if "layers" in fields:
            _check_layers(payload["layers"])
    except ValueError as error:
        raise PayloadError(one_line(error)) from error
    return payload


def _check_spectrum(spectrum: Any) -> None:
    check_fields(spectrum, SPECTRUM_FIELDS, "a spectrum")
    for name, words in (("weights", "weights"), ("left", "distances to the left"), ("right", "distances to the right")):
        if len(spectrum[name]) != len(spectrum["nodes"]):
            msg = f"a spectrum has {len(spectrum['nodes'])} nodes and {len(spectrum[name])} {words}."
            raise ValueError(msg)
    band, lines = (spectrum[name] or {} for name in ("cumulative_band", "losses_along"))
    if band and not len(band["points"]) == len(band["low"]) == len(band["high"]):
        msg = "the lists of `cumulative_band` of a spectrum have several lengths."
        raise ValueError(msg)
    if lines and any(len(lines[key]["distances"]) != len(lines[key]["losses"]) for key in ("lambda_min", "lambda_max")):
        msg = "the lists of `losses_along` of a spectrum have several lengths."
        raise ValueError(msg)


def _check_layers(layers: Any) -> None:
    known = [key for key in (*LAYER_SCALARS, *SHOWN_OF_CURVATURE) if key in layers]
    check_fields(layers, {"name": each_of(str), **dict.fromkeys(known, each_of(int, float, NoneType))}, "`layers`")
    if any(len(layers[key]) != len(layers["name"]) for key in known):
        msg = "the lists of `layers` have several lengths."
        raise ValueError(msg)
