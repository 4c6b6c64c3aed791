"""`judge`: find out which checkpoint rule would have picked the best checkpoint in given runs, and how surely."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.judgment.candidates import (
    LOWEST_VALIDATION_LOSS,
    REFERENCES,
    VALIDATION_METRIC,
    PickSettings,
    run_picks,
)
from lightning_hesd.judgment.judgment import Judgment
from lightning_hesd.judgment.metric import VALIDATION, Metric, logged_names, logged_values, words
from lightning_hesd.judgment.metric_file import values_in_file
from lightning_hesd.judgment.runs import read_runs, runs_of_payloads
from lightning_hesd.judgment.statistics import LEVEL, check_level
from lightning_hesd.spectra.rules import RULES

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from lightning_hesd.judgment.candidates import Candidates, RunPicks
    from lightning_hesd.judgment.runs import Histories, Run


def judge(
    histories: Histories,
    metric: str,
    *,
    mode: Literal["max", "min"] | None = None,
    candidates: Candidates = "near",
    metrics: str | os.PathLike[str] | None = None,
    rules: Sequence[str] | None = None,
    val_loss: str | None = None,
    val_metric: str | None = None,
    level: float = LEVEL,
    name: str = "hesd",
) -> Judgment:
    """Compare the checkpoint rules by what their picks were worth in given runs.

    Each rule picks among the candidates of a run, each baseline among all its analyzed epochs; the start of training is
    never picked. Differences to the last epoch and to the lowest validation loss are paired within runs. Runs must be
    independent of each other, for example of different seeds. See the section "Comparing rules" of the theory.

    Args:
        histories: Runs: SpectrumHistory objects, lists of records, or log directories, in a list or by name in a
            mapping; or one of these. A folder without a history stands for all runs below it. A run that is given more
            than once counts once.
        metric: Name of the metric by which picks are judged, as it was logged or as in the file of `metrics`.
        mode: "max" if a higher metric is better, "min" if a lower one is; None: "min" if its name says loss or error.
        candidates: "near": as those of HessianCheckpoint: MP spectra with a loss over the analysis samples within 5 %
            of its drop of the lowest one. A number: within that of the lowest one. "all": all analyzed epochs.
        metrics: A CSV file with values of the metric that were computed later: columns `run` (name or end of the path),
            `epoch` or `global_step`, and the metric's name.
        rules: Names of the rules to compare with the baselines; None: all. Fewer rules need less correction: choose
            before you look.
        val_loss: Name of the logged validation loss of the baseline; None: the usual names, such as "val_loss".
        val_metric: Name of another logged metric that a baseline picks by, such as the validation accuracy if the
            metric is the test accuracy.
        level: Probability that any rule is called evidently better or worse although none is.
        name: The callback's `name`, for log directories.

    Raises:
        FileNotFoundError: If a folder has no history.
        ValueError: If no run has the metric, or an argument is invalid.
        TypeError: If `histories` are no runs.

    Example:
        >>> print(judge("lightning_logs", "val_acc"))  # doctest: +SKIP
        ...
        Over 12 runs no rule is evidently better than the last epoch; the largest gain,
        highest C_t, is +0.4 points [-0.3, +1.1].
    """
    judged_by = Metric.of(metric, mode)
    _check(candidates, rules)
    check_level(level)
    runs, repeated = read_runs(histories, name)
    values, notes = _values(runs, judged_by, metrics)
    if repeated:
        notes.append(f"Left out, as they repeat an earlier run: {_shortened(repeated)}.")
    _check_logged(runs, {"val_loss": val_loss, "val_metric": val_metric})
    picked_by = None if val_metric is None else Metric.of(val_metric, None)
    settings = PickSettings(judged_by, candidates, _with_baselines(rules), val_loss, picked_by)
    return _judgment(runs, values, settings, level, notes)


def judge_payloads(payloads: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> Judgment:
    """Compare the checkpoint rules as `judge` does by default, in runs whose records are given as payloads.

    Args:
        payloads: Payloads of records in the order of training, by name of the run.
        metric: Name of the logged metric by which picks are judged.

    Raises:
        ValueError: If no run has the metric.
    """
    judged_by = Metric.of(metric, None)
    runs = runs_of_payloads(payloads)
    values, notes = _values(runs, judged_by, None)
    return _judgment(runs, values, PickSettings(judged_by, "near", _with_baselines(None)), LEVEL, notes)


def _with_baselines(rules: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the rules to compare, all if None, and then of the baselines."""
    baselines = [rule for rule in RULES if RULES[rule].is_baseline]
    return (*(_compared_rules() if rules is None else rules), *baselines)


def _compared_rules() -> list[str]:
    return [rule for rule in RULES if not RULES[rule].is_baseline]


