"""All cases."""

from __future__ import annotations

from tests.stress import faults, trainers
from tests.stress.harness import Case


def matrix(*, kills: int, seed: int, soak: int | None) -> list[Case]:
    """Return all cases.

    Args:
        kills: How many runs are killed, each way.
        seed: Of the moments of the kills.
        soak: Epochs of the soak; None: none.
    """
    return [*trainers.CASES, *faults.CASES]
