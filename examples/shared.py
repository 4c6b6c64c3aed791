"""What the studies of papers have in common: how a claim is judged, tables in Markdown, and silence."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Verdict = Literal["agrees", "differs", "cannot be seen at this scale", "not run"]
AGREES: Verdict = "agrees"
DIFFERS: Verdict = "differs"
UNSEEN: Verdict = "cannot be seen at this scale"
NOT_RUN: Verdict = "not run"


class Table(NamedTuple):
    """A table of a paper, or ours."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """How one claim of a paper came out."""

    claim: str
    rule: str
    evidence: str
    verdict: Verdict


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says that is known and harmless here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers",  # the data are in memory
            ".*smaller than the logging interval",  # nothing is logged by step
            ".*LeafSpec.*deprecated",  # Lightning 2.6 with torch 2.13
            ".*backward\\(\\) with create_graph=True",  # AdaHessian lets go of the graphs
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