def _judgment(
    runs: Mapping[str, Run],
    values: Mapping[str, Sequence[float]],
    settings: PickSettings,
    level: float,
    notes: Sequence[str],
) -> Judgment:
    """Return the judgment of runs.

    Args:
        runs: The runs by name.
        values: The metric of each state of each run; NaN: not known.
        settings: Which rules and baselines pick, and among which states.
        level: As for `judge`.
        notes: Notes on the values.

    Raises:
        ValueError: If no state of trained weights has the metric.
    """
    found = [run_picks(run, runs[run].states, values[run], settings) for run in runs]
    picked = [run for run in found if run.judged]
    if not picked:
        msg = f"{settings.metric.name} is known before the first step only: there are no trained weights to judge."
        raise ValueError(msg)
    titles = {rule: RULES[rule].title for rule in settings.rules} | REFERENCES
    if settings.val_metric is not None:
        titles[VALIDATION_METRIC] = f"best {settings.val_metric.name}"
    present = {choice: title for choice, title in titles.items() if any(choice in run.picks for run in picked)}
    ranked = tuple(rule for rule in settings.rules if rule in present and not RULES[rule].is_baseline)
    every_note = (*notes, *_notes(runs, picked, settings))
    return Judgment(settings.metric, settings.candidates, level, tuple(picked), present, ranked, every_note)


def _check(candidates: Candidates, rules: Sequence[str] | None) -> None:
    """Check arguments before anything is read.

    Raises:
        ValueError: If one is invalid.
    """
    if isinstance(candidates, str) and candidates not in {"near", "all"}:
        msg = f"`candidates` must be 'near', 'all' or a tolerance of the loss, got {candidates!r}."
        raise ValueError(msg)
    if not isinstance(candidates, str) and not candidates >= 0:
        msg = f"`candidates` must be a tolerance of the loss of at least 0, 'near' or 'all'; got {candidates}."
        raise ValueError(msg)
    known = _compared_rules()
    unknown = next((rule for rule in rules or () if rule not in known), None)
    if unknown is not None or (rules is not None and len(rules) == 0):
        msg = f"`rules` must be names of rules, got {unknown!r}: there are {', '.join(known)}."
        raise ValueError(msg)


def _values(
    runs: Mapping[str, Run], metric: Metric, path: str | os.PathLike[str] | None
) -> tuple[dict[str, list[float]], list[str]]:
    """Return the metric of every state by run, and notes.

    Raises:
        ValueError: If no state has it.
    """
    if path is not None:
        values, others = values_in_file(path, metric, runs)
        if all(math.isnan(value) for of_run in values.values() for value in of_run):
            msg = (
                f"no row of {path} has a value for an analyzed checkpoint of these runs ({_shortened(list(runs))}): "
                "its columns must have the names of the runs, and the epochs or steps of their analyses."
            )
            raise ValueError(msg)
        plural = "row of the file belongs" if others == 1 else "rows of the file belong"
        return values, [f"{others} {plural} to no analyzed checkpoint."] if others else []
    every = [state for run in runs.values() for state in run.states]
    names = logged_names(every)
    if not names:
        msg = (
            "the records of these runs have no metrics: either they were made before lightning_hesd kept metrics, or "
            f"the module logs none. Train again with `self.log({metric.name!r}, ...)`, or give the values in a CSV "
            "file: `metrics` in Python, --metrics-csv on the command line."
        )
        raise ValueError(msg)
    if metric.name not in names:
        msg = f"no record of these runs has the metric {metric.name!r}: they have {', '.join(names)}."
        raise ValueError(msg)
    return {name: logged_values(run.states, metric.name) for name, run in runs.items()}, []


def _check_logged(runs: Mapping[str, Run], arguments: Mapping[str, str | None]) -> None:
    """Check the names of logged metrics, by argument; None: there is none.

    Raises:
        ValueError: If no record has such a metric.
    """
    names = logged_names(state for run in runs.values() for state in run.states)
    for argument, given in arguments.items():
        if given is not None and given not in names:
            found = ", ".join(names) or "no metrics"
            msg = f"`{argument}`: no record of these runs has the metric {given!r}: they have {found}."
            raise ValueError(msg)


def _notes(runs: Mapping[str, Run], picked: Sequence[RunPicks], settings: PickSettings) -> list[str]:
    """Return notes on runs, records and rules that are left out, and on data that serve twice."""
    metric, found = settings.metric.name, {name for run in picked for name in run.picks}
    mean = sum(run.candidates for run in picked) / len(picked)
    kind = "all analyzed epochs" if settings.candidates == "all" else "MP, and a loss near the lowest"
    notes = [f"Candidates of the rules: {kind}; {mean:.3g} {'epochs' if mean != 1 else 'epoch'} per run."]
    if words(metric) & VALIDATION and any(LOWEST_VALIDATION_LOSS in run.picks for run in picked):
        notes.append(f"The validation loss and {metric} seem to be of the same data, which favors picks by that loss.")
    if left_out := [name for name in runs if name not in {run.run for run in picked}]:
        notes.append(f"Left out, without the metric: {_shortened(left_out)}.")
    if unjudged := sum(run.trained - run.judged for run in picked):
        trained = sum(run.trained for run in picked)
        notes.append(f"{unjudged} of {trained} analyses lack the metric, and are not picked.")
    if fallbacks := sum(run.is_fallback for run in picked):
        notes.append(f"In {fallbacks} of {len(picked)} runs no candidate is MP: there all rules pick the lowest loss.")
    if len(picked) == 1:
        notes += [
            f"Within two standard errors of the pick of {RULES[name].title}: epochs {', '.join(map(str, epochs))}."
            for name, epochs in picked[0].rivals.items()
        ]
    if without := [RULES[rule].title for rule in settings.rules if rule not in found]:
        notes.append(f"Without a pick, as no record has the spectra or metrics they need: {', '.join(without)}.")
    return notes


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
