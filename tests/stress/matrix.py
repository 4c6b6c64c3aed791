"""All cases."""

from __future__ import annotations

from tests.stress import faults, interruptions, trainers
from tests.stress import soak as soaking
from tests.stress.harness import Case


def matrix(*, kills: int, seed: int, soak: int | None) -> list[Case]:
    """Return all cases.

    Args:
        kills: How many runs are killed, each way.
        seed: Of the moments of the kills.
        soak: Epochs of the soak; None: none.
    """
    return [
        *trainers.CASES,
        *faults.CASES,
        *interruptions.cases(kills_each_way=kills, seed=seed),
        *(soaking.cases(soak) if soak else []),
    ]
