"""Collective operations of the ranks of a Trainer."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.operators.risk_operator import AnotherProcessFailedError
from lightning_hesd.training.compat.strategies import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_hesd.numerics.inputs.parameter_sharding import AllReduce

    T = TypeVar("T")


def make_all_reduce(trainer: pl.Trainer) -> AllReduce | None:
    """Return a sum over the processes of the trainer; None if there is one process only."""
    if trainer.world_size == 1:
        return None

    def all_reduce(tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    return all_reduce


def together(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """Do `work` in every process, and fail in every process if it fails in one.

    Raises:
        AnotherProcessFailedError: If it failed elsewhere.
    """
    if trainer.world_size == 1:
        return work()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - raised again below, once the others know
        failure = error
    failed = torch.tensor(float(failure is not None), device=trainer.strategy.root_device)
    torch.distributed.all_reduce(failed)
    if failed > 0:
        raise failure or AnotherProcessFailedError
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def failing_in_step(trainer: pl.Trainer) -> Iterator[None]:
    """Let a block fail on every rank if it fails on one.

    Raises:
        AnotherProcessFailedError: If it failed on another rank only.
    """
    if trainer.world_size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again below, once the other ranks know
        failure = error
    if anywhere(trainer, failure is not None):
        raise failure or AnotherProcessFailedError


def added_up(trainer: pl.Trainer, work: Callable[[], list[float]]) -> list[float]:
    """Do `work` in every process, and return the sums of what they found; fail in all if it fails in one."""
    own = together(trainer, work)
    if trainer.world_size == 1:
        return own
    total = torch.tensor(own, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def is_first_process() -> bool:
    """Whether this is process zero of those that Lightning, torchrun or SLURM started; also where no Trainer is."""
    return getattr(rank_zero_only, "rank", 0) == 0


def anywhere(trainer: pl.Trainer, happened: bool) -> bool:  # noqa: FBT001 - the thing itself, no option
    """Return whether something happened in any process; every process must ask."""
    return trainer.strategy.reduce_boolean_decision(happened, all=False)


@contextlib.contextmanager
def failing_together(trainer: pl.Trainer) -> Iterator[None]:
    """Let `Trainer.save_checkpoint` raise OSError in all processes if the file cannot be written in one of them.

    Otherwise those that write nothing would wait for the one that has failed.
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
        if anywhere(trainer, bool(failures)):
            raise failures[0] if failures else OSError("another process could not write the checkpoint")

    # A sharded strategy writes in all processes, which wait for each other within.
    with contextlib.nullcontext() if is_sharded(trainer) else patched(trainer, "save_checkpoint", save_together):
        yield
