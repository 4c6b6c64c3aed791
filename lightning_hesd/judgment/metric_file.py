"""Metrics of checkpoints that were computed after training, from a CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hesd.judgment.metric import finite_or_nan

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from lightning_hesd.judgment.metric import Metric
    from lightning_hesd.judgment.runs import Run
    from lightning_hesd.spectra.analyzed_state import AnalyzedState

RUN_COLUMN, STEP_COLUMN, EPOCH_COLUMN = "run", "global_step", "epoch"


def values_in_file(
    path: str | os.PathLike[str], metric: Metric, runs: Mapping[str, Run]
) -> tuple[dict[str, list[float]], int]:
    """Return the values of a metric in a CSV file for every state, by run, and the number of rows of no state.

    The columns are `run` (the name of the run, or the end of its path; not needed for one run), `global_step` or
    `epoch`, and one named as the metric.

    Args:
        path: The file.
        metric: The metric.
        runs: The runs by name.

    Returns:
        A value for each state of each run, NaN where the file has none; and how many rows belong to no state.

    Raises:
        ValueError: If it is no CSV file in UTF-8, a column is missing, a cell is no number, or a row is ambiguous.
    """
    try:
        return _values_in_file(path, metric, runs)
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} cannot be read ({error}): it must be text in UTF-8, with commas between columns."
        raise ValueError(msg) from error


def _values_in_file(
    path: str | os.PathLike[str], metric: Metric, runs: Mapping[str, Run]
) -> tuple[dict[str, list[float]], int]:
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        key = STEP_COLUMN if STEP_COLUMN in columns else EPOCH_COLUMN
        needed = [*([RUN_COLUMN] if len(runs) > 1 else []), key, metric.name]
        if missing := [column for column in needed if column not in columns]:
            msg = f"{path} has no column {missing[0]!r}: it has {', '.join(columns) or 'no columns'}."
            raise ValueError(msg)
        values = {name: [math.nan] * len(run.states) for name, run in runs.items()}
        places = {name: _places(run.states, key) for name, run in runs.items()}
        others = 0
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                msg = f"{where} has more cells than columns; decimals are written with a point."
                raise ValueError(msg)
            value = _number(row[metric.name], where)
            name = _run_called(row.get(RUN_COLUMN), runs, where)
            if math.isnan(value):
                continue
            found = [] if name is None else places[name].get(_whole_number(row[key], where), [])
            if name is None or not found:
                others += 1
                continue
            if len(found) > 1:
                msg = (
                    f"{where}: epoch {row[key]} of the run {name} has {len(found)} records. Give the column "
                    f"{STEP_COLUMN!r}, which tells them apart."
                )
                raise ValueError(msg)
            if not math.isnan(values[name][found[0]]):
                msg = f"{where}: the run {name} has a value at this {key} already. Give one row for each record."
                raise ValueError(msg)
            values[name][found[0]] = value
    return values, others


def _places(states: Sequence[AnalyzedState], key: str) -> dict[float, list[int]]:
    """Return the positions of states by their epoch or their step."""
    places: dict[float, list[int]] = {}
    for place, state in enumerate(states):
        places.setdefault(getattr(state, key), []).append(place)
    return places


def _run_called(name: str | None, runs: Mapping[str, Run], where: str) -> str | None:
    """Return the run that a row of the file belongs to; None if it is none of these runs.

    Raises:
        ValueError: If it could be several of them.
    """
    if name is None:
        return next(iter(runs))
    if name in runs:
        return name
    found = [own for own, run in runs.items() if run.is_called(name)]
    if len(found) > 1:
        msg = f"{where}: the run {name!r} may be {' or '.join(found)}. Give more of its path."
        raise ValueError(msg)
    return found[0] if found else None


def _whole_number(cell: str | None, where: str) -> int:
    """Return the epoch or the step in a cell.

    Raises:
        ValueError: If the cell is no whole number.
    """
    value = _number(cell, where)
    if not value.is_integer():
        msg = f"{where}: {cell!r} is no whole number."
        raise ValueError(msg)
    return int(value)


def _number(cell: str | None, where: str) -> float:
    """Return the number in a cell; NaN if the cell is empty, or the number infinite.

    Raises:
        ValueError: If the cell is no number.
    """
    if cell is None or not cell.strip():
        return math.nan
    try:
        value = float(cell)
    except ValueError as error:
        msg = f"{where}: {cell!r} is no number."
        raise ValueError(msg) from error
    return finite_or_nan(value)
