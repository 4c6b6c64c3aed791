"""Random vectors drawn in pieces are those drawn at once, to the last bit."""

from __future__ import annotations

import pytest
import torch

from lightning_hesd.numerics.krylov.vectors import CHUNK, VectorSpace, gaussian_pieces, sign_pieces


@pytest.mark.parametrize("draw", ["gaussian", "signs"])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 8], [16], [3, 20], [5, 11, 16], [100, 1, 1], [CHUNK, 3], [9, 2 * CHUNK]])
def test_pieces_are_those_of_the_whole_vector(draw: str, sizes: list[int]) -> None:
    space = VectorSpace(sum(sizes))
    whole, pieces = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(2):  # what is drawn next is the same, too
        expected = getattr(space, draw)(whole)
        found = list((gaussian_pieces if draw == "gaussian" else sign_pieces)(sizes, pieces))
        assert [len(piece) for piece in found] == sizes
        assert torch.equal(torch.cat(found), expected)
