"""Records and selection events as JSON, for TensorBoard's HESD tab and the report. See docs/tensorboard-plugin.md.

A record takes a few kilobytes. Undefined numbers are null, because JSON knows no NaN.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.spectra import criteria
from lightning_hesd.spectra.quadrature import legible_sigma
from lightning_hesd.spectra.record import SUFFIXES
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.scalars import LAYER_SCALARS, data_of_record, data_of_spectrum
from lightning_hesd.spectra.validation import FORMAT_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_hesd.spectra.findings import Finding
    from lightning_hesd.spectra.layer_curvature import LayerCurvature
    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.reference_range import ReferenceComparison
    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.spectra.spectrum import Spectrum

PLUGIN_NAME = "hesd"
RECORD = "record"
SELECTION = "selection"
"""Ends of tags: <name>/record, and <name>/selection/... for each checkpoint callback."""

SELECTIONS_NAME = "selections.jsonl"
"""File of the payloads of selection events in the folder of a history, one in each line."""

MAX_NODES = 256
"""Largest number of nodes of a spectrum; of more, neighbors are merged."""

MAX_POINTS = 256
"""Largest number of points of the band of a cumulative distribution; with fewer than it has, the band is wider."""

DIGITS = 7
"""Significant digits of numbers."""

LAYER_DIGITS = 4
"""Significant digits of numbers of layers: as many as the tab writes, since a record may have hundreds of layers."""

SHOWN_FIELDS = (
    *("type_certain", "verified", "verification", "rounding", "num_samples", "dimension", "steps_per_probe"),
    *("matvecs", "confidence", "reason", "sampling_reason", "matrix"),
    *("lambda_min_error", "lambda_max_error", "trace_error"),
)
"""Fields and properties of a spectrum that stand in its payload under the same name."""

SHOWN_OF_CURVATURE: dict[str, Callable[[LayerCurvature], float]] = {
    "dimension": lambda layer: layer.dimension,
    "trace_error": lambda layer: layer.trace_error,
    "lambda_max_low": lambda layer: layer.lambda_max_bounds[0],
    "lambda_max_high": lambda layer: layer.lambda_max_bounds[1],
    "lambda_min_low": lambda layer: layer.lambda_min_bounds[0],
    "lambda_min_high": lambda layer: layer.lambda_min_bounds[1],
}
"""What the payload of layers has of `LayerCurvature`, beyond the scalars of layers."""

THRESHOLDS = {
    "c_t": criteria.MP_THRESHOLD,
    "delta_r_e": criteria.DELTA_R_E_THRESHOLD,
    "delta_k_h05": criteria.DELTA_K_H05_THRESHOLD,
}


def record_payload(
    record: SpectrumRecord, found: Sequence[Finding] = (), compared: ReferenceComparison | None = None
) -> dict[str, Any]:
    """Return a record as JSON values, with the findings of its run as of then, and how it compares with others."""
    spectra = {field: getattr(record, field) for field in SUFFIXES}
    scores = {name: rule.score(record) for name, rule in RULES.items()}
    values = {
        "version": FORMAT_VERSION,
        "epoch": record.epoch,
        "global_step": record.global_step,
        "error": record.error,
        "spectra": {field: _spectrum(found) for field, found in spectra.items() if found is not None},
        "thresholds": THRESHOLDS,
        "assessment": None if record.assessment is None else asdict(record.assessment),
        **data_of_record(record),
        "metrics": dict(record.metrics),
        "gradients": dict(record.gradients),
        "scores": {name: score for name, score in scores.items() if not math.isnan(score)},
        "layers": _layers(record),
        "findings": [asdict(finding) for finding in found],
        "reference": {} if compared is None else compared.to_dict(),
    }
    return _plain(values)  # type: ignore[no-any-return]


def selection_payload(selection: SelectionEvent) -> dict[str, Any]:
    """Return a selection event as JSON values."""
    latest, pick = selection.latest, selection.pick
    sign = 1.0 if selection.train_metric_mode == "max" else -1.0
    values = {
        "version": FORMAT_VERSION,
        "key": selection.key,
        "rule": selection.rule,
        "train_metric": selection.train_metric,
        "train_metric_mode": selection.train_metric_mode,
        "tolerance": selection.filter.tolerance,
        "is_relative": selection.is_relative,
        "require_mp": selection.filter.require_mp,
        "epoch": latest.epoch,
        "global_step": latest.global_step,
        "metric": sign * latest.score,
        "criterion": latest.criterion,
        "mainly_positive": latest.mainly_positive,
        "pick": pick and {"epoch": pick.epoch, "global_step": pick.global_step, "path": pick.path},
        "rivals": list(selection.rivals),
    }
    return _plain(values)  # type: ignore[no-any-return]


def to_json(payload: Mapping[str, Any]) -> str:
    """Return the text of a payload."""
    return json.dumps(payload, separators=(",", ":"), allow_nan=False)


def _spectrum(spectrum: Spectrum) -> dict[str, Any]:
    return {
        **data_of_spectrum(spectrum),
        "type": spectrum.hesd_type,
        **{field: getattr(spectrum, field) for field in SHOWN_FIELDS},
        "sigma": legible_sigma(spectrum.lambda_min, spectrum.lambda_max),
        **_distribution(spectrum),
        "cumulative_band": None if spectrum.verified == "no" else _band(spectrum),
        "losses_along": _losses_along(spectrum),
    }


def _losses_along(spectrum: Spectrum) -> dict[str, Any] | None:
    if not spectrum.losses_along.size:
        return None
    pairs = zip(("lambda_min", "lambda_max"), spectrum.losses_along.tolist(), strict=True)
    return {key: {"distances": distances, "losses": losses} for key, (distances, losses) in pairs}


def _layers(record: SpectrumRecord) -> dict[str, list[Any]]:
    """Return the names of the layers, and the values that each quantity has of them; without those that have none."""
    indicators = record.layer_indicators
    columns = {key: [scalar.of(layer) for layer in indicators.values()] for key, scalar in LAYER_SCALARS.items()}
    # What the spectrum of the network tells of its layers is of use where these have no spectra of their own.
    if record.spectrum is not None and not record.layers:
        curvatures = record.spectrum.by_layer.values()
        columns |= {key: [value_of(layer) for layer in curvatures] for key, value_of in SHOWN_OF_CURVATURE.items()}
    plain = {key: _plain(values, LAYER_DIGITS) for key, values in columns.items()}
    known = {key: values for key, values in plain.items() if any(value is not None for value in values)}
    return {"name": list(indicators), **known}


def _band(spectrum: Spectrum) -> dict[str, Any]:
    """Return points, and bounds on the number of eigenvalues up to each that hold until the next one."""
    points, *shares = spectrum.cumulative_band
    low, high = np.rint(spectrum.dimension * np.array(shares)).astype(int)
    changes = np.flatnonzero((np.diff(low) > 0) | (np.diff(high) > 0)) + 1
    kept = np.unique([0, *changes, len(points) - 1])
    kept = kept[np.linspace(0, len(kept) - 1, min(len(kept), MAX_POINTS)).round().astype(int)]
    lasts = np.append(kept[1:], len(points)) - 1
    return {"points": points[kept].tolist(), "low": low[kept].tolist(), "high": high[lasts].tolist()}


def _distribution(spectrum: Spectrum) -> dict[str, list[float]]:
    """Return the fields of the distribution, for nodes in ascending order, at most `MAX_NODES`.

    If there are more, those between the extremes are put into bins of equal width in asinh λ, which is fine near zero,
    where most nodes are, and coarse far out; each bin becomes a node at its center of mass, with the mean cell.
    """
    fields = asdict(spectrum.distribution)
    order = np.argsort(fields["nodes"])
    fields = {name: values[order] for name, values in fields.items()}
    nodes, weights = fields["nodes"], fields["weights"]
    if len(nodes) > MAX_NODES:
        scale = float(np.abs(nodes).max()) / 1e4 or 1.0
        place = np.arcsinh(nodes[1:-1] / scale)
        edges = np.linspace(place[0], place[-1], MAX_NODES - 1)
        bins = np.searchsorted(edges, place, side="right").clip(1, MAX_NODES - 2) - 1
        mass = np.bincount(bins, weights[1:-1], MAX_NODES - 2)
        filled = mass > 0
        for name, values in fields.items():
            sums = np.bincount(bins, weights[1:-1] * values[1:-1], MAX_NODES - 2)[filled]
            inner = mass[filled] if name == "weights" else sums / mass[filled]
            fields[name] = np.concatenate([values[:1], inner, values[-1:]])
    return {name: values.tolist() for name, values in fields.items()}


def _plain(value: Any, digits: int = DIGITS) -> Any:
    """Return the value with rounded numbers, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, digits) for entry in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
