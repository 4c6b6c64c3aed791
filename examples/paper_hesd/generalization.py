"""Figures 7 to 10 and section 4: excessive training, the criteria of generalization, and rules to pick checkpoints."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from examples.paper_hesd import figures
from examples.paper_hesd.rules import paired
from examples.paper_hesd.verdicts import INTERVAL, Section, by_interval
from examples.shared import AGREES, DIFFERS, NOT_RUN, UNSEEN, Finding, Table
from lightning_hesd.spectra.criteria import QS_FACTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from examples.paper_hesd.outcomes import Outcome, Point
    from examples.shared import Verdict
    from lightning_hesd import Assessment

    Outcomes = Mapping[str, Outcome]

TITLES = {"resnet": "ResNet", "vit": "ViT"}
ENOUGH = 0.9
"""Minimum share of right verdicts of the algorithm."""


def by_seed(outcomes: Outcomes, network: str) -> list[Outcome]:
    """Return the long trainings with AdamW, one per seed."""
    return [o for o in outcomes.values() if o.experiment.full_analysis and o.experiment.network == network]


def _finding(claim: str, rule: str, evidence: str, verdict: Callable[[], Verdict], *, known: bool) -> Finding:
    return Finding(claim, rule, evidence, verdict() if known else NOT_RUN)


def excessive_training(outcomes: Outcomes) -> Section:
    runs = by_seed(outcomes, "vit")
    ends = [(o.candidates[0], o.last) for o in runs]
    falls = [first.spectrum.lambda_max / last.spectrum.lambda_max for first, last in ends]
    changes = [
        abs(last.gen_acc - first.gen_acc) / math.sqrt(2 * last.gen_acc * (1 - last.gen_acc) / o.distinct)
        for o, (first, last) in zip(runs, ends, strict=True)
    ]
    factors = "λ_max falls by the factors " + ", ".join(f"{fall:.3g}" for fall in falls)
    span = "from the first epoch with nearly the best training accuracy to the last one"
    findings = [
        _finding(
            "Eigenvalues become smaller while training goes on at unchanged accuracy.",
            f"λ_max {span}: agrees (differs) if it falls (rises) for every seed",
            factors,
            lambda: AGREES if min(falls) > 1 else DIFFERS if max(falls) < 1 else UNSEEN,
            known=bool(runs),
        ),
        _finding(
            "The spectrum becomes quasi-singular: all eigenvalues tend to zero.",
            f"agrees if λ_max falls by {QS_FACTOR:g} or more in the median over seeds (the paper has no number); else "
            "it cannot be seen, as training may have been too short",
            factors,
            lambda: AGREES if statistics.median(falls) >= QS_FACTOR else UNSEEN,
            known=bool(runs),
        ),
        _finding(
            "Generalization accuracy remains practically unchanged.",
            f"{span}: agrees if it changes by at most two standard errors of a difference for every seed",
            "changes in standard errors: " + ", ".join(f"{change:.1f}" for change in changes),
            lambda: AGREES if max(changes) <= 2 else DIFFERS,
            known=bool(runs),
        ),
    ]
    figure = None
    if runs:
        candidates = runs[0].candidates
        shown = (candidates[0], candidates[len(candidates) // 2], candidates[-1])
        figure = figures.densities({f"epoch {point.epoch}": point.spectrum for point in shown})
    return Section(
        "Figure 7. Excessive training",
        "HESDs of the ViT (AdamW) at the 100th, 250th and 450th epoch: eigenvalues become smaller, until the HESD is "
        "quasi-singular, at unchanged accuracies.",
        findings=findings,
        figure=figure,
        caption="The first, a middle and the last epoch with nearly the best training accuracy. Mind the axes: each "
        "spectrum fills its own.",
    )


def criteria_over_epochs(outcomes: Outcomes) -> Section:
    runs = by_seed(outcomes, "vit")
    candidates = [p.record.assessment for o in runs for p in o.candidates if p.record.assessment]
    found = [assessment.verdict for assessment in candidates]
    findings = [
        _finding(
            "r_e and K_H05 of generalization data always indicate poor generalization.",
            "Epochs with nearly the best training accuracy, all seeds: agrees if the algorithm of Fig. 10 says poor at "
            "all of them, differs if it says good at one",
            ", ".join(f"{found.count(verdict)} {verdict}" for verdict in dict.fromkeys(found)),
            lambda: AGREES if set(found) == {"poor"} else DIFFERS if "good" in found else UNSEEN,
            known=bool(found),
        )
    ]
    for name, criterion in _CRITERIA.items():
        correlations = [c for o in runs if not math.isnan(c := _correlation(o, criterion))]
        difference = paired(correlations, [0.0] * len(correlations)) if correlations else None
        evidence = (
            "too few epochs" if difference is None else f"mean {difference.shown('.2f')} over {len(correlations)} seeds"
        )
        findings.append(
            Finding(
                f"{name} changes in proportion on training and generalization data.",
                f"Spearman's correlation over all epochs: {INTERVAL}",
                evidence,
                by_interval(difference) if difference else UNSEEN if runs else NOT_RUN,
            )
        )
    return Section(
        "Figure 8. Criteria during excessive training",
        "r_e and K_H05 of the ViT (AdamW) change with epochs, but in proportion on training and generalization data: "
        "their difference always indicates poor generalization, which is the case.",
        findings=findings,
        figure=figures.criteria_curves(runs[0]) if runs else None,
    )


_CRITERIA: Mapping[str, Callable[[Point], tuple[float, float]]] = {
    "r_e": lambda p: (p.spectrum.r_e, p.record.generalization.r_e if p.record.generalization else math.nan),
    "K_H05": lambda p: (
        p.spectrum.k_h(0.5),
        p.record.generalization.k_h(0.5) if p.record.generalization else math.nan,
    ),
}


def _correlation(outcome: Outcome, criterion: Callable[[Point], tuple[float, float]]) -> float:
    values = np.array([criterion(point) for point in outcome.points])
    if len(values) < 3 or np.isnan(values).any() or (np.ptp(values, axis=0) == 0).any():
        return math.nan
    return float(spearmanr(values[:, 0], values[:, 1]).statistic)


def algorithm(outcomes: Outcomes) -> Section:
    found: dict[str, list[Assessment]] = {}
    rows, right = [], []
    for network, title in TITLES.items():
        runs = by_seed(outcomes, network)
        for data, accuracy in (("generalization data", "gen_acc"), ("clean held-out data", "val_acc")):
            clean = accuracy == "val_acc"
            assessed = [(o.last, (o.other("clean") if clean else o.last.record).assessment) for o in runs]
            for point, assessment in assessed:
                if assessment is None:
                    continue
                found.setdefault(f"{title}, {data}", []).append(assessment)
                gap = point.train_acc - getattr(point, accuracy)
                truth = "poor" if gap > POOR_GAP else "good" if gap < GOOD_GAP else None
                if truth is not None and assessment.verdict in {"good", "poor"}:
                    right.append(assessment.verdict == truth)
            known = [a for _, a in assessed if a is not None]
            if known:
                gaps = [p.train_acc - getattr(p, accuracy) for p, _ in assessed]
                kinds = [a.verdict for a in known]
                rows.append(
                    (
                        title,
                        data,
                        f"{100 * statistics.fmean(gaps):.1f}",
                        f"{statistics.median(a.delta_r_e for a in known):.2f}",
                        f"{statistics.median(a.delta_k_h05 for a in known):.2f}",
                        ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
                    )
                )
    share = statistics.fmean(right) if right else math.nan
    header = ("Model", "Data", "accuracy lost, points", "median Δr_e", "median ΔK_H05", "verdicts of the algorithm")
    return Section(
        "Figure 10. The algorithm",
        "MP is checked first; then Δr_e < 1.5 and ΔK_H05 < 1.2 together indicate good generalization.",
        [Table(header, rows)] if rows else [],
        [
            _finding(
                "The algorithm tells good from poor generalization.",
                f"Last epoch, all seeds; generalization is poor if more than {POOR_GAP:.0%} of accuracy is lost on the "
                f"data, good if less than {GOOD_GAP:.0%}: agrees if {ENOUGH:.0%} or more of the verdicts are right, "
                "differs if fewer are; undecided ones do not count",
                f"{sum(right)} of {len(right)} right",
                lambda: UNSEEN if not right else AGREES if share >= ENOUGH else DIFFERS,
                known=bool(rows),
            )
        ],
        figure=figures.algorithm(found) if found else None,
        caption="A point for each seed and data set, last epoch. Good: left of and below both dashed lines.",
    )


POOR_GAP, GOOD_GAP = 0.10, 0.05
