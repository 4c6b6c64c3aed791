"""All cases."""

from tests.stress import faults, interruptions, trainers
from tests.stress import soak as soaking
from tests.stress.harness import Case


def matrix(*, kills: int, seed: int, soak: int | None) -> list[Case]:
    """Return all cases: `kills` runs are killed each way, and the soak takes `soak` epochs."""
    return [
        *trainers.CASES,
        *faults.CASES,
        *interruptions.cases(kills_each_way=kills, seed=seed),
        *(soaking.cases(soak) if soak else []),
    ]
