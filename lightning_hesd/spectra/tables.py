"""The records of a run as tables of pandas, which is imported when it is asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.indicators import LayerIndicators, layer_indicators
from lightning_hesd.spectra.record import SUFFIXES
from lightning_hesd.spectra.scalars import SPECTRUM_SCALARS, comparison_scalars, spectrum_scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from lightning_hesd.spectra.record import SpectrumRecord

TEXT, TRUTH, COUNT = "string", "boolean", "Int64"
"""Kinds of columns that know missing values, where those of NumPy do not."""

SCALARS = {key: "float64" for key in SPECTRUM_SCALARS if key not in {"mp", "verified"}}  # texts say these
MAIN = {
    "epoch": "int64",
    "global_step": "int64",
    **SCALARS,
    "hesd_type": TEXT,
    "type_certain": TRUTH,
    "verified": TEXT,
    "steps": COUNT,
    "num_samples": COUNT,
}
COMPARISON = {"delta_r_e": "float64", "delta_k_h05": "float64", "verdict": TEXT}


def records_table(records: Sequence[SpectrumRecord]) -> pd.DataFrame:
    """Return a row for each record: see `SpectrumHistory.to_dataframe`.

    Raises:
        ImportError: If pandas is not installed.
    """
    columns = dict(MAIN)
    for suffix in filter(None, SUFFIXES.values()):
        if any(suffix in record.spectra for record in records):
            columns |= {f"{suffix[1:]}_{key}": kind for key, kind in SCALARS.items()}
    if any(record.generalization for record in records):
        columns |= COMPARISON
    if any(record.stability_ratio is not None for record in records):
        columns["stability_ratio"] = "float64"
    columns["error"] = TEXT
    return _table([_row(record) for record in records], columns)


def layers_table(records: Sequence[SpectrumRecord]) -> pd.DataFrame:
    """Return a row for each layer of each record: see `SpectrumHistory.layers_to_dataframe`.

    Raises:
        ImportError: If pandas is not installed.
    """
    columns = {"epoch": "int64", "global_step": "int64", "layer": TEXT}
    columns |= {field.name: "float64" for field in fields(LayerIndicators)}
    rows = [
        {"epoch": record.epoch, "global_step": record.global_step, "layer": layer, **asdict(found)}
        for record in records
        for layer, found in layer_indicators(record.layers or {}).items()
    ]
    return _table(rows, columns)


def _row(record: SpectrumRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": record.epoch, "global_step": record.global_step, "error": record.error}
    for suffix, spectrum in record.spectra.items():
        prefix = f"{suffix[1:]}_" if suffix else ""
        row |= {f"{prefix}{key}": value for key, value in spectrum_scalars(spectrum).items()}
    row |= comparison_scalars(record)
    if record.assessment is not None:
        row["verdict"] = record.assessment.verdict
    if record.spectrum is not None:
        row |= {key: getattr(record.spectrum, key) for key in ("hesd_type", "verified", "steps", "num_samples")}
        row["type_certain"] = None if record.spectrum.hesd_type is None else record.spectrum.type_certain
    return row


def _table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    pandas = _pandas()
    return pandas.DataFrame(
        {
            name: pandas.Series([row.get(name, math.nan if kind == "float64" else None) for row in rows], dtype=kind)
            for name, kind in columns.items()
        }
    )


def _pandas() -> Any:
    try:
        import pandas  # noqa: ICN001, PLC0415 - optional, and slow to import
    except ImportError as error:
        msg = "tables of a history need pandas, which is not installed: pip install pandas"
        raise ImportError(msg) from error
    return pandas
