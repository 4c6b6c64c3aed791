"""The space of flat vectors over the parameters: inner products, norms and random vectors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.devices import finest_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Generator, Tensor

BLOCK = 16
"""Number of normal random numbers that PyTorch draws together, on the CPU."""

SUMMED = 2**16
"""Products that are summed in float32, on the CPU, before the sums are added up in float64.

Libraries add up millions of numbers in a few running sums. Once these are large, what is added to them is rounded: the
norm of a vector of 25 million elements was wrong by 0.1 %.
"""

CHUNK = 2**16
"""Number of random numbers that are held at a time, where only pieces of a vector are kept."""


LONGEST = 2**31 - 1
"""Number of elements up to which the libraries of accelerators multiply vectors: they count in 32 bits."""


class VectorSpace:
    """The space of vectors of shape (n,), whole on this rank.

    Where parameters are sharded, a subclass takes this rank's shard of a vector, shape (m,), for the vector, and the
    results are the same on all ranks.

    Attributes:
        dimension: Number n of elements of a whole vector.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def total(self, value: float) -> float:
        """Return the sum, over the shards of a vector, of a number computed from each."""
        return value

    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the inner product, a scalar."""
        return inner_product(first, second)

    def norm(self, vector: Tensor) -> Tensor:
        """Return the norm, a scalar."""
        return euclidean_norm(vector)

    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        """Return the inner products of a vector with the rows of a basis, shape (rows,)."""
        return inner_products(basis, vector)

    def is_finite(self, vector: Tensor) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(vector.isfinite().all())

    def gaussian(self, generator: Generator) -> Tensor:
        """Draw a vector of standard normal numbers, float64, on the CPU."""
        return torch.randn(self.dimension, generator=generator, dtype=torch.float64, device=generator.device)

    def signs(self, generator: Generator) -> Tensor:
        """Draw a vector of ±1, float64, on the CPU."""
        return _signs(self.dimension, generator)

    def parameters_moved(self) -> None:
        """Take note that the parameters have other values now, so that none of the old ones are used."""


# Sums ---------------------------------------------------------------------------------------------------------------


def inner_product(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner product of two vectors, shape (n,), to the precision of their dtype: a scalar."""
    length = _summed_at_once(first)
    if len(first) <= length:
        return torch.dot(first, second)
    pieces = zip(torch.split(first, length), torch.split(second, length), strict=True)
    return _in_finest([torch.dot(a, b) for a, b in pieces]).sum().to(first.dtype)


def euclidean_norm(vector: Tensor) -> Tensor:
    """Return the norm of a vector, shape (n,), to the precision of its dtype: a scalar."""
    length = _summed_at_once(vector)
    if len(vector) <= length:
        norm: Tensor = torch.linalg.vector_norm(vector)
        return norm
    norms = [torch.linalg.vector_norm(piece) for piece in torch.split(vector, length)]
    return _in_finest(norms).square().sum().sqrt().to(vector.dtype)


def inner_products(rows: Tensor, vector: Tensor) -> Tensor:
    """Return the inner products of rows, shape (m, n), with a vector, shape (n,), or with columns, shape (n, k)."""
    length = _summed_at_once(vector)
    if len(vector) <= length:
        return rows @ vector
    pieces = zip(torch.split(rows, length, dim=1), torch.split(vector, length), strict=True)
    total = torch.zeros(len(rows), *vector.shape[1:], dtype=finest_dtype(vector.device), device=vector.device)
    for own, piece in pieces:
        total += own @ piece
    return total.to(vector.dtype)


def normalized(vectors: Tensor) -> Tensor:
    """Return the rows of `vectors`, shape (m, n), divided by their norms; a row of zeros stays as it is."""
    norms = torch.stack([euclidean_norm(vector) for vector in vectors])
    return vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny)[:, None]


def _in_finest(sums: Sequence[Tensor]) -> Tensor:
    """Return scalars as a vector in the finest precision of their device."""
    return torch.stack(list(sums)).to(finest_dtype(sums[0].device))


def _summed_at_once(vector: Tensor) -> int:
    """Return the number of elements whose sum is rounded no more than the elements; accelerators sum in a tree."""
    return SUMMED if vector.device.type == "cpu" and vector.dtype is not torch.float64 else LONGEST


# Random vectors -----------------------------------------------------------------------------------------------------


def _signs(n: int, generator: Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator, device=generator.device).double().mul_(2).sub_(1)


def gaussian_pieces(sizes: Sequence[int], generator: Generator) -> Iterator[Tensor]:
    """Yield the vector that `VectorSpace.gaussian` draws, in pieces of some sizes, never holding all of it."""
    return _pieces(sizes, _gaussian_chunks(sum(sizes), generator))


def sign_pieces(sizes: Sequence[int], generator: Generator) -> Iterator[Tensor]:
    """Yield the vector that `VectorSpace.signs` draws, in pieces of some sizes, never holding all of it."""
    n = sum(sizes)
    return _pieces(sizes, (_signs(min(CHUNK, n - start), generator) for start in range(0, n, CHUNK)))


def _gaussian_chunks(n: int, generator: Generator) -> Iterator[Tensor]:
    """Yield the numbers of `torch.randn(n)` in chunks.

    `torch.randn` fills the vector in blocks of 16 numbers. If the last block is incomplete, it first fills the other
    elements, and then draws the last 16 elements anew.
    """
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, device=generator.device)
    whole = n if n < BLOCK or n % BLOCK == 0 else n - BLOCK
    if n < BLOCK:
        yield draw(n)
        return
    drawn = 0
    while drawn < whole:
        count = min(CHUNK, -(-(whole - drawn) // BLOCK) * BLOCK)
        yield draw(count)[: whole - drawn]
        drawn += count
    if whole < n:
        torch.rand(n - drawn, generator=generator, dtype=torch.float64, device=generator.device)
        yield draw(BLOCK)


def _pieces(sizes: Sequence[int], chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield a stream of chunks, cut anew into pieces of some sizes."""
    rest = torch.empty(0, dtype=torch.float64, device="cpu")
    for size in sizes:
        collected = [rest]
        missing = size - len(rest)
        while missing > 0:
            collected.append(next(chunks))
            missing -= len(collected[-1])
        joined = torch.cat(collected)
        yield joined[:size]
        rest = joined[size:]


def norm_of(tensor: Tensor) -> Tensor:
    """Return the norm of a tensor, a scalar, summed in the finest precision of its device."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=finest_dtype(tensor.device))
    return norm


def in_shape(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """View a flat vector, shape (n,), in the shapes, and cast it to the dtypes, of the parameters."""
    pieces = torch.split(vector, [p.numel() for p in parameters])
    return [piece.view_as(p).to(p.dtype) for piece, p in zip(pieces, parameters, strict=True)]


def add_in_shape(total: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int], factor: float = 1.0) -> None:
    """Add a multiple of a vector in the shapes of parameters of some sizes to a flat vector, shape (n,), in place."""
    for target, tensor in zip(torch.split(total, list(sizes)), tensors, strict=True):
        if tensor is not None:
            target.view_as(tensor).add_(tensor, alpha=factor)
