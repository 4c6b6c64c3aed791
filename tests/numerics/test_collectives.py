"""How ranks exchange values; real ranks are in `operators/test_diagonal_block.py` and `tests/training/test_ddp.py`."""

import pytest
import torch

from lightning_hesd.numerics.collectives import LOCAL, AnotherRankFailedError, Collectives
from tests.ranks import in_threads


def exchange(ranks: Collectives) -> list[object]:
    own = float(ranks.rank + 1)
    return [
        ranks.sum(torch.tensor([own, 1.0])).tolist(),
        ranks.sum_values([own, -own]),
        ranks.max(own),
        [ranks.any(ranks.rank == 1), ranks.any(False)],
        ranks.broadcast(f"rank {ranks.rank}"),
        ranks.is_distributed,
    ]


def test_a_single_rank_has_its_own_values_and_all_ranks_have_the_same() -> None:
    assert exchange(LOCAL) == [[1.0, 1.0], [1.0, -1.0], 1.0, [False, False], "rank 0", False]
    tensor = torch.ones(2)
    assert LOCAL.sum(tensor) is tensor
    expected = [[6.0, 3.0], [6.0, -6.0], 3.0, [True, False], "rank 0", True]
    assert in_threads(3, exchange) == [expected] * 3


@pytest.mark.parametrize("failing", [[], [1], [0, 2]])
def test_a_failure_on_one_rank_is_raised_on_all(failing: list[int]) -> None:
    def work(ranks: Collectives) -> str:
        def function() -> int:
            if ranks.rank in failing:
                raise KeyError(ranks.rank)
            return ranks.rank

        try:
            return f"returns {ranks.run_together(function)}"
        except (KeyError, AnotherRankFailedError) as error:
            return f"{type(error).__name__}: {error}"

    others = f"AnotherRankFailedError: the analysis failed on another rank (rank {min(failing, default=0)}: KeyError: "
    own = {rank: f"KeyError: {rank}" if rank in failing else f"{others}{min(failing, default=0)})" for rank in range(3)}
    assert in_threads(3, work) == [own[rank] if failing else f"returns {rank}" for rank in range(3)]


def test_a_failure_on_a_single_rank_is_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError):
        LOCAL.run_together(lambda: 1 / 0)
