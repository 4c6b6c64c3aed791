"""The strategy of a Trainer: how it shards parameters, how ranks communicate, and on which device it computes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_hesd.numerics.collectives import LOCAL, Collectives, DistributedCollectives
from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl

T = TypeVar("T")


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that shard parameters in a way that analyses do not support.

    Raises:
        MisconfigurationException: If the Trainer's strategy is one of them.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, lightning_types("strategies.FSDPStrategy", "strategies.DeepSpeedStrategy")):
        msg = (
            f"{type(strategy).__name__} shards the parameters in a way that analyses do not support: shard them by "
            "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), with `fully_shard` in "
            "`configure_model`, or use a strategy that replicates them (such as 'ddp')."
        )
        raise MisconfigurationException(msg)
    if is_sharded(trainer) and strategy.device_mesh["tensor_parallel"].size() > 1:
        msg = (
            "ModelParallelStrategy(tensor_parallel_size="
            f"{strategy.device_mesh['tensor_parallel'].size()}) splits layers over ranks, which analyses do not "
            f"support: use data_parallel_size={trainer.world_size} and tensor_parallel_size=1."
        )
        raise MisconfigurationException(msg)


def is_sharded(trainer: pl.Trainer) -> bool:
    """Return whether parameters may be sharded, so that all ranks must work on every batch together."""
    return isinstance(trainer.strategy, lightning_types("strategies.ModelParallelStrategy"))


def check_whole(trainer: pl.Trainer, option: str) -> None:
    """Refuse an option that needs whole parameters on every rank.

    Raises:
        MisconfigurationException: If parameters may be sharded.
    """
    if is_sharded(trainer):
        msg = (
            f"`{option}` is not available with {type(trainer.strategy).__name__}, which shards the parameters: leave "
            "it out."
        )
        raise MisconfigurationException(msg)


def wait_for_device(trainer: pl.Trainer) -> None:
    """Wait for the operations that training has queued on its accelerator, so that they do not count as analysis."""
    module: Any = getattr(torch, trainer.strategy.root_device.type, None)
    if hasattr(module, "synchronize"):
        module.synchronize()  # of the present device, which is the Trainer's


# Ranks ----------------------------------------------------------------------------------------------------------------


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


def add_result_of_fit(trainer: pl.Trainer, key: str, value: object) -> None:
    """Add a value to what rank zero sends to the process that started the fit, if this process ends with the fit."""
    launcher = trainer.strategy.launcher
    kind = lightning_types("strategies.launchers.multiprocessing._MultiProcessingLauncher")
    if trainer.is_global_zero and isinstance(launcher, kind):
        collect = launcher.get_extra_results
        launcher.get_extra_results = lambda trainer: {**collect(trainer), key: value}  # of this process, which ends


@contextlib.contextmanager
def saving_together(trainer: pl.Trainer) -> Iterator[None]:
    """Let `Trainer.save_checkpoint` fail on all ranks if the file cannot be written on one of them.

    Otherwise the ranks that write nothing would wait for the one that has failed. What writes the file may be a plugin
    of the user's, which raises what it likes.
    """
    strategy, save, write = trainer.strategy, trainer.save_checkpoint, trainer.strategy.save_checkpoint

    def save_together(*args: Any, **kwargs: Any) -> None:
        failures: list[Exception] = []

        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - raised below, on all ranks
                failures.append(error)

        with patched(strategy, "save_checkpoint", attempt):
            save(*args, **kwargs)
        if collectives_of(trainer).any(bool(failures)):
            raise failures[0] if failures else OSError("another process could not write the checkpoint")

    # A strategy for sharded parameters writes on all ranks, which wait for each other while they write.
    with contextlib.nullcontext() if is_sharded(trainer) else patched(trainer, "save_checkpoint", save_together):
        yield
