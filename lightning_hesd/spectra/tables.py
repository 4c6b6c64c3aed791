"""The records of a run as pandas tables. Pandas is imported when a table is asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.record import SUFFIXES
from lightning_hesd.spectra.scalars import (
    LAYER_SCALARS,
    RECORD_SCALARS,
    SPECTRUM_SCALARS,
    data_of_record,
    data_of_spectrum,
    shown_in,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from lightning_hesd.spectra.record import SpectrumRecord

TEXT, TRUTH, COUNT, NUMBER = "string", "boolean", "Int64", "float64"
"""Kinds of columns; the first three are pandas' own, which know missing values."""


def records_table(records: Sequence[SpectrumRecord]) -> pd.DataFrame:
    """Return a table with a row for each record: see `SpectrumHistory.to_dataframe`.

    Raises:
        ImportError: If pandas is not installed.
    """
    of_spectrum = dict.fromkeys((scalar.key for scalar in shown_in("data", SPECTRUM_SCALARS)), NUMBER)
    columns = {
        "epoch": "int64",
        "global_step": "int64",
        **of_spectrum,
        "hesd_type": TEXT,
        "type_certain": TRUTH,
        "verified": TEXT,
        "steps": COUNT,
        "num_samples": COUNT,
    }
    for suffix in filter(None, SUFFIXES.values()):
        if any(suffix in record.spectra for record in records):
            columns |= {f"{suffix[1:]}_{key}": kind for key, kind in of_spectrum.items()}
    for scalar in RECORD_SCALARS.values():
        if any(scalar.value(record) is not None for record in records):
            if scalar.key == "verdict":
                columns["verdict"] = TEXT
            elif "data" in scalar.shown:
                columns[scalar.key] = NUMBER
    columns |= {f"metric_{key}": NUMBER for key in sorted({key for record in records for key in record.metrics})}
    columns["error"] = TEXT
    return _table([_row(record) for record in records], columns)


def layers_table(records: Sequence[SpectrumRecord]) -> pd.DataFrame:
    """Return a table with a row for each layer of each record: see `SpectrumHistory.layers_to_dataframe`.

    Raises:
        ImportError: If pandas is not installed.
    """
    columns = {"epoch": "int64", "global_step": "int64", "layer": TEXT, **dict.fromkeys(LAYER_SCALARS, NUMBER)}
    rows = [
        {"epoch": record.epoch, "global_step": record.global_step, "layer": layer}
        | {key: scalar.of(found) for key, scalar in LAYER_SCALARS.items()}
        for record in records
        for layer, found in record.layer_indicators.items()
    ]
    return _table(rows, columns)


def _row(record: SpectrumRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": record.epoch, "global_step": record.global_step, "error": record.error}
    for suffix, spectrum in record.spectra.items():
        row |= data_of_spectrum(spectrum, prefix=f"{suffix[1:]}_" if suffix else "")
    row |= data_of_record(record)
    row |= {f"metric_{key}": value for key, value in record.metrics.items()}
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
            name: pandas.Series([row.get(name, math.nan if kind == NUMBER else None) for row in rows], dtype=kind)
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
