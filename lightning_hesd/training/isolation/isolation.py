"""The isolation of training from an analysis, and of ranks from each other."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.training.compat import messages, strategies
from lightning_hesd.training.isolation.reachable import find_reachable
from lightning_hesd.training.isolation.silence import Overrides, silence_logging
from lightning_hesd.training.isolation.training_snapshot import (
    DisturbedTrainingError,
    TrainingSnapshot,
    names_in_words,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl

    Evaluating = Callable[[], contextlib.AbstractContextManager[None]]
    """Makes the context of an evaluation of the user's functions."""


_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv"),
)


class TrainingIsolation:
    """Keeps the analyses of a run from changing the objects around the module."""

    def __init__(self) -> None:
        self._damaged: list[str] = []  # names of tensors that an analysis has changed, and that cannot be restored
        self._warned: set[str] = set()

    def check_harmless(self) -> None:
        """Refuse another analysis after one whose changes could not be undone.

        Raises:
            DisturbedTrainingError: If there was one.
        """
        if self._damaged:
            msg = f"changed in place {names_in_words(self._damaged)} in an earlier analysis"
            raise DisturbedTrainingError(msg)

    @contextlib.contextmanager
    def analysis(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Evaluating]:
        """Silence logging in this context, and restore all changes on leaving; all ranks take part.

        The module itself is restored by the analysis.

        Yields:
            A function that makes the context of an evaluation of the user's functions.
        """
        ranks = _RankIsolation(trainer)
        reachable = find_reachable(trainer, module)
        with silence_logging(trainer, module, reachable), contextlib.ExitStack() as stack:
            snapshot = TrainingSnapshot(reachable, stack)
            stack.callback(self._finish, snapshot)

            @contextlib.contextmanager
            def evaluating() -> Iterator[None]:
                with snapshot.evaluation(), ranks.evaluation():
                    yield

            yield evaluating

    @contextlib.contextmanager
    def reading(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
        """Restore on leaving all changes that reading data makes in and around the module, as in a collate function.

        Large caches of a dataset keep their new entries.
        """
        reachable = find_reachable(trainer, module)
        with restore_state(module), contextlib.ExitStack() as stack:
            snapshot = TrainingSnapshot(reachable, stack, watches=False)
            stack.callback(self._finish, snapshot)
            yield

    def _finish(self, snapshot: TrainingSnapshot) -> None:
        snapshot.finish()
        self._damaged += snapshot.damaged
        for name, reason in snapshot.unrestored.items():
            if name not in self._warned:
                self._warned.add(name)
                messages.warn(
                    f"`{name}` changed during an analysis and was not restored ({reason}). If the analyzed function "
                    "changed it, training differs from training without analyses: pass the callback "
                    "`loss_fn=`, a function (module, batch) -> mean loss over the batch that does not."
                )


class _RankIsolation:
    """Keeps evaluations of the user's functions from waiting for other ranks, which have other batches."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Get from the other ranks, all of which take part, what an evaluation may ask for: the folder of the run."""
        self._trainer = trainer
        self._is_needed = trainer.world_size > 1 and not strategies.is_sharded(trainer)
        self._local_folder = self._folder = None
        if self._is_needed:
            with Overrides() as overrides:
                overrides.set(vars(trainer.strategy), "broadcast", lambda folder, *_: folder)
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
        with Overrides() as overrides:
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
