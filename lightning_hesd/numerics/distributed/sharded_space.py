"""Vectors over sharded parameters: every rank has the elements of its shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from lightning_hesd.numerics.krylov.vectors import VectorSpace, gaussian_pieces, sign_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Generator, Tensor

    from lightning_hesd.numerics.collectives import Collectives
    from lightning_hesd.numerics.distributed.gathering import Shard


class ShardedSpace(VectorSpace):
    """Vectors over sharded parameters; a tensor of shape (m,) has the elements of this rank's shards."""

    def __init__(self, shards: Sequence[Shard], collectives: Collectives) -> None:
        super().__init__(sum(shard.parameter.numel() for shard in shards))
        self._shards = shards
        self._collectives = collectives

    @override
    def total(self, value: float) -> float:
        return self._sum(torch.tensor(value, dtype=torch.float64)).item()

    @override
    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        return self._sum(torch.dot(first, second))

    @override
    def norm(self, vector: Tensor) -> Tensor:
        return self._sum(torch.linalg.vector_norm(vector, dtype=torch.float64).square()).sqrt().to(vector.dtype)

    @override
    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        return self._sum(basis @ vector)

    @override
    def is_finite(self, vector: Tensor) -> bool:
        return not self._collectives.any(not vector.isfinite().all())

    @override
    def gaussian(self, generator: Generator) -> Tensor:
        return self._draw(gaussian_pieces, generator)

    @override
    def signs(self, generator: Generator) -> Tensor:
        return self._draw(sign_pieces, generator)

    def _sum(self, local: Tensor) -> Tensor:
        return self._collectives.sum(local.double()).to(local.dtype)

    def _draw(self, pieces: Callable[[Sequence[int], Generator], Iterator[Tensor]], generator: Generator) -> Tensor:
        """Draw the elements of each parameter, in turn, and keep those of this rank's shard."""
        shapes = [shard.parameter.shape for shard in self._shards]
        drawn = zip(self._shards, shapes, pieces([shape.numel() for shape in shapes], generator), strict=True)
        # Copied, because a view would keep all elements in memory.
        return torch.cat([shard.own(piece.view(shape)).flatten().clone() for shard, shape, piece in drawn])
