"""Sums over millions of elements are accurate; random vectors drawn in pieces are those drawn at once."""

import pytest
import torch

from lightning_hesd.numerics.krylov import vectors
from lightning_hesd.numerics.krylov.vectors import CHUNK, SUMMED, VectorSpace, gaussian_pieces, normalized, sign_pieces


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


def test_vectors_that_are_too_long_for_a_library_are_multiplied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's counts in 32 bits: `torch.dot` refuses more than 2³¹ − 1 elements there."""
    first, second = torch.randn(2, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, multiply, lengths = VectorSpace(25).dot(first, second), torch.dot, list[int]()

    def limited(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        lengths.append(len(a))
        return multiply(a, b)

    monkeypatch.setattr(torch, "dot", limited)
    monkeypatch.setattr(vectors, "LONGEST", 10)
    assert VectorSpace(25).dot(first, second).item() == pytest.approx(expected.item(), rel=1e-14)
    assert lengths == [10, 10, 5]


@pytest.mark.parametrize("size", [10, SUMMED + 3, 2**22 + 1])
def test_sums_are_as_accurate_as_their_terms(size: int) -> None:
    """Summed at once, the longest of these vectors has a norm that is wrong by 7e-5, and an inner product by 2e-3."""
    space = VectorSpace(size)
    vector = torch.rand(size, generator=torch.Generator().manual_seed(0))
    basis = torch.stack([vector, vector.flip(0)])
    tolerance = SUMMED**0.5 * torch.finfo(torch.float32).eps / 2  # a random walk of as many roundings
    exact = basis.double() @ vector.double()
    found = space.coefficients(basis, vector)
    assert found.dtype is space.norm(vector).dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(space.coefficients(basis, basis.T)[0].double(), exact, rtol=tolerance, atol=0)
    assert float(space.dot(vector, basis[1])) == pytest.approx(float(exact[1]), rel=tolerance)
    assert float(space.norm(vector)) == pytest.approx(float(exact[0].sqrt()), rel=tolerance)
    assert float(normalized(basis)[1].double().norm()) == pytest.approx(1, rel=tolerance)
    assert torch.equal(normalized(0 * basis), 0 * basis), "zero vectors have no direction"
