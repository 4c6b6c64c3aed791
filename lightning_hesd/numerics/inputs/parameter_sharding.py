"""How parameters are distributed over ranks: not at all, unless `distributed.fully_sharded` says otherwise."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.krylov.vectors import VectorSpace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions


class ParameterSharding:
    """No sharding: every rank holds all parameters, and evaluates its batches without the other ranks.

    Attributes:
        is_sharded: Whether ranks hold shards of the parameters, so that they must evaluate every batch together.
        collectives: Communication between the ranks that hold shards of the same parameters.
    """

    is_sharded: bool = False
    collectives: Collectives = LOCAL

    def check(self, options: AnalysisOptions) -> None:
        """Raise a ValueError for options that this sharding does not support."""

    def local_shards(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return this rank's shard of each parameter, a leaf to differentiate by."""
        return parameters

    def full_parameters(self, module: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return the context in which modules compute with full parameters that depend on the local shards."""
        return contextlib.nullcontext()

    def space(self, shards: Sequence[Tensor]) -> VectorSpace:
        """Return the space of vectors over some parameters, given their local shards."""
        return VectorSpace(sum(p.numel() for p in shards))

    def joint_batches(self, batches: Sequence[WeightedBatch]) -> Sequence[WeightedBatch]:
        """Return the batches that the ranks evaluate, given this rank's share of the batches."""
        return batches

    def evaluation(self) -> AbstractContextManager[None]:
        """Return the context of one evaluation of the user's functions."""
        return contextlib.nullcontext()

    def mean_loss(self, local_loss: Tensor, batch: WeightedBatch) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch, a scalar, given the loss that the user's function returned on this rank."""
        return local_loss
