"""Figure 9 and section 4.2: which checkpoint rule picks the weights that generalize best."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING

from examples.paper_hesd import figures
from examples.paper_hesd.generalization import TITLES, by_seed
from examples.paper_hesd.rules import BEST, HIGHEST_C_T, LAST, LOWEST_MAX, RULES, paired, picks
from examples.paper_hesd.verdicts import INTERVAL, Section, by_interval
from examples.shared import NOT_RUN, Finding, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from examples.paper_hesd.outcomes import Outcome
    from examples.paper_hesd.rules import Difference

    Outcomes = Mapping[str, Outcome]


NOTES = [
    (
        "Points of generalization accuracy with 95 % intervals (Student, paired over seeds), not corrected for the "
        "number of comparisons: of twenty without an effect, one is expected to exclude 0. Every rule picks among "
        "the MP epochs whose training accuracy is within 0.01 of the best; the last row uses the answer."
    )
]


def two_rules(outcomes: Outcomes) -> Section:
    rows, findings, shown = [], [], {}
    for network, title in TITLES.items():
        runs = by_seed(outcomes, network)
        if not runs:
            continue
        chosen = [picks(o.points) for o in runs]
        shown[f"{title}, seed {runs[0].experiment.seed}"] = (
            runs[0],
            {name: chosen[0][name] for name in (HIGHEST_C_T, LOWEST_MAX)},
        )
        for name in (HIGHEST_C_T, LOWEST_MAX):
            epochs, accuracies = ([getattr(c[name], key) for c in chosen] for key in ("epoch", "gen_acc"))
            rows.append((title, name, f"{statistics.fmean(epochs):.1f}", f"{100 * statistics.fmean(accuracies):.2f}"))
        better, earlier = (
            paired([getattr(c[HIGHEST_C_T], key) for c in chosen], [getattr(c[LOWEST_MAX], key) for c in chosen])
            for key in ("gen_acc", "epoch")
        )
        steadier = paired(
            [_spread([-p.spectrum.c_t for p in o.candidates]) for o in runs],
            [_spread([p.spectrum.lambda_max for p in o.candidates]) for o in runs],
        )
        for claim, difference, form, sign in (
            ("the highest C_t picks weights that generalize better than the lowest λ_max", better, ".2%", 1),
            ("and at an earlier epoch", earlier, ".1f", -1),
            ("C_t is more stable between epochs than λ_max", steadier, ".3f", -1),
        ):
            verb = "" if sign > 0 else "; here a negative difference agrees"
            findings.append(
                Finding(
                    f"{title}: {claim}.",
                    f"{INTERVAL}{verb}",
                    f"mean difference {difference.shown(form)} over {len(runs)} seeds",
                    by_interval(difference, sign),
                )
            )
    paper = [
        ("ResNet20", HIGHEST_C_T, "300", "56.9"),
        ("ResNet20", LOWEST_MAX, "1000", "55.4"),
        ("VIT", HIGHEST_C_T, "450", "56.8"),
        ("VIT", LOWEST_MAX, "900", "56.4"),
    ]
    header = ("Model", "Rule", "Epoch", "Gen. acc., %")
    return Section(
        "Figure 9. Largest eigenvalue or C_t",
        Table(header, paper),
        [Table((*header[:2], "Mean epoch", "Mean gen. acc., %"), rows)] if rows else [],
        findings or [Finding("The highest C_t is the better rule.", INTERVAL, "", NOT_RUN)],
        figure=figures.picks_over_epochs(shown) if shown else None,
        caption="Stability: mean absolute change of the logarithm from one analyzed epoch to the next, among epochs "
        "with nearly the best training accuracy (candidates).",
    )


def _spread(values: Sequence[float]) -> float:
    """Return the mean absolute change of the logarithm; 0 for a single value, NaN without values."""
    if any(value <= 0 for value in values):
        return math.nan
    return statistics.fmean([abs(math.log(b / a)) for a, b in itertools.pairwise(values)] or [0.0])


def rules(outcomes: Outcomes) -> Section:
    """Compare all checkpoint rules (section 4.2)."""
    tables, differences, findings = [], {}, []
    for network, title in TITLES.items():
        runs = by_seed(outcomes, network)
        if not runs:
            continue
        chosen = [picks(o.points) for o in runs]
        accuracies = {name: [c[name].gen_acc for c in chosen] for name in RULES}
        to_last, to_lowest = (
            {name: paired(values, accuracies[base]) for name, values in accuracies.items()}
            for base in (LAST, LOWEST_MAX)
        )
        rows = [
            (
                name,
                f"{statistics.fmean(c[name].epoch for c in chosen):.1f}",
                f"{100 * statistics.fmean(values):.2f}",
                f"{100 * statistics.stdev(values):.2f}" if len(values) > 1 else "",
                "" if name == LAST else _points(to_last[name]),
                "" if name == LOWEST_MAX else _points(to_lowest[name]),
            )
            for name, values in accuracies.items()
        ]
        header = (f"{title}, {len(runs)} seeds", "Mean epoch", "Gen. acc., %", "SD", "more than last epoch",
                  "more than lowest λ_max")  # fmt: skip
        tables.append(Table(header, rows))
        differences[f"{title}, {len(runs)} seeds"] = {n: d for n, d in to_last.items() if n != LAST}
        evident = [n for n, d in to_last.items() if d.sign > 0 and n not in {LAST, BEST}]
        worse = [n for n, d in to_last.items() if d.sign < 0]
        findings.append(
            Finding(
                f"{title}: which rules beat the last epoch? (our question)",
                "those whose 95 % interval of the paired difference lies above 0; agrees if highest C_t is one of "
                "them, differs if its interval lies below 0",
                f"better: {', '.join(evident) or 'none, no evidence'}; worse: {', '.join(worse) or 'none'}",
                by_interval(to_last[HIGHEST_C_T]),
            )
        )
    return Section(
        "Section 4.2. Checkpoint rules",
        "Among weights with nearly the same training accuracy, those with the highest C_t should be chosen.",
        tables,
        findings or [Finding("The highest C_t is the best rule.", INTERVAL, "", NOT_RUN)],
        figure=figures.rule_differences(differences) if differences else None,
        caption="Mean differences of generalization accuracy, paired, with 95 % intervals over seeds; blue: above 0, "
        "vermilion: below.",
        notes=NOTES,
    )


def _points(difference: Difference) -> str:
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
