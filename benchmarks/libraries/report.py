"""The table of results of the libraries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXPLANATION = """\
Each model is trained three times on synthetic data, for two to four epochs, on a CPU: without the callback; with
`HessianSpectrumCallback(checkpoint="highest_c_t")` as in the README; and with an independent computation of the extreme
eigenvalues after the last analysis.

- **weights**: whether all parameters and buffers have the same bits after training with and without the callback;
- **C_t, type**: of the last epoch, after very few epochs;
- **mode**: the mode in which the loss is analyzed; `deterministic` is training mode without dropout and batch
  statistics;
- **verified**: whether the analysis verified its HVPs by differences of the loss; `unknown`: it could not decide, for
  example because of kinks of the loss (ReLU) near the weights;
- **difference**: the largest relative difference of the loss, the smallest and the largest eigenvalue from those of the
  independent computation (plain double backward over the same batches, with ARPACK, in the float32 of training);
- **pick**: whether the pick of the rule loads, by `torch.load(weights_only=True)` or, if named, the library's function.
"""

AGREEMENT = 1e-4
"""Relative tolerance: the rounding of float32 HVPs for a small eigenvalue beside a large one."""

HEAD = ("library", "for", "Lightning", "model", "weights", "C_t", "type", "mode", "verified", "difference", "pick")


@dataclass(frozen=True)
class Tried:
    """A library that was tried.

    Attributes:
        name: Its name.
        kind: Field of use.
        date: Date of the trial.
        versions: Versions by package, including the library.
        outcomes: Outcomes of its cases.
    """

    name: str
    kind: str
    date: str
    versions: Mapping[str, str]
    outcomes: Sequence[Outcome]


def from_plain(plain: Mapping[str, Any]) -> Tried:
    """Return the trial of a library from plain values."""
    return Tried(**{**plain, "outcomes": [Outcome(**outcome) for outcome in plain["outcomes"]]})


def document(tried: Sequence[Tried]) -> str:
    """Return the report."""
    outcomes = [outcome for library in tried for outcome in library.outcomes]
    summary = (
        f"Made by `python -m benchmarks.libraries`: {len(tried)} libraries, {len(outcomes)} models. With "
        f"{sum(map(is_right, outcomes))} of them weights are identical, every epoch has a spectrum, the last of which "
        f"agrees with the independent computation to {AGREEMENT:g}, and the pick loads."
    )
    return "\n".join(
        [
            "# Libraries",
            "",
            summary,
            "",
            EXPLANATION,
            _line(HEAD),
            _line(["---"] * len(HEAD)),
            *(row for library in tried for row in rows_of(library)),
            "",
            "## Versions",
            "",
            *(f"- {t.name}, {t.date}: {', '.join(f'{k} {v}' for k, v in t.versions.items())}" for t in tried),
            "",
            "## Messages of the package, and notes",
            "",
            *(remark for library in tried for remark in _remarks(library)),
            "",
        ]
    )


def is_right(outcome: Outcome) -> bool:
    """Whether training was the same, every analysis has a spectrum, the last one agrees, and the pick loads."""
    agrees = outcome.difference is not None and outcome.difference < AGREEMENT
    return outcome.weights == "identical" and agrees and not outcome.failed and outcome.pick.startswith("loads")


def rows_of(library: Tried) -> list[str]:
    """Return the rows of a library."""
    name = f"{library.name} {library.versions[library.name]}"
    if not library.outcomes:
        return [_line([name, library.kind, "", "cannot be tried", *[""] * (len(HEAD) - 4)])]
    return [_line([name, library.kind, *_cells(outcome)]) for outcome in library.outcomes]


def _cells(outcome: Outcome) -> list[str]:
    front = [f"`{outcome.namespace}`", outcome.case]
    if outcome.raised:
        return [*front, "raised", *[""] * 6]
    if not outcome.verified:
        return [*front, outcome.weights, "none", *[""] * 4, outcome.pick]
    difference = "" if outcome.difference is None else f"{outcome.difference:.1g}"
    return [
        *front,
        outcome.weights,
        f"{outcome.c_t:.3g}",
        outcome.hesd_type,
        outcome.mode,
        outcome.verified,
        difference,
        outcome.pick,
    ]


def _remarks(library: Tried) -> list[str]:
    remarks: dict[str, list[str]] = {}
    for outcome in library.outcomes:
        told = [outcome.note, outcome.raised, *map(_plain, outcome.warnings)]
        for words in told:
            if words:
                remarks.setdefault(words, []).append(outcome.case)
    return [f"- {library.name}, {', '.join(cases)}: {words}" for words, cases in remarks.items()]


def _plain(warning: str) -> str:
    """Return a warning without its numbers, which differ between runs."""
    return re.sub(r"/\S*/", ".../", warning.removeprefix("lightning_hesd: "))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
