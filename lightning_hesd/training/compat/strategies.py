"""The strategy of a Trainer: whether it shards parameters, and on which device it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types

if TYPE_CHECKING:
    import lightning.pytorch as pl


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
