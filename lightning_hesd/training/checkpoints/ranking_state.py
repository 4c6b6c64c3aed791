"""What a checkpoint says of the candidates of a HessianCheckpoint, read without trust."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.selection import Candidate
from lightning_hesd.spectra.validation import each, first_invalid_field, having, integer, number, of, optional, text

if TYPE_CHECKING:
    from collections.abc import Iterable

_CANDIDATE = {
    "epoch": integer,
    "global_step": integer,
    "score": number,
    "criterion": number,
    "mainly_positive": of(bool),
    "path": text,
}
_STATE = {
    "candidates": each(having(_CANDIDATE)),
    "best_goodness": number,
    "first_goodness": optional(number),
    "ranked": each(having({"global_step": integer, "score": number, "mainly_positive": of(bool)})),
    "offered_step": integer,
    "best_model_path": text,
    "last_model_path": text,
    "dirpath": text,
}


def wrong_field(state: object) -> str | None:
    """Return the name of the first field that is missing or is something else; None if there is none."""
    return first_invalid_field(completed(state), _STATE)


def completed(state: object) -> Any:
    """Return a state with what the first versions did not write: neither of these was needed."""
    return {"first_goodness": None, "ranked": [], **state} if isinstance(state, dict) else state


def candidates_in(state: dict[str, Any]) -> list[Candidate]:
    """Return the candidates of a state without wrong fields; in the first versions they had no mark."""
    return [
        Candidate(**{name: values[name] for name in _CANDIDATE}, mark=str(values.get("mark", "")))
        for values in state["candidates"]
    ]


def ranked_in(state: dict[str, Any]) -> list[Candidate]:
    """Return what a state says of all that were ranked: enough to tell which of them qualify."""
    return [
        Candidate(-1, r["global_step"], r["score"], math.nan, r["mainly_positive"], path="") for r in state["ranked"]
    ]


def ranked_state(ranked: Iterable[Candidate]) -> list[dict[str, Any]]:
    """Return what `ranked_in` reads."""
    return [{"global_step": c.global_step, "score": c.score, "mainly_positive": c.mainly_positive} for c in ranked]
