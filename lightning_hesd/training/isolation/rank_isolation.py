"""Evaluations on several ranks without collectives: an analysis gives each rank another number of batches."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lightning_hesd.training.compat import strategies
from lightning_hesd.training.isolation.silence import Overrides
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl

_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv"),
)


class RankIsolation:
    """Keeps evaluations of the user's functions from waiting for other ranks."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Get from the other ranks what an evaluation may ask for: the folder of the run.

        Args:
            trainer: The Trainer; all ranks take part.
        """
        self._trainer = trainer
        self._is_needed = trainer.world_size > 1 and not strategies.is_sharded(trainer)
        self._local_folder = self._folder = None
        if self._is_needed:
            with contextlib.ExitStack() as stack:
                Overrides(stack).set(vars(trainer.strategy), "broadcast", lambda folder, *_: folder)
                self._local_folder = trainer.log_dir
            self._folder = trainer.strategy.broadcast(self._local_folder)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Refuse collectives in this context, and pass barriers without waiting.

        Raises:
            DisturbedTrainingError: In calls of collectives.
        """
        if not self._is_needed:
            yield
            return
        with contextlib.ExitStack() as stack:
            overrides = Overrides(stack)
            strategy, collectives = vars(self._trainer.strategy), vars(torch.distributed)
            for name in _COLLECTIVES:
                overrides.set(collectives, name, _refused(name))
            for name in ("reduce", "all_gather", "reduce_boolean_decision"):
                overrides.set(strategy, name, _refused(name))
            overrides.set(strategy, "broadcast", self._broadcast)
            overrides.set(strategy, "barrier", _pass_barrier)
            for name in ("barrier", "monitored_barrier"):
                overrides.set(collectives, name, _pass_barrier)
            yield

    def _broadcast(self, obj: object, src: int = 0) -> object:
        if src == 0 and isinstance(obj, str | None) and obj == self._local_folder:  # for `trainer.log_dir`
            return self._folder
        return _refused("broadcast")()


def _refused(name: str) -> Callable[..., NoReturn]:
    def refused(*_args: Any, **_kwargs: Any) -> NoReturn:
        msg = f"calls `{name}`"
        raise DisturbedTrainingError(msg, "in an analysis each rank has other batches, and another number of them")

    return refused


def _pass_barrier(*_args: Any, **_kwargs: Any) -> None:
    """Return at once."""
