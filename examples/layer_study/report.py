"""The report: the claims of the abstract and our results, as Markdown with two figures."""

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
expressivity". This study tests the claim on {count} small networks and {datasets} data sets. The abstract does not say
which quantities the paper measures. Those here are ours, so *differs* would not refute the paper.
"""
METHOD = """\
- **Networks**: MLPs with tanh, {widths} units in each of {depths} hidden layers ({configurations} configurations), each
  trained from {seeds} seeds; Adam, learning rate {learning_rate:g}, no weight decay, {epochs} epochs of batches of
  {batch_size}. All networks of a seed have the same split of the data. Not ReLU: with it no layer has a Hessian with
  negative eigenvalues; here this holds for the last layer only.
- **Spectra**: `HessianSpectrumCallback(layers="auto")` on all training samples, half-way (for the growth of λ_max, the
  logarithm of the ratio) and at the end (for all other indicators); {steps} Lanczos steps from each of {probes} start
  vectors. All indicators except λ_max and C_t have noise, which weakens correlations.
- **Indicators**: those of `layer_indicators`, with −C_t for C_t, and the effective rank also as a share of the number
  of parameters; *whole*: of the Hessian of all parameters, for comparison; *mean* and *largest*: over layers; *first*
  and *last* layer. Without indicators that are equal in all networks, {indicators} remain.
- **Correlations**: Spearman's, among the {configurations} networks of the same data set and seed, averaged over seeds,
  then over data sets, so that differences between data sets or splits do not appear as effects.
- **Intervals**: 95 %, percentiles of {resamples} bootstrap samples of configurations, with all their runs: seeds of a
  configuration are not independent evidence. Data sets are not resampled: the averages hold for these data sets.
- **p-values**: from {permutations} permutations of configurations, again with all their runs; corrected for the
  {indicators} indicators by the distribution of the strongest correlation (Westfall & Young's single-step max-T),
  separately for each word and view. The strongest correlations are partly so by chance, and would be weaker elsewhere.
- **Size as a confounder**: *given the size* is the partial rank correlation given the number of parameters and the
  number of layers; *equal architectures* correlates ranks from which the mean of each configuration is subtracted,
  so that only initialization, order of samples, and how a split suits a configuration remain.
- **Training loss as a confounder**: the curvature of cross-entropy vanishes with the training loss, so eigenvalues,
  training loss and gap are correlated for a reason that needs no Hessian.
"""
FOREST = (
    f"*Average correlations with 95 % intervals, raw and given the size; filled: seen by the rule; gray "
    f"band: less than {rules.RELEVANT} in size.*"
)
NOTES = """\
- There are seven small data sets and one kind of network; MLPs this small overfit in other ways than large networks.
- Correlation is not causation: only width, depth and seed were varied.
- A network that counts as under-parameterized may also be badly trained, as deep and narrow ones can be.
- The test part of the small data sets is small, so their gaps have noise, which weakens correlations.
- A partial rank correlation removes monotone effects of size only.
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
        "*Raw correlations in each data set; gray: undefined, because one of the two does not vary.*",
        f"## Method\n\n{method(data)}",
        f"## Runs\n\n{runs(data)}",
        *(chapter(answer, data) for answer in answers),
        f"## The gap in accuracy or R²\n\n{other_gap(data, answers[0])}",
        f"## Limits\n\n{NOTES.strip()}",
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def introduction(data: Sample) -> str:
    """Return the introduction, with versions."""
    text = INTRODUCTION.format(count=data.gap.size, datasets=len(data.study.datasets)).strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{text}\n\n{dt.datetime.now(tz=dt.timezone.utc).date()}; Python {platform.python_version()}, {versions}."


def method(data: Sample) -> str:
    """Return the method of the study."""
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
    """Return a table of the data sets with losses and scores of the networks."""
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
                                   numbers["test_score"], data.memorized)
                ),
                f"{under:.0%}",
            )
        )  # fmt: skip
    header = ("Data set", "Train/test samples", "Features", "Training loss", "Test loss", "Gap", "Training score",
              "Test score", "Shuffled targets explained", "Under-parameterized")  # fmt: skip
    caption = "Median (least to greatest) over the runs. Score: accuracy; R² for diabetes and friedman."
    return f"{caption}\n\n{markdown(Table(header, rows))}"


def chapter(answer: Answer, data: Sample) -> str:
    """Return all correlations with one quantity, and the findings."""
    _, whole = rules.split(answer.views[RAW])
    findings = [f"- **{finding.verdict}**: {finding.claim} Here: {finding.evidence}." for finding in answer.findings]
    return "\n\n".join(
        [
            f"## {answer.word.name}",
            f"Its measure: {answer.word.quantity}.",
            *findings,
            f"For comparison, the Hessian of the whole network: {rules.evidence(whole)}.",
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
    """Return whether another measure of the gap gives the same result."""
    found = associations.associations(data.indicators, data.score_gap, associations.plain)
    by_loss = overfitting.views[RAW]
    rows = [(name, average(found[n]), average(by_loss[n])) for n, name in enumerate(NAMES)]
    opposite = sum(a.mean * b.mean < 0 and max(a.p, b.p) < rules.LEVEL for a, b in zip(found, by_loss, strict=True))
    text = (
        "Training minus test score instead of test minus training loss, which over-confident networks increase at "
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
