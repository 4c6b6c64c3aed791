"""`Judgment`: the comparison of the checkpoint rules over runs, as sentence, tables, data and figure."""

from __future__ import annotations

import html
import json
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.judgment.candidates import LAST
from lightning_hesd.judgment.outcomes import Outcomes
from lightning_hesd.judgment.tables import as_csv, summary, tables, without_nan
from lightning_hesd.judgment.verdict import baselines_verdict, verdict
from lightning_hesd.spectra.analysis_lines import WIDTH
from lightning_hesd.spectra.files import save_text

if TYPE_CHECKING:
    import os

    import pandas as pd
    from matplotlib.axes import Axes


class Judgment(Outcomes):
    """What the picks of the checkpoint rules were worth, and whether one is evidently better than the last epoch.

    `str()` gives tables, remarks and `sentence` as plain text; `rows` has the numbers, `runs` the pick of every rule in
    every run.
    """

    @property
    def sentence(self) -> str:
        """The result in a sentence, with the largest gain over the last epoch and its simultaneous interval."""
        return verdict(self)

    @property
    def remarks(self) -> list[str]:
        """Sentences about baselines and the lowest validation loss, and notes on what was compared."""
        others = [verdict(self, against) for against in self.comparisons if against != LAST]
        return [*baselines_verdict(self), *others, *self.notes]

    @property
    def table(self) -> pd.DataFrame:
        """A pandas table with a row for each rule and baseline: see `rows`.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas  # noqa: ICN001, PLC0415 - optional, and slow to import
        except ImportError as error:
            msg = "the table of a judgment needs pandas, which is not installed: pip install pandas. `rows` does not."
            raise ImportError(msg) from error
        return pandas.DataFrame(self.rows)

    def __repr__(self) -> str:
        """Return the sentence."""
        return f"<Judgment: {self.sentence}>"

    def __str__(self) -> str:
        """Return tables, remarks and the sentence as plain text for a terminal."""
        texts = [table.as_text() for table in tables(self)]
        remarks = "\n".join(textwrap.fill(remark, WIDTH) for remark in self.remarks)
        return "\n\n".join([*texts, *([remarks] if remarks else []), textwrap.fill(self.sentence, WIDTH)])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the sentence, tables and remarks."""
        from lightning_hesd.plotting import table_html  # noqa: PLC0415 - Matplotlib is slow to import

        shown = [f"<div>{html.escape(t.title)}</div>{table_html(t.header, t.rows)}" for t in tables(self)]
        remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in self.remarks)
        return f"<div><b>{html.escape(self.sentence)}</b></div>{''.join(shown)}<ul>{remarks}</ul>"

    def markdown(self) -> str:
        """Return the sentence, tables and remarks in Markdown."""
        texts = [table.as_markdown() for table in tables(self)]
        remarks = "\n".join(f"- {remark}" for remark in self.remarks)
        return "\n\n".join([f"**{self.sentence}**", *texts, *([remarks] if remarks else [])]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON, with None for numbers that are absent.

        `summary` is a small table of texts, `table` has the numbers: see `rows`.
        """
        runs = [
            {
                "run": run.run,
                "judged": run.judged,
                "trained": run.trained,
                "candidates": run.candidates,
                "rivals": {name: list(epochs) for name, epochs in run.rivals.items()},
                "picks": {
                    name: {"epoch": pick.epoch, "global_step": pick.global_step, "value": pick.value}
                    for name, pick in run.picks.items()
                },
            }
            for run in self.runs
        ]
        found: dict[str, Any] = without_nan(
            {
                "metric": self.metric.name,
                "mode": self.metric.mode,
                "candidates": self.candidates,
                "level": self.level,
                "sentence": self.sentence,
                "remarks": self.remarks,
                "summary": summary(self)._asdict(),
                "table": self.rows,
                "runs": runs,
            }
        )
        return found

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `rows` as CSV, with empty cells for numbers that are absent."""
        save_text(path, as_csv(self.rows))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON."""
        save_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def to_markdown(self, path: str | os.PathLike[str]) -> None:
        """Write `markdown()`."""
        save_text(path, self.markdown())

    def plot(self, ax: Axes | None = None, against: str = LAST) -> Axes:
        """Draw the gain of each rule and baseline over another baseline, with its interval and the gains of all runs.

        Args:
            ax: Axes to draw on; default: those of a new figure.
            against: "last" or "lowest_validation_loss".

        Raises:
            ValueError: If there is no comparison with that baseline.
        """
        from lightning_hesd.plotting import plot_gains  # noqa: PLC0415 - Matplotlib is slow to import

        if against not in self.comparisons:
            msg = f"there is no comparison with {against!r}: `against` must be one of {', '.join(self.comparisons)}."
            raise ValueError(msg)
        comparison, numbers = self.comparisons[against], self.numbers
        found = comparison.statistics
        unit = f" ({numbers.unit.strip()})" if numbers.unit else ""
        return plot_gains(
            [self.titles[name] for name in comparison.names],
            numbers.factor * found.gains,
            numbers.factor * np.stack([found.low, found.means, found.high]),
            evident=found.better | found.worse,
            first_baseline=sum(name in self.rules for name in comparison.names),
            label=f"gain in {self.metric.name}{unit} over the {self.titles[against]}\n"
            f"(bars: {1 - self.level:.0%} intervals; marks: runs)",
            ax=ax,
        )
