"""The report: claims of the paper and our results, as Markdown with figures."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from dataclasses import fields
from typing import TYPE_CHECKING

from examples.paper_hesd import generalization, manipulation, ranking, spectra, tables
from examples.paper_hesd.figures import SEED_0
from examples.paper_hesd.settings import Setup
from examples.shared import UNSEEN, Table, markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from examples.paper_hesd.outcomes import Outcome
    from examples.paper_hesd.verdicts import Section

PACKAGES = ("lightning-hesd", "torch", "lightning", "scikit-learn")
SECTIONS = (
    tables.optimizers,
    tables.fine_tuning,
    tables.augmentation,
    tables.adahessian,
    spectra.trained_networks,
    spectra.clipped_vit,
    spectra.throughout_training,
    spectra.fine_tuned,
    spectra.resnet_adahessian,
    spectra.vit_adahessian,
    generalization.excessive_training,
    generalization.criteria_over_epochs,
    ranking.two_rules,
    generalization.algorithm,
    tables.initialization,
    manipulation.clipping,
    manipulation.preconditioned,
    ranking.rules,
)
INTRODUCTION = """\
Claims of Gabdullin (2025, [arXiv:2504.17618](https://arxiv.org/abs/2504.17618)), compared with networks on {data}. The
program makes every verdict from the numbers, by the rule beside it. Small networks on easy images can behave
differently from large ones on photographs: *differs* holds for this scale, and does not refute the paper.
"""
DIGITS = """\
scikit-learn's 8x8 digits; generalization data are held-out digits, rotated, shifted and noisy"""
FOLDERS = "{setup.train_folder}; generalization data are {setup.gen_folder}"


def write(outcomes: Mapping[str, Outcome], setup: Setup, seeds: int, missing: Iterable[str], out: Path) -> Path:
    """Write report and figures, and return the report's path."""
    sections = [make(outcomes) for make in SECTIONS]
    data = FOLDERS.format(setup=setup) if setup.train_folder else DIGITS
    for section in sections:
        if section.figure is not None:
            section.figure.savefig(out / f"{section.slug}.png")
    parts = [
        f"# Reproduction of arXiv:2504.17618\n\n{INTRODUCTION.format(data=data).strip()}",
        header(outcomes, setup, seeds, missing),
        f"## Summary\n\n{summary(sections)}",
        *map(chapter, sections),
        f"## Claims that could not be judged, and why\n\n{unseen(sections, setup)}",
        f"## Runs\n\n{runs(outcomes)}",
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def header(outcomes: Mapping[str, Outcome], setup: Setup, seeds: int, missing: Iterable[str]) -> str:
    """Return versions, settings, date and duration."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    chosen = ", ".join(f"{field.name} {value}" for field in fields(Setup) if (value := getattr(setup, field.name)))
    sizes = ", ".join(f"{title} {outcomes[name].parameters:,}" for title, name in SEED_0.items() if name in outcomes)
    minutes = sum(outcome.seconds for outcome in outcomes.values()) / 60
    left = ", ".join(missing)
    lines = [
        f"- {dt.datetime.now(tz=dt.timezone.utc).date()}; Python {platform.python_version()}, {versions}",
        f"- {chosen}; {seeds} seeds of the trainings with AdamW, one of all others",
        f"- parameters: {sizes}",
        f"- {minutes:.1f} minutes of trainings and analyses, added up, on one thread each",
        *([f"- not run, or without a spectrum: {left}"] if left else []),
    ]
    return "\n".join(lines)


def summary(sections: Sequence[Section]) -> str:
    """Return the table of all findings."""
    rows = [(section.title, f.claim, f.verdict) for section in sections for f in section.findings]
    return markdown(Table(("", "Claim", "Here"), rows))


def chapter(section: Section) -> str:
    """Return the section of one table or figure."""
    parts = [f"## {section.title}"]
    if isinstance(section.paper, Table):
        parts += ["The paper:", markdown(section.paper), "Here:"]
    else:
        parts.append(f"The paper: {section.paper}")
    parts += [markdown(table) for table in section.ours]
    if section.figure is not None:
        parts.append(f"![{section.title}]({section.slug}.png)")
        if section.caption:
            parts.append(f"*{section.caption}*")
    parts += section.notes
    parts += [
        f"- **{finding.verdict}**: {finding.claim} Here: {finding.evidence or 'nothing to judge by'}.\n"
        f"  *Rule: {finding.rule.rstrip('.')}.*"
        for finding in section.findings
    ]
    return "\n\n".join(parts)


def unseen(sections: Sequence[Section], setup: Setup) -> str:
    """Return the findings that could not be made, with their evidence."""
    lines = [
        f"- {section.title}: {finding.claim} Here: {finding.evidence}."
        for section in sections
        for finding in section.findings
        if finding.verdict == UNSEEN
    ]
    data = "the folders given" if setup.train_folder else "the digits"
    lines.append(
        f"- What needs ImageNet (Fig. 1, Fig. 2, the last row of Table 3, pre-training in Table 2): {data} stand in "
        "for it, or nothing does. The network of Fig. 2 cannot be examined."
    )
    return "\n".join(lines)


def runs(outcomes: Mapping[str, Outcome]) -> str:
    """Return a table of all trainings."""
    rows = [
        (name, f"{o.seconds:.0f}", f"{o.last.train_acc:.3f}", f"{o.last.val_acc:.3f}", f"{o.last.gen_acc:.3f}",
         "; ".join(o.errors))
        for name, o in outcomes.items()
    ]  # fmt: skip
    return markdown(Table(("Run", "Seconds", "Train acc.", "Val. acc.", "Gen. acc.", "Failed analyses"), rows))
