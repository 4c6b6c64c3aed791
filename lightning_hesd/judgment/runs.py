"""The runs to be judged: their names and their analyzed states."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lightning_hesd.spectra.analyzed_state import AnalyzedState, analyzed_states
from lightning_hesd.spectra.record import SpectrumRecord

if TYPE_CHECKING:
    from typing import Any

    History: TypeAlias = Sequence[SpectrumRecord] | str | os.PathLike[str]
    Histories: TypeAlias = Mapping[str, History] | Iterable[History] | History

EXPECTED = (
    "`histories` must be runs: SpectrumHistory objects, lists of records, or log directories, in a list or by name in "
    "a mapping; got {!r:.80}."
)


@dataclass(frozen=True)
class Run:
    """A run to be judged.

    Attributes:
        parts: Parts of its path; of a run without a path, its name.
        states: Its states in the order of training.
    """

    parts: tuple[str, ...]
    states: Sequence[AnalyzedState]

    def is_called(self, name: str) -> bool:
        """Return whether a name is that of the run, or the end of its path."""
        parts = Path(name).parts
        return parts == self.parts[-len(parts) :] if parts else False


def read_runs(histories: Histories, callback: str) -> tuple[dict[str, Run], list[str]]:
    """Return runs by name, each once, and the names of those left out because they repeat an earlier one.

    The names are the keys of a mapping, the ends of paths, or else "run 1", "run 2", ...

    Args:
        histories: Histories, or log directories of runs; a folder without a history stands for all runs below it.
        callback: The callback's `name`, which is that of the folder of the history in a log directory.

    Raises:
        FileNotFoundError: If there is no history in a folder, nor below it.
        ValueError: If there are no runs, or if a history is damaged.
        TypeError: If the argument is none of these.
    """
    if isinstance(histories, Mapping):
        runs = {str(name): Run((str(name),), _states(history, callback)) for name, history in histories.items()}
    else:
        if isinstance(histories, Iterable) and not isinstance(histories, str | os.PathLike | Sequence):
            histories = list(histories)  # such as a generator
        is_one = isinstance(histories, str | os.PathLike) or _is_history(histories)
        if not (is_one or isinstance(histories, Sequence)):
            raise TypeError(EXPECTED.format(histories))
        runs = _named([histories] if is_one else histories, callback)  # type: ignore[list-item, arg-type]
    if not runs:
        msg = "there are no runs to judge: pass histories, or the log directories of runs with the callback."
        raise ValueError(msg)
    return _each_once(runs)


def _each_once(runs: Mapping[str, Run]) -> tuple[dict[str, Run], list[str]]:
    """Return the runs without those that have the very records of an earlier one, and the names of these."""
    first: dict[tuple[int, ...], str] = {}
    for name, run in runs.items():
        first.setdefault(tuple(id(state.record) for state in run.states), name)
    kept = {name: runs[name] for name in first.values()}
    return kept, [name for name in runs if name not in kept]


def runs_of_payloads(payloads: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Run]:
    """Return runs from the payloads of their records, by name."""
    return {name: Run((name,), list(map(AnalyzedState.of_payload, of_run))) for name, of_run in payloads.items()}


def _named(histories: Sequence[History], callback: str) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    folders: dict[str, None] = {}  # in the order given; a run that is given twice counts once
    for position, history in enumerate(histories, start=1):
        if isinstance(history, str | os.PathLike):
            folders |= dict.fromkeys(run_folders(history, callback))
        else:
            runs[f"run {position}"] = Run((f"run {position}",), _states(history, callback))
    for name, folder in zip(short_names(list(folders)), folders, strict=True):
        runs[name] = Run(Path(folder).parts, _states(folder, callback))
    return runs


def run_folders(location: str | os.PathLike[str], callback: str) -> list[str]:
    """Return the log directories of the runs in a folder; the folder itself if there are none, or if it is remote."""
    from lightning_hesd.training.folders import exists, joined  # noqa: PLC0415 - imports Lightning
    from lightning_hesd.training.history_folder import INDEX_NAME  # noqa: PLC0415

    if "://" in str(location):
        return [str(location)]
    folder = Path(location).resolve()
    if exists(joined(folder, callback, INDEX_NAME)):
        return [str(folder)]
    if exists(joined(folder, INDEX_NAME)):
        return [str(folder.parent if folder.name == callback else folder)]
    below = sorted((str(index.parents[1]) for index in folder.rglob(f"{callback}/{INDEX_NAME}")), key=_in_order)
    return below or [str(folder)]  # to read it says what is missing


def _in_order(path: str) -> list[tuple[int, str]]:
    """Return the key of an order in which version_2 comes before version_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def _states(history: History, callback: str) -> list[AnalyzedState]:
    if not isinstance(history, str | os.PathLike):
        if not isinstance(history, Iterable):
            raise TypeError(EXPECTED.format(history))
        records = list(history)
        if wrong := [record for record in records if not isinstance(record, SpectrumRecord)]:
            raise TypeError(EXPECTED.format(wrong[0]))
        return analyzed_states(records)
    from lightning_hesd.training.history import SpectrumHistory  # noqa: PLC0415 - imports torch

    return analyzed_states(SpectrumHistory.load(history, callback))


def _is_history(histories: object) -> bool:
    return isinstance(histories, Sequence) and len(histories) > 0 and isinstance(histories[0], SpectrumRecord)


def short_names(folders: Sequence[str]) -> list[str]:
    """Return the ends of paths, as short as they are distinct."""
    parts = [Path(folder).parts for folder in folders]
    # Lightning numbers the folders of runs: the folder around has the name.
    shortest = 2 if any(path[-1].startswith("version_") for path in parts) else 1
    for length in range(shortest, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(folders)
