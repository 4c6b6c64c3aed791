"""Which findings planted faults raise, and which healthy trainings raise.

python -m benchmarks.findings                                     # about ten minutes on a quiet core
python -m benchmarks.findings --recorded runs/rules               # and trainings of `python -m examples.rule_study`
python -m benchmarks.findings --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.planted_faults import FAULTS, HEALTHY, QUICK, Case, Size, train
from examples.rule_study.training import DONE
from examples.shared import Table, markdown
from lightning_hesd import SpectrumHistory
from lightning_hesd.spectra.finding_kinds import KINDS
from lightning_hesd.spectra.findings import findings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.spectra.record import SpectrumRecord

RESULTS = Path(__file__).parent / "results"
EXPLANATION = """\
Small networks learn 1,024 of scikit-learn's digits, with {seeds} seeds for each row; {samples} samples and {steps}
Lanczos steps in {analyses} analyses, unless the fault is there, with standard errors from the sample and the
preconditioner of the optimizer. A cell says in how many trainings a finding was raised at the end, with its confidence
(c: certain, l: likely, h: hint); dots mean none. **Bold** is the finding that the fault should raise. The thresholds
were chosen with the first two tables in sight; the third one, of other seeds, was made once, after that. Of {healthy}
healthy trainings each, {without} and {without_later} have no finding.
"""
RECORDED = """\
## Recorded trainings

{count} trainings of the study of checkpoint rules (`examples/rule_study`) (an MLP, a ResNet and a ViT on digits;
AdamW with a constant learning rate, a cosine schedule, or four times as long; 256 samples, 30 steps, 12 analyses),
without a planted fault; {without} of them have no finding at the end. The last column counts trainings that had a
finding after any of their analyses. small_sample is never raised here: these records lack the resampled extremes that
it takes.
"""

HEADINGS = [key.replace("_", " ") for key in KINDS]
"""Headings of columns, which browsers break at spaces."""


def raised(case: Case, history: Sequence[SpectrumRecord]) -> dict[str, str]:
    """Return the confidence of each finding at the end of a training, by key."""
    if not case.costly:
        return {found.key: found.confidence for found in findings(history, overhead=0.5)}
    slow = [r if r.spectrum is None else replace(r, spectrum=replace(r.spectrum, seconds=60.0)) for r in history]
    return {found.key: found.confidence for found in findings(slow, overhead=3.0)}


def cell(confidences: Sequence[str], *, is_planted: bool) -> str:
    """Return how often a finding was raised, and with which confidences."""
    if not confidences:
        return "**0**" if is_planted else "."
    letters = ", ".join(sorted({confidence[0] for confidence in confidences}))
    text = f"{len(confidences)} {letters}"
    return f"**{text}**" if is_planted else text


def recorded(case: Case, seed: int, size: Size, folder: Path) -> SpectrumHistory:
    """Return the records of a training, from its folder if it has been trained before."""
    place = folder / f"{case.name}-{seed}"
    if not place.exists():
        train(case, seed, size).save(place)
    return SpectrumHistory.load(place)


class Row(NamedTuple):
    """The row of a case.

    Attributes:
        cells: Its texts.
        words: An example of each finding.
        without: Number of trainings without findings.
    """

    cells: list[str]
    words: list[str]
    without: int


def row(case: Case, size: Size, folder: Path, first_seed: int = 0) -> Row:
    """Return the row of a case."""
    seeds = range(first_seed, first_seed + size.seeds)
    histories = [recorded(case, seed, size, folder) for seed in seeds]
    every = [raised(case, history) for history in histories]
    print(case.name, every, flush=True)
    cells = [cell([found[key] for found in every if key in found], is_planted=key == case.key) for key in KINDS]
    examples = {found.key: found for history in histories for found in findings(history)}
    words = [f"{case.name}: {found.evidence} {found.action}" for found in examples.values()]
    return Row([case.name, *cells], words, sum(not found for found in every))


def of_recorded(folder: Path) -> str:
    """Return the table of trainings that were recorded in folders <network>-<schedule>-<seed>."""
    at_end: dict[str, Counter[str]] = {}
    ever: dict[str, Counter[str]] = {}
    runs: Counter[str] = Counter()
    without = 0
    for path in sorted(folder.glob("*/hesd/index.json")):
        history = SpectrumHistory.load(path.parent)
        kind = path.parent.parent.name.rpartition("-")[0]
        if not (path.parent.parent / DONE).exists():  # still being trained
            continue
        runs[kind] += 1
        keys = {found.key for found in findings(history)}
        without += not keys
        at_end.setdefault(kind, Counter()).update(keys)
        ever.setdefault(kind, Counter()).update(
            {found.key for end in range(1, len(history) + 1) for found in findings(history[:end])}
        )
    rows = [
        [kind, str(count), *(str(at_end[kind][key] or ".") for key in KINDS), _words(ever[kind])]
        for kind, count in runs.items()
    ]
    table = Table(["trainings", "number", *HEADINGS, "at any time"], rows)
    return f"{RECORDED.format(count=sum(runs.values()), without=without)}\n{markdown(table)}\n"


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{key} {count}" for key, count in counts.items()) or "."


def main() -> None:
    """Train, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, help="folder of recorded trainings")
    parser.add_argument("--histories", type=Path, help="folder to record the trainings in, or to read them from")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if args.quick else Size()
    header = ["", *HEADINGS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.histories or Path(temporary)
        faults, healthy = ([row(case, size, folder) for case in cases] for cases in (FAULTS, HEALTHY))
        later = [row(case, size, folder, first_seed=size.seeds) for case in HEALTHY]
    explanation = EXPLANATION.format(
        seeds=size.seeds, samples=size.samples, steps=size.steps, analyses=size.analyses,
        without=sum(each.without for each in healthy), without_later=sum(each.without for each in later),
        healthy=size.seeds * len(healthy),
    )  # fmt: skip
    parts = [
        "# Findings\n",
        explanation,
        f"## Planted faults\n\n{markdown(Table(header, [each.cells for each in faults]))}\n",
        f"## Healthy trainings\n\n{markdown(Table(header, [each.cells for each in healthy]))}\n",
        f"## Healthy trainings, other seeds\n\n{markdown(Table(header, [each.cells for each in later]))}\n",
        "## In words\n\n"
        + "\n".join(f"- {text}" for each in (*faults, *healthy, *later) for text in each.words)
        + "\n",
    ]
    if args.recorded is not None:
        parts.append(of_recorded(args.recorded))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "findings.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
