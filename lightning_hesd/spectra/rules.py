"""The checkpoint rules, which rank the analyzed states of a run. To add a rule, add an entry to `RULES`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.record import RECORDED_BY

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd.spectra.record import SpectrumRecord


@dataclass(frozen=True)
class CheckpointRule:
    """A rule that ranks records by a criterion.

    Attributes:
        name: Name in the code, in configurations and in names of files.
        title: Name in sentences, such as "highest C_t".
        short_title: Name in cells of a table.
        criterion: Function of the fields in `needs`; the record with the highest value wins.
        needs: Fields or properties of the record that the criterion is computed from, in the order of its arguments.
        scalar: Key of the scalar that the criterion is made from: charts of this scalar mark the picks.
        marker: Matplotlib's code of the mark of a pick.
    """

    name: str
    title: str
    short_title: str
    criterion: Callable[..., float]
    needs: tuple[str, ...] = ("spectrum",)
    scalar: str | None = None
    marker: str = "D"

    def score(self, record: SpectrumRecord) -> float:
        """Return the criterion of a record, higher is better; NaN if the record lacks a field that the rule needs."""
        found: list[Any] = [getattr(record, field) for field in self.needs]
        return math.nan if any(value is None for value in found) else float(self.criterion(*found))

    def complaint(self, record: SpectrumRecord) -> str | None:
        """Return what the rule needs that the run does not record, and what to do; None if a record lacks nothing.

        None also for a record of which a part failed: its `error` says what is missing.
        """
        missing = next((field for field in self.needs if getattr(record, field) is None), None)
        if missing is None or record.error is not None:
            return None
        return (
            f"the rule {self.name!r} does not rank the analysis of epoch {record.epoch}, nor later ones like it: it "
            f"needs `{missing}`, which the record lacks. Pass `{RECORDED_BY.get(missing, missing)}` to "
            "HessianSpectrumCallback, which records it, or choose another rule."
        )


RULES: dict[str, CheckpointRule] = {
    rule.name: rule
    for rule in (
        CheckpointRule("highest_c_t", "highest C_t", "C_t", lambda spectrum: spectrum.c_t, scalar="c_t", marker="^"),
        CheckpointRule(
            "lowest_max_eigenvalue",
            "lowest λ_max",
            "λ_max",
            lambda spectrum: -spectrum.lambda_max,
            scalar="lambda_max",
            marker="v",
        ),
    )
}
"""The rules by name: that of Gabdullin (2025), section 4.2, and the one it is compared with there."""


def rule_title(name: str) -> str:
    """Return the title of a rule; of a function that the user gave as rule, its name."""
    return RULES[name].title if name in RULES else name


def rule_short_title(name: str) -> str:
    """Return the short title of a rule; of a function that the user gave as rule, its name."""
    return RULES[name].short_title if name in RULES else name
