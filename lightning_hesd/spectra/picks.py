"""What each rule takes among the payloads of a run, and why, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.selection import (
    CRITERIA,
    LOSS_SHARE,
    RULE_NAMES,
    Candidate,
    SelectionRule,
    progress_tolerance,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Payload = Mapping[str, Any]

LOSS = "loss over the analysis samples"


@dataclass(frozen=True)
class _Extremes:
    c_t: float
    lambda_max: float


def rewound(payloads: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the payloads without those a resumed run has made anew: what is written later holds."""
    kept: list[dict[str, Any]] = []
    for payload in payloads:
        while kept and kept[-1]["global_step"] >= payload["global_step"]:
            kept.pop()
        kept.append(payload)
    return kept


def picks(records: Sequence[Payload], choices: Sequence[Payload]) -> list[dict[str, Any]]:
    """Return what each rule takes: those of the run's checkpoint callbacks, and the paper's two in any case.

    Args:
        records: Payloads of records.
        choices: Payloads of choices, of any rules, those of one rule in the order of training.
    """
    by_rule: dict[str, list[Payload]] = {}
    for choice in choices:
        by_rule.setdefault(choice["key"], []).append(choice)
    found = [_of_checkpoint(made) for made in by_rule.values()]
    used = {pick["rule"] for pick in found}
    return found + [_of_losses(rule, records) for rule in CRITERIA if rule not in used]


def _of_checkpoint(made: Sequence[Payload]) -> dict[str, Any]:
    """Return what a checkpoint callback has taken: it knows the metric of its epochs, and where its files are."""
    last = made[-1]
    metric = last["train_metric"] or LOSS
    sign = 1.0 if last["train_metric_mode"] == "max" else -1.0
    candidates = [
        Candidate(
            c["epoch"],
            c["global_step"],
            sign * c["metric"],
            -math.inf if c["criterion"] is None else c["criterion"],
            c["mainly_positive"],
            "",
        )
        for c in made
    ]
    found = _described(
        last["rule"],
        metric,
        SelectionRule(last["tolerance"], last["require_mp"]),
        candidates,
        is_relative=last.get("is_relative") is True,
    )
    metrics = [{"global_step": c["global_step"], "value": c["metric"]} for c in made] if last["train_metric"] else []
    return {**found, "used": True, "pick": last["pick"], "metrics": metrics}


def _of_losses(rule: str, records: Sequence[Payload]) -> dict[str, Any]:
    """Return what a rule would take by the losses of the records, as it does with its default settings."""
    candidates = []
    first = None
    for record in records:
        spectrum = record["spectra"].get("spectrum")
        if first is None and spectrum is not None and spectrum["loss"] is not None:
            first = -spectrum["loss"]
        # As HessianCheckpoint has it: nothing is saved before the first step, nor where C_t is undefined.
        if spectrum is None or spectrum["type"] is None or spectrum["loss"] is None or record["global_step"] == 0:
            continue
        extremes = _Extremes(-math.inf if spectrum["c_t"] is None else spectrum["c_t"], spectrum["lambda_max"])
        candidates.append(
            Candidate(
                record["epoch"],
                record["global_step"],
                -spectrum["loss"],
                CRITERIA[rule](extremes),
                spectrum["type"] == "MP",
                "",
            )
        )
    best = max((c.score for c in candidates), default=-math.inf)
    selection = SelectionRule(progress_tolerance(first, best), require_mp=True)
    return {**_described(rule, LOSS, selection, candidates, is_relative=True), "used": False}


def _described(
    rule: str, metric: str, selection: SelectionRule, candidates: Sequence[Candidate], *, is_relative: bool
) -> dict[str, Any]:
    best = max((c.score for c in candidates), default=-math.inf)
    near = [c for c in candidates if best - c.score <= selection.tolerance]
    pick = selection.pick(candidates, best)
    return {
        "rule": rule,
        "title": RULE_NAMES.get(rule, rule),
        "metric": metric,
        "tolerance": selection.tolerance,
        "require_mp": selection.require_mp,
        "near": [c.global_step for c in near],
        "candidates": [c.global_step for c in selection.qualified(candidates, best)],
        "pick": pick and {"epoch": pick.epoch, "global_step": pick.global_step, "path": None},
        "why": _why(rule, metric, selection, len(candidates), near, is_relative=is_relative),
        "metrics": [],
    }


def _why(
    rule: str, metric: str, selection: SelectionRule, count: int, near: Sequence[Candidate], *, is_relative: bool
) -> str:
    if not count:
        return "There is no analysed state of trained weights with a defined C_t yet."
    best = max(near, key=lambda c: c.score)
    width = f"{selection.tolerance:g}" + (f" ({LOSS_SHARE:.0%} of its drop)" if is_relative else "")
    found = f"{len(near)} of {count} analysed states have a {metric} within {width} of the best"
    positive = [c for c in near if c.mainly_positive]
    if selection.require_mp and not positive:
        return f"{found}; none of them is MP, so the best {metric} decides (epoch {best.epoch})."
    whom = (
        f"the {len(positive)} of these that are MP are candidates" if selection.require_mp else "these are candidates"
    )
    wins = RULE_NAMES.get(rule, f"highest value of {rule}")
    return f"{found}; {whom}. Among them the {wins} wins, the earliest of equals."
