"""The outcomes as tables: for the terminal, Markdown, CSV, JSON and pandas."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_hesd.judgment.candidates import LAST, LOWEST_VALIDATION_LOSS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd.judgment.outcomes import Outcomes

    Row = dict[str, Any]

GAINS = {LAST: "over last", LOWEST_VALIDATION_LOSS: "over val loss"}
"""Names of the columns of gains of a single run."""


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        title: Line above the table.
        header: Names of the columns; the first column is left-aligned, the others right-aligned.
        rows: Cells; an empty row separates rules from baselines.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def as_text(self) -> str:
        """Return the table for the terminal."""
        lines = [self.header, *self.rows]
        widths = [max((len(line[place]) for line in lines if line), default=0) for place in range(len(self.header))]
        texts = []
        for line in lines:
            first, *others = line or [""] * len(widths)
            cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
            texts.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *texts])

    def as_markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [self.header, rule, *filter(None, self.rows)]
        # A vertical bar would begin a new cell.
        texts = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
        return "\n".join([f"{self.title}:", "", *texts])


def tables(outcomes: Outcomes) -> list[Table]:
    """Return the tables of the outcomes: a comparison with each baseline, or the picks of a single run."""
    if len(outcomes.runs) == 1:
        return [_picks(outcomes)]
    return [_comparison(outcomes, against) for against in outcomes.comparisons]


def summary(outcomes: Outcomes) -> Table:
    """Return the small table of the HESD tab: means and gains over the last epoch, or the picks of a single run."""
    if len(outcomes.runs) == 1:
        return _picks(outcomes)
    numbers, metric = outcomes.numbers, outcomes.metric
    header = ("", f"mean {metric.name}", "gain over last", f"{1 - outcomes.level:.0%} interval", "regret")

    def cells(row: Row) -> tuple[str, ...]:
        gain, low, high = (row.get(f"{key}_over_{LAST}", math.nan) for key in ("gain", "low", "high"))
        return f"{row['mean']:.4g}", numbers.difference(gain), numbers.interval(low, high)

    unit = f"; differences in{numbers.unit}" if numbers.unit else ""
    return Table(f"{metric.name}: picks of {len(outcomes.runs)} runs{unit}", header, _lines(outcomes, cells))


def _comparison(outcomes: Outcomes, against: str) -> Table:
    """Return the table of the comparison with one baseline."""
    numbers, metric = outcomes.numbers, outcomes.metric
    header = ("", "gain", f"{1 - outcomes.level:.0%} interval", "won/tied/lost", "p", "regret")

    def cells(row: Row) -> tuple[str, ...]:
        gain, low, high, p_value, wins, ties, losses = (
            row[f"{key}_over_{against}"] for key in ("gain", "low", "high", "p_value", "wins", "ties", "losses")
        )
        won = "" if wins is None else f"{wins}/{ties}/{losses}"
        return numbers.difference(gain), numbers.interval(low, high), won, _probability(p_value)

    unit = f", in{numbers.unit}" if numbers.unit else ""
    title = f"{metric.name}: gain over the {outcomes.titles[against]}, mean of {len(outcomes.runs)} runs{unit}"
    return Table(title, header, _lines(outcomes, cells))


def _picks(outcomes: Outcomes) -> Table:
    """Return the table of the picks of one run."""
    numbers, metric, [run] = outcomes.numbers, outcomes.metric, outcomes.runs
    gains = [GAINS[against] for against in outcomes.comparisons]
    header = ("", "epoch", "step", metric.name, *gains, "regret")

    def cells(row: Row) -> tuple[str, ...]:
        pick = run.picks[row["name"]]
        place = ("" if number is None else str(number) for number in (pick.epoch, pick.global_step))
        over = (numbers.difference(float(outcomes.gains(row["name"], other)[0])) for other in outcomes.comparisons)
        return *place, f"{pick.value:.4g}", *over

    unit = f"; differences in{numbers.unit}" if numbers.unit else ""
    return Table(f"{metric.name}: picks of the run {run.run}{unit}", header, _lines(outcomes, cells))


def _lines(outcomes: Outcomes, cells: Callable[[Row], tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return a line of each rule and baseline, with an empty one between: its title, its `cells`, and its regret."""
    of_kind: dict[str, list[tuple[str, ...]]] = {"rule": [], "baseline": []}
    for row in outcomes.rows:
        of_kind[row["kind"]].append((row["title"], *cells(row), outcomes.numbers.value(row["regret"])))
    gap = [()] if of_kind["rule"] else []
    return (*of_kind["rule"], *gap, *of_kind["baseline"])


def _probability(value: float) -> str:
    if math.isnan(value):
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


# Data -----------------------------------------------------------------------------------------------------------------


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV, with empty cells for what is missing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(without_nan(list(rows)))
    return text.getvalue()


def without_nan(value: Any) -> Any:
    """Return plain data with None in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
