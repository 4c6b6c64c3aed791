"""Communication between the ranks of a Trainer, and how its strategy distributes the parameters over them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_hesd.numerics.collectives import LOCAL, Collectives, DistributedCollectives
from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.training.compat.strategies import is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl

T = TypeVar("T")


class _TrainerCollectives(DistributedCollectives):
    """Communication between the ranks of a Trainer, by its strategy where that has a method for it."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer.strategy.root_device)
        self._strategy = trainer.strategy

    @override
    def any(self, flag: bool) -> bool:
        return self._strategy.reduce_boolean_decision(flag, all=False)

    @override
    def broadcast(self, value: T) -> T:
        return self._strategy.broadcast(value)


def collectives_of(trainer: pl.Trainer) -> Collectives:
    """Return the communication between all ranks of a Trainer."""
    return LOCAL if trainer.world_size == 1 else _TrainerCollectives(trainer)


def parameter_sharding_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ParameterSharding:
    """Return how the parameters of a module are distributed over the ranks of its Trainer.

    Raises:
        UnsupportedShardingError: If the analysis does not support how they are sharded.
    """
    if not is_sharded(trainer):
        return ParameterSharding()
    # Not every build of PyTorch has the modules that these import.
    from lightning_hesd.numerics.distributed.checked_collectives import CheckedCollectives  # noqa: PLC0415
    from lightning_hesd.numerics.distributed.fully_sharded import FullySharded  # noqa: PLC0415

    return FullySharded(pl_module, CheckedCollectives(trainer.strategy.root_device))


def is_first_rank() -> bool:
    """Return whether this is rank 0 of those that Lightning, torchrun or SLURM started; also without a Trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextlib.contextmanager
def saving_together(trainer: pl.Trainer) -> Iterator[None]:
    """Let `Trainer.save_checkpoint` raise OSError on all ranks if the file cannot be written on one of them.

    Otherwise the ranks that write nothing would wait for the one that has failed.
    """
    strategy, save, write = trainer.strategy, trainer.save_checkpoint, trainer.strategy.save_checkpoint

    def save_together(*args: Any, **kwargs: Any) -> None:
        failures: list[OSError] = []

        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except OSError as error:
                failures.append(error)

        with patched(strategy, "save_checkpoint", attempt):
            save(*args, **kwargs)
        if collectives_of(trainer).any(bool(failures)):
            raise failures[0] if failures else OSError("another process could not write the checkpoint")

    # A strategy for sharded parameters writes on all ranks, which wait for each other while they write.
    with contextlib.nullcontext() if is_sharded(trainer) else patched(trainer, "save_checkpoint", save_together):
        yield
