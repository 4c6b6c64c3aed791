"""The space of flat vectors over the parameters: what an algorithm on them needs beyond elementwise arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.devices import finest_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Generator, Tensor

BLOCK = 16
"""PyTorch makes normal numbers in blocks of so many, on the CPU."""

CHUNK = 2**16


class VectorSpace:
    """Vectors of shape (n,) that this process holds as a whole.

    Where every process holds a part only (see `sharding`), a vector is that part, shape (m,), and what is computed here
    is the same in all processes.

    Attributes:
        dimension: n.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def total(self, value: float) -> float:
        """Return the sum of what was computed from the parts of a vector."""
        return value

    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the inner product, a scalar."""
        return torch.dot(first, second)

    def norm(self, vector: Tensor) -> Tensor:
        """Return the length, a scalar."""
        norm: Tensor = torch.linalg.vector_norm(vector)
        return norm

    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        """Return the inner products with the rows of `basis`, shape (rows,)."""
        return basis @ vector

    def is_finite(self, vector: Tensor) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(vector.isfinite().all())

    def gaussian(self, generator: Generator) -> Tensor:
        """Draw a vector of standard normal numbers, float64, on the CPU."""
        return torch.randn(self.dimension, generator=generator, dtype=torch.float64)

    def signs(self, generator: Generator) -> Tensor:
        """Draw a vector of ±1, float64, on the CPU."""
        return _signs(self.dimension, generator)


def _signs(n: int, generator: Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator).double().mul_(2).sub_(1)


def gaussian_pieces(sizes: Sequence[int], generator: Generator) -> Iterator[Tensor]:
    """Yield what `VectorSpace.gaussian` draws, in pieces of these sizes, without ever holding all of it."""
    return _pieces(sizes, _gaussian_chunks(sum(sizes), generator))


def sign_pieces(sizes: Sequence[int], generator: Generator) -> Iterator[Tensor]:
    """Yield what `VectorSpace.signs` draws, in pieces of these sizes, without ever holding all of it."""
    n = sum(sizes)
    return _pieces(sizes, (_signs(min(CHUNK, n - start), generator) for start in range(0, n, CHUNK)))


def _gaussian_chunks(n: int, generator: Generator) -> Iterator[Tensor]:
    """Draw `torch.randn(n)` in chunks.

    It goes through the vector in blocks. Where the last one would be incomplete, the last 16 elements are drawn again,
    after what the rest of the vector would have taken from the generator.

    Yields:
        The chunks.
    """
    draw: Callable[..., Tensor] = torch.randn
    whole = n if n < BLOCK or n % BLOCK == 0 else n - BLOCK
    if n < BLOCK:
        yield draw(n, generator=generator, dtype=torch.float64)
        return
    drawn = 0
    while drawn < whole:
        count = min(CHUNK, -(-(whole - drawn) // BLOCK) * BLOCK)
        yield draw(count, generator=generator, dtype=torch.float64)[: whole - drawn]
        drawn += count
    if whole < n:
        torch.rand(n - drawn, generator=generator, dtype=torch.float64)
        yield draw(BLOCK, generator=generator, dtype=torch.float64)


def _pieces(sizes: Sequence[int], chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Cut a stream of chunks.

    Yields:
        Pieces of these sizes.
    """
    rest = torch.empty(0, dtype=torch.float64)
    for size in sizes:
        parts = [rest]
        missing = size - len(rest)
        while missing > 0:
            parts.append(next(chunks))
            missing -= len(parts[-1])
        joined = torch.cat(parts)
        yield joined[:size]
        rest = joined[size:]


def norm_of(part: Tensor) -> Tensor:
    """Return the norm of a tensor, a scalar, summed in the finest precision of its device."""
    norm: Tensor = torch.linalg.vector_norm(part, dtype=finest_dtype(part.device))
    return norm


def in_shape(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """View a flat vector, shape (n,), in the shapes, and cast it to the dtypes, of the parameters."""
    parts = torch.split(vector, [p.numel() for p in parameters])
    return [part.view_as(p).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]
