"""Section 3.4: whether manipulated gradients make spectra MN, and the preconditioned Hessian."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from examples.paper_hesd import figures
from examples.paper_hesd.figures import SEED_0
from examples.paper_hesd.settings import STRONG_CLIP
from examples.paper_hesd.spectra import lowest_c_t
from examples.paper_hesd.verdicts import OF_TRAINED, Section, combined, kind, mn_when_trained
from examples.shared import AGREES, DIFFERS, NOT_RUN, UNSEEN, Finding, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from examples.paper_hesd.outcomes import Outcome

    Outcomes = Mapping[str, Outcome]


def clipping(outcomes: Outcomes) -> Section:
    """Judge the claims of section 3.4 about clipped gradients."""
    findings, rows = [], []
    for clip in (1.0, STRONG_CLIP):
        runs = [o for o in outcomes.values() if o.experiment.clip == clip]
        rows += [_clipping_row(o) for o in runs]
        if runs:
            finding = mn_when_trained(f"Clipping at global norm {clip:g} makes some epochs MN.", runs)
            clipped = any(p.gradients.get("clipped_share", 0) > 0 for o in runs for p in o.points)
            findings.append(finding if clipped else replace(finding, verdict=UNSEEN, evidence="nothing was clipped"))
    header = ("Run", "clipped steps", "to this share of their norm", "trained epochs", "lowest C_t of these",
              "Train acc., %", "Gen. acc., %")  # fmt: skip
    return Section(
        "Section 3.4. Clipped gradients",
        "The MN-HESD of Fig. 2 is put down to gradients clipped at global norm 1 (not verified there).",
        [Table(header, rows)] if rows else [],
        findings,
        notes=["Clipping as the callback's `monitor_gradients` saw it, over the analyzed epochs."],
    )


def _clipping_row(outcome: Outcome) -> list[str]:
    seen = [p.gradients for p in outcome.points if p.gradients]
    lowest = lowest_c_t(outcome.trained)
    clipped = [g for g in seen if g["clipped_share"] > 0]
    share = sum(g["clipped_share"] for g in seen) / len(seen) if seen else 0.0
    factor = sum(g["clip_factor"] for g in clipped) / len(clipped) if clipped else 1.0
    return [
        outcome.experiment.name,
        f"{share:.0%}",
        f"{factor:.2g}",
        str(len(outcome.trained)),
        f"{lowest.spectrum.c_t:.3f}" if lowest else "",
        f"{100 * outcome.last.train_acc:.1f}",
        f"{100 * outcome.last.gen_acc:.1f}",
    ]


def preconditioned(outcomes: Outcomes) -> Section:
    """Ask whether a spectrum is MN because the Hessian is not preconditioned as the optimizer does."""
    runs = {
        o.experiment.name: o
        for o in outcomes.values()
        if o.experiment.preconditioned or o.experiment.name in SEED_0.values()
    }
    pairs = [(p.spectrum, p.record.preconditioned) for o in runs.values() for p in o.trained]
    verdicts = [{"MP": AGREES, "MN": DIFFERS}.get(kind(seen), UNSEEN) for plain, seen in pairs if kind(plain) == "MN"]
    turned = sum(kind(plain) == "MP" and kind(seen) == "MN" for plain, seen in pairs)
    finding = Finding(
        "MN-HESDs come of evaluating the Hessian without regard to what the optimizer does.",
        f"{OF_TRAINED} that are MN: agrees if all are MP when preconditioned, differs if one is MN; cannot be seen if "
        "none is MN to begin with",
        f"{len(verdicts)} of {len(pairs)} are MN, {verdicts.count(AGREES)} of these MP when preconditioned; "
        f"{turned} that are MP become MN",
        combined(verdicts) if verdicts else UNSEEN if runs else NOT_RUN,
    )
    header = ("Run", "last C_t", "type", "C_t preconditioned", "type", "λ_max over stability threshold",
              "cosine of gradient and step")  # fmt: skip
    rows = [_preconditioned_row(outcome) for outcome in runs.values()]
    return Section(
        "Section 3.4. Preconditioned by the optimizer",
        '"Since HESD evaluation algorithm does not account for optimizer operations, the gradients it uses give a '
        'perspective very different from the expected one."',
        [Table(header, rows)] if rows else [],
        [finding],
        figure=figures.preconditioned(runs) if runs else None,
        caption="C_t of the Hessian, and of the Hessian in the coordinates of the optimizer (`preconditioner="
        '"optimizer"`); for SGD both are the same.',
    )


def _preconditioned_row(outcome: Outcome) -> list[str]:
    point = outcome.last
    seen, ratio = point.record.preconditioned, point.record.stability_ratio
    return [
        outcome.experiment.name,
        f"{point.spectrum.c_t:.3f}",
        kind(point.spectrum),
        f"{seen.c_t:.3f}" if seen else "",
        kind(seen),
        f"{ratio:.2g}" if ratio is not None else "",
        f"{point.gradients['update_cosine']:.2f}" if point.gradients else "",
    ]
