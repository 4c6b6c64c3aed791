"""The positions of the analysis samples in checkpoints: a resumed run reads the same samples."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.validation import at_least, each, first_invalid_field, optional
from lightning_hesd.training.samples.epochs import PlannedBatch, plain_key

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLES = {
    "indices": optional(each(at_least(0))),
    "lengths": each(at_least(0)),
    "positions": each(at_least(0)),
    "num_samples": at_least(1),
}
"""The fields of the state."""


def sample_state(batches: Sequence[PlannedBatch] | None, num_samples: int) -> dict[str, Any]:
    """Return the state of the samples; None for batches that have no positions."""
    indices = [plain_key(key) for batch in batches or () for key in batch.keys]
    # Keys of other types are not written to checkpoints; a resumed run draws them again with the same seed.
    is_plain = batches is not None and all(type(key) is int and key >= 0 for key in indices)
    return {
        "indices": indices if is_plain else None,
        "lengths": [len(batch.keys) for batch in batches or ()],
        "positions": [batch.position for batch in batches or ()],
        "num_samples": num_samples,
    }


def planned_batches(state: dict[str, Any]) -> tuple[PlannedBatch, ...] | None:
    """Return the batches of a state; None if their positions are not in it."""
    if state["indices"] is None:
        return None
    keys = iter(state["indices"])
    return tuple(
        PlannedBatch(list(itertools.islice(keys, length)), position)
        for length, position in zip(state["lengths"], state["positions"], strict=True)
    )


def check_samples(state: object) -> None:
    """Check the state of the samples in a checkpoint.

    Raises:
        ValueError: If it is not a state that `sample_state` returns.
    """
    invalid = first_invalid_field(state, SAMPLES)
    if invalid is not None:
        msg = f"`{invalid}` of the samples is missing or invalid: the checkpoint is damaged, or of another version."
        raise ValueError(msg)
    of: dict[str, Any] = state  # type: ignore[assignment]  # checked above
    if of["indices"] is not None and (
        sum(of["lengths"]) != len(of["indices"]) or len(of["lengths"]) != len(of["positions"])
    ):
        msg = (
            "the samples of the checkpoint are damaged: `lengths` must add up to the number of `indices`, and have as "
            f"many entries as `positions`, got a sum of {sum(of['lengths'])} for {len(of['indices'])} indices, and "
            f"{len(of['lengths'])} entries for {len(of['positions'])} positions."
        )
        raise ValueError(msg)
