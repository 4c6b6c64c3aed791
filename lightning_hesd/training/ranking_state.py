"""What a checkpoint says of the candidates of a HessianCheckpoint, read without trust."""

from __future__ import annotations

from typing import Any

from lightning_hesd.spectra.foreign import each, having, integer, misfit, number, of, text
from lightning_hesd.spectra.selection import Candidate

_CANDIDATE = {
    "epoch": integer,
    "global_step": integer,
    "goodness": number,
    "criterion": number,
    "mainly_positive": of(bool),
    "path": text,
}
_STATE = {
    "candidates": each(having(_CANDIDATE)),
    "best_goodness": number,
    "offered_step": integer,
    "best_model_path": text,
    "last_model_path": text,
    "dirpath": text,
}


def wrong_field(state: object) -> str | None:
    """Return the name of the first field that is missing or is something else; None if there is none."""
    return misfit(state, _STATE)


def candidates_in(state: dict[str, Any]) -> list[Candidate]:
    """Return the candidates of a state without wrong fields; in the first versions they had no mark."""
    return [
        Candidate(**{name: values[name] for name in _CANDIDATE}, mark=str(values.get("mark", "")))
        for values in state["candidates"]
    ]
