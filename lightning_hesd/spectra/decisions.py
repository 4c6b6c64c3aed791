"""The decisions of all checkpoint rules in a run, from payloads: picks, candidates, and the reasons in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.analyzed_state import AnalyzedState
from lightning_hesd.spectra.rules import RULES, rule_title
from lightning_hesd.spectra.scalars import descriptions
from lightning_hesd.spectra.selection import LOSS_SHARE, Candidate, CandidateFilter, Ranking, rank_by_loss

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Payload = Mapping[str, Any]

LOSS = "loss over the analysis samples"


def rewound(payloads: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the payloads without those that a resumed run has made anew: the later payload holds."""
    kept: list[dict[str, Any]] = []
    for payload in payloads:
        while kept and kept[-1]["global_step"] >= payload["global_step"]:
            kept.pop()
        kept.append(payload)
    return kept


def run_payload(
    run: str, name: str, records: Sequence[Payload], selections: Sequence[Payload], problems: Sequence[str]
) -> dict[str, Any]:
    """Return the data of one run that the tab and the report show.

    Args:
        run: Name of the run.
        name: Name of the callback in the run.
        records: Payloads of records.
        selections: As for `decisions`.
        problems: Messages about payloads that could not be read.
    """
    return {
        "run": run,
        "name": name,
        "scalars": descriptions(),
        "records": records,
        "rules": decisions(records, selections),
        "problems": problems,
    }


def decisions(records: Sequence[Payload], selections: Sequence[Payload]) -> list[dict[str, Any]]:
    """Return the decision of each checkpoint callback, then those of the rules that are shown without one.

    Args:
        records: Payloads of records.
        selections: Payloads of selection events; those of one callback in the order of training.
    """
    by_callback: dict[str, dict[int, Payload]] = {}
    for selection in selections:
        # A run that was killed and resumed ranks states again.
        by_callback.setdefault(selection["key"], {})[selection["global_step"]] = selection
    found = [_of_callback(list(made.values())) for made in by_callback.values()]
    used = {decision["rule"] for decision in found}
    states = list(map(AnalyzedState.of_payload, records))
    # Of a rule without a callback, the decision that one with default settings would make.
    return found + [
        {**_decision(rule, LOSS, rank_by_loss(states, rule), is_relative=True), "used": False}
        for rule in RULES
        if RULES[rule].is_shown and rule not in used
    ]


def _of_callback(made: Sequence[Payload]) -> dict[str, Any]:
    """Return the decision of a checkpoint callback, with the metric of its epochs and the path of its file."""
    last = made[-1]
    sign = 1.0 if last["train_metric_mode"] == "max" else -1.0
    candidates = tuple(
        Candidate(
            c["epoch"],
            c["global_step"],
            sign * c["metric"],
            -math.inf if c["criterion"] is None else c["criterion"],
            c["mainly_positive"],
            path="",
        )
        for c in made
    )
    ranking = Ranking(candidates, CandidateFilter(last["tolerance"], last["require_mp"]))
    metrics = [{"global_step": c["global_step"], "value": c["metric"]} for c in made] if last["train_metric"] else []
    is_relative = last.get("is_relative") is True
    decision = _decision(last["rule"], last["train_metric"] or LOSS, ranking, is_relative=is_relative)
    if last["rivals"]:
        decision["why"] += f" Within two standard errors of the pick are epochs {', '.join(map(str, last['rivals']))}."
    return {
        **decision,
        "used": True,
        "pick": last["pick"],
        "metrics": metrics,
    }


def _decision(rule: str, metric: str, ranking: Ranking, *, is_relative: bool) -> dict[str, Any]:
    pick = ranking.pick
    return {
        "rule": rule,
        "title": rule_title(rule),
        "scalar": RULES[rule].scalar if rule in RULES else None,
        "metric": metric,
        "tolerance": ranking.filter.tolerance,
        "require_mp": ranking.filter.require_mp,
        "near": [c.global_step for c in ranking.near],
        "candidates": [c.global_step for c in ranking.qualified],
        "pick": pick and {"epoch": pick.epoch, "global_step": pick.global_step, "path": None},
        "why": _why(rule, metric, ranking, is_relative=is_relative),
        "metrics": [],
    }


def _why(rule: str, metric: str, ranking: Ranking, *, is_relative: bool) -> str:
    if not ranking.candidates:
        return "There is no analyzed state of trained weights with a defined C_t yet."
    near, require_mp = ranking.near, ranking.filter.require_mp
    width = f"{ranking.filter.tolerance:g}" + (f" ({LOSS_SHARE:.0%} of its drop)" if is_relative else "")
    found = f"{len(near)} of {len(ranking.candidates)} analyzed states have a {metric} within {width} of the best"
    positive = [c for c in near if c.mainly_positive]
    if require_mp and not positive:
        best = max(near, key=lambda c: c.score)
        return f"{found}; none of them is MP, so the best {metric} decides (epoch {best.epoch})."
    candidates = f"the {len(positive)} of these that are MP are candidates" if require_mp else "these are candidates"
    wins = rule_title(rule) if rule in RULES else f"highest value of {rule}"
    return f"{found}; {candidates}. Among them the {wins} wins, the earliest if several are equal."
