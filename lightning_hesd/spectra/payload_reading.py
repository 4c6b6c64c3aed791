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
    from lightning_hesd.spectra.validation import Check, Fields


class PayloadError(ValueError):
    """A payload cannot be read; the message says why."""


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
    "scores": each_named(optional(number)),
    "layers": of(dict),
}
SPECTRUM_FIELDS: Fields = {
    "nodes": each_of(int, float),
    "weights": each_of(int, float),
    "lambda_min": number,
    "lambda_max": number,
    **dict.fromkeys(("sigma", "loss", "c_t", "c_t_low", "c_t_high"), optional(number)),
    "type": optional(text),
}
LINE_FIELDS: Fields = {"distances": each_of(int, float), "losses": each_of(int, float, NoneType)}
LATER_FIELDS: Fields = {
    **dict.fromkeys(("left", "right"), optional(each_of(int, float))),
    **dict.fromkeys(("lambda_min_error", "lambda_max_error", "trace_error"), optional(number)),
    **dict.fromkeys(("matrix", "sampling_reason"), optional(text)),
    "cumulative_band": optional(having(dict.fromkeys(("points", "low", "high"), each_of(int, float)))),
    "losses_along": optional(having(dict.fromkeys(("lambda_min", "lambda_max"), having(LINE_FIELDS)))),
}
"""Fields that spectra of earlier releases lack."""

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
}
"""Checks of the fields that readers rely on."""

FINDING_FIELDS: Fields = dict.fromkeys(("key", "title", "evidence", "confidence", "action"), text)

REFERENCE_FIELDS: Fields = {
    "among": text,
    "reason": optional(text),
    "source": text,
    "quantities": each(having(dict.fromkeys(("key", "title", "value", "usual", "seen", "answer"), text))),
}
"""Fields of a comparison with the reference range; a record without one has none of them."""

LATER: tuple[tuple[Fields, str, type, Check], ...] = (
    *((RECORD_FIELDS, field, dict, each_named(optional(number))) for field in ("metrics", "gradients")),
    (RECORD_FIELDS, "findings", list, each(having(FINDING_FIELDS))),
    (RECORD_FIELDS, "reference", dict, lambda value: value == {} or having(REFERENCE_FIELDS)(value)),
    (SELECTION_FIELDS, "rivals", list, each(integer)),
)
"""Fields that payloads of earlier releases lack, empty then, with their types and checks."""


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
        if fields is RECORD_FIELDS:
            payload["layers"] = _by_quantity(payload.get("layers"))
        check_fields(payload, fields, "the payload")
        for others, name, kind, check in LATER:
            if fields is others:
                payload.setdefault(name, kind())
                check_fields(payload, {name: check}, "the payload")
        for spectrum in payload["spectra"].values() if "spectra" in fields else ():
            _check_spectrum(spectrum)
        if "layers" in fields:
            _check_layers(payload["layers"])
    except ValueError as error:
        raise PayloadError(one_line(error)) from error
    return payload


def _check_spectrum(spectrum: Any) -> None:
    check_fields(spectrum, SPECTRUM_FIELDS, "a spectrum")
    check_fields({**dict.fromkeys(LATER_FIELDS), **spectrum}, LATER_FIELDS, "a spectrum")
    if len(spectrum["nodes"]) != len(spectrum["weights"]):
        msg = f"a spectrum has {len(spectrum['nodes'])} nodes and {len(spectrum['weights'])} weights."
        raise ValueError(msg)
    for side in ("left", "right"):
        if spectrum.get(side) is not None and len(spectrum[side]) != len(spectrum["nodes"]):
            msg = f"a spectrum has {len(spectrum['nodes'])} nodes and {len(spectrum[side])} distances to the {side}."
            raise ValueError(msg)
    if len({len(values) for values in (spectrum.get("cumulative_band") or {}).values()}) > 1:
        msg = "the lists of `cumulative_band` of a spectrum have several lengths."
        raise ValueError(msg)
    lines = [(spectrum.get("losses_along") or {}).get(key) for key in ("lambda_min", "lambda_max")]
    if any(line and len(line["distances"]) != len(line["losses"]) for line in lines):
        msg = "the lists of `losses_along` of a spectrum have several lengths."
        raise ValueError(msg)


def _by_quantity(layers: Any) -> Any:
    """Return the numbers of layers by quantity; payloads of earlier releases list them by layer."""
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return layers
    return {key: [layer.get(key) for layer in layers] for key in {"name", *(key for layer in layers for key in layer)}}


def _check_layers(layers: Any) -> None:
    known = [key for key in (*LAYER_SCALARS, *SHOWN_OF_CURVATURE) if key in layers]
    check_fields(layers, {"name": each_of(str), **dict.fromkeys(known, each_of(int, float, NoneType))}, "`layers`")
    if any(len(layers[key]) != len(layers["name"]) for key in known):
        msg = "the lists of `layers` have several lengths."
        raise ValueError(msg)
