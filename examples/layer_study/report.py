"""The report: what the abstract claims beside what came out, as Markdown with two figures."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from examples.layer_study import associations, figures
from examples.layer_study import words as rules
from examples.layer_study.indicators import NAMES
from examples.layer_study.words import RAW, SAME, SIZE, SIZE_AND_LOSS, WORDS, Sample
from examples.shared import Table, markdown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from examples.layer_study.associations import Association
    from examples.layer_study.words import Answer

PACKAGES = ("lightning-hesd", "torch", "lightning", "scikit-learn", "scipy")
INTRODUCTION = """\
Bolshim & Kugaevskikh (2025, [arXiv:2510.17486](https://arxiv.org/abs/2510.17486)) take the Hessian of each layer by
itself, and report from 111 experiments on 37 data sets that "the spectral properties of local Hessians, such as the
distribution of eigenvalues, reveal quantitative patterns associated with overfitting, underparameterization, and
expressivity". Here the abstract's claim is put to {count} small networks on {datasets} data sets. Which quantities the
paper itself measures is not part of the abstract: those here are ours, so that *differs* would refute nothing.
"""
METHOD = """\
- **Networks**: MLPs with tanh, {widths} units in each of {depths} hidden layers ({configurations} configurations), each
  trained from {seeds} seeds; Adam, learning rate {learning_rate:g}, no weight decay, {epochs} epochs of batches of
  {batch_size}. A seed is also a split of the data: all networks of a seed have the same. Not ReLU: with it all layers
  have Hessians without negative eigenvalues, as the last layer has here.
- **Spectra**: `HessianSpectrumCallback(layers="auto")` on all training samples, half-way (for the growth of λ_max, the
  logarithm of the ratio) and at the end (for all else); {steps} Lanczos steps from each of {probes} start vectors, so
  that all but λ_max and C_t are estimates with noise, which weakens correlations.
- **Indicators**: those of `layer_indicators`, with −C_t for C_t, and the effective rank also as a share of the number
  of parameters; *whole*: of the Hessian of all parameters, as a comparison; *mean* and *largest*: over layers; *first*
  and *last* layer. Left out is what is the same in all networks: {indicators} are left.
- **Correlations**: Spearman's, among the {configurations} networks of the same data set and seed, averaged over seeds,
  then over data sets: differences between data sets or splits cannot pose as effects.
- **Intervals**: 95 %, percentiles of {resamples} bootstrap samples of configurations, with all their runs: seeds of a
  configuration are no independent evidence. Data sets are not resampled: the averages speak of these data sets.
- **p-values**: from {permutations} permutations of configurations, again with all their runs; corrected for the
  {indicators} indicators by the distribution of the strongest correlation (Westfall & Young's single-step max-T), for
  each word and view by itself. The correlations named as the strongest are so partly by luck, and will shrink.
- **Size as a confounder**: *given the size* is the partial rank correlation given the number of parameters and the
  number of layers; *equal architectures* correlates ranks from which the mean of each configuration is subtracted,
  so that only initialisation, order of samples, and how a split suits a configuration are left.
- **Training loss as a confounder**: the curvature of cross-entropy vanishes as the training loss does, so that
  large eigenvalues, small training loss and large gap go together for a reason that needs no Hessian.
"""
FOREST = (
    f"*Average correlations with 95 % intervals, raw and given the size; filled: seen by the rule; grey "
    f"band: less than {rules.RELEVANT} in size.*"
)
NOTES = """\
- Seven small data sets and one kind of network; MLPs this small overfit in other ways than large networks.
- What is correlated is not caused: nothing here was intervened upon except width, depth and seed.
- A network that is called under-parameterised may also be badly trained, as deep and narrow ones can be.
- The test part of the small data sets is small, so that their gaps have noise of their own, which weakens correlations.
- Ranks are straight only to first order: a partial rank correlation removes monotone effects of size, and no others.
"""


def write(data: Sample, out: Path) -> Path:
    """Write report and figures, and return the report's path."""
    answers = [rules.answer(word, data) for word in WORDS]
    drawn = {"forest": figures.forest(answers), "heat-map": figures.heat_map(answers, data.study.datasets)}
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png")
    parts = [
        f"# Layer-wise Hessians and what they go with\n\n{introduction(data)}",
        f"## Summary\n\n{summary(answers)}",
        "![Forest plot](forest.png)",
        FOREST,
        "![Heat map](heat-map.png)",
        "*Raw correlations in each data set; grey: undefined, because one of the two does not vary.*",
        f"## How it was done\n\n{method(data)}",
        f"## Runs\n\n{runs(data)}",
        *(chapter(answer, data) for answer in answers),
        f"## The gap in accuracy or R²\n\n{other_gap(data, answers[0])}",
        f"## What this cannot tell\n\n{NOTES.strip()}",
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def introduction(data: Sample) -> str:
    """Return what this is, with versions."""
    text = INTRODUCTION.format(count=data.gap.size, datasets=len(data.study.datasets)).strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{text}\n\n{dt.datetime.now(tz=dt.timezone.utc).date()}; Python {platform.python_version()}, {versions}."


def method(data: Sample) -> str:
    """Return how the study was made."""
    study = data.study
    return METHOD.format(
        widths=enumerated(study.widths),
        depths=enumerated(study.depths),
        configurations=len(study.configurations),
        seeds=study.seeds,
        indicators=len(NAMES),
        resamples=associations.RESAMPLES,
        permutations=associations.PERMUTATIONS,
        **asdict(study.setup),
    ).strip()


def summary(answers: Sequence[Answer]) -> str:
    """Return the table of all findings, and the rule."""
    rows = [(answer.word.name, f.claim, f.verdict) for answer in answers for f in answer.findings]
    return f"{markdown(Table(('', 'Claim', 'Here'), rows))}\n\nRule, stated before the runs: {rules.RULE}."


def runs(data: Sample) -> str:
    """Return a table of the data sets with what the networks have come to."""
    numbers = data.numbers
    rows = []
    for index, dataset in enumerate(data.study.datasets):
        train_size, test_size, features = (
            int(numbers[n][index, 0, 0]) for n in ("train_size", "test_size", "features")
        )
        under = (data.unexplained[index] > rules.UNEXPLAINED).mean()
        rows.append(
            (
                dataset, f"{train_size}/{test_size}", str(features), *(
                    spread(values[index])
                    for values in (numbers["train_loss"], numbers["test_loss"], data.gap, numbers["train_score"],
                                   numbers["test_score"], data.memorised)
                ),
                f"{under:.0%}",
            )
        )  # fmt: skip
    header = ("Data set", "Train/test samples", "Features", "Training loss", "Test loss", "Gap", "Training score",
              "Test score", "Shuffled targets explained", "Under-parameterised")  # fmt: skip
    caption = "Median (least to greatest) over the runs. Score: accuracy; R² for diabetes and friedman."
    return f"{caption}\n\n{markdown(Table(header, rows))}"


def chapter(answer: Answer, data: Sample) -> str:
    """Return all correlations with one quantity, and the findings."""
    _, whole = rules.split(answer.views[RAW])
    findings = [f"- **{finding.verdict}**: {finding.claim} Here: {finding.evidence}." for finding in answer.findings]
    return "\n\n".join(
        [
            f"## {answer.word.name}",
            f"What stands for it: {answer.word.quantity}.",
            *findings,
            f"The same of the Hessian of the whole network, for comparison: {rules.evidence(whole)}.",
            f"The number of parameters alone has an average correlation of {average(answer.size_alone)} with it.",
            markdown(correlations(answer, data.study.datasets)),
        ]
    )


def correlations(answer: Answer, datasets: Sequence[str]) -> Table:
    """Return the table: indicators by data sets, then the averages of all views."""
    views = [view for view in (RAW, SIZE, SIZE_AND_LOSS, SAME) if view in answer.views]
    header = ["Indicator", *datasets, *(f"average, {view}" for view in views)]
    rows = [
        [
            name,
            *(number(value) for value in answer.views[RAW][index].by_dataset),
            *(average(answer.views[view][index]) for view in views),
        ]
        for index, name in enumerate(NAMES)
    ]
    return Table(header, rows)


def other_gap(data: Sample, overfitting: Answer) -> str:
    """Return whether another measure of the gap says the same."""
    found = associations.associations(data.indicators, data.score_gap, associations.plain)
    by_loss = overfitting.views[RAW]
    rows = [(name, average(found[n]), average(by_loss[n])) for n, name in enumerate(NAMES)]
    opposite = sum(a.mean * b.mean < 0 and max(a.p, b.p) < rules.LEVEL for a, b in zip(found, by_loss, strict=True))
    text = (
        "Training minus test score instead of test minus training loss, which over-confident networks drive up at "
        f"unchanged accuracy. Not part of the verdicts. {rules.evidence(rules.split(found)[0])}. Indicators with "
        f"corrected p < {rules.LEVEL} for both, of opposite sign: {opposite}."
    )
    return f"{text}\n\n{markdown(Table(('Indicator', 'average, gap in score', 'average, gap in loss'), rows))}"


def average(found: Association) -> str:
    """Return a correlation with its interval, in bold face where it is seen, and its p-value."""
    if np.isnan(found.mean):
        return "-"
    text = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    if np.isnan(found.p):
        return text
    return f"{f'**{text}**' if rules.is_seen(found) else text} p = {found.p:.2g}"


def number(value: float) -> str:
    """Return a correlation, or a dash where it is undefined."""
    return "-" if np.isnan(value) else f"{value:+.2f}"


def spread(values: associations.Array) -> str:
    """Return median and range."""
    return f"{np.median(values):.2g} ({values.min():.2g} to {values.max():.2g})"


def enumerated(values: Sequence[int]) -> str:
    """Return numbers as people list them."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
