"""The isolation of training from an analysis."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.training.compat import logged_metrics, messages, signals
from lightning_hesd.training.isolation.rank_isolation import RankIsolation
from lightning_hesd.training.isolation.reachable import find_reachable
from lightning_hesd.training.isolation.silence import silence_logging
from lightning_hesd.training.isolation.training_snapshot import TrainingSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl

    from lightning_hesd.training.isolation.reachable import ReachableObjects

    Evaluating = Callable[[], contextlib.AbstractContextManager[None]]
    """Makes the context of an evaluation of the user's functions."""


class TrainingIsolation:
    """Keeps the analyses of a run from changing the objects around the module.

    Attributes:
        damaged: Names of tensors that an analysis has changed and that cannot be restored; no further analysis may run.
    """

    def __init__(self) -> None:
        self.damaged: list[str] = []
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def analysis(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Evaluating]:
        """Silence logging in this context, and restore all changes on leaving; all ranks take part.

        Args:
            trainer: The Trainer.
            module: Its module, which the analysis itself restores.

        Yields:
            A function that makes the context of an evaluation of the user's functions.
        """
        ranks = RankIsolation(trainer)
        reachable = _reachable(trainer, module)
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

        Args:
            trainer: The Trainer.
            module: Its module.
        """
        reachable = _reachable(trainer, module)
        with restore_state(module), contextlib.ExitStack() as stack:
            snapshot = TrainingSnapshot(reachable, stack, watches=False)
            stack.callback(self._finish, snapshot)
            yield

    def _finish(self, snapshot: TrainingSnapshot) -> None:
        snapshot.finish()
        self.damaged += snapshot.damaged
        for name, reason in snapshot.unrestored.items():
            if name not in self._warned:
                self._warned.add(name)
                messages.warn(
                    f"`{name}` changed during an analysis and was not restored ({reason}). If the analyzed function "
                    "changed it, training differs from training without analyses: pass `loss_fn=` to "
                    "HessianSpectrumCallback, a function (module, batch) -> mean loss over the batch that does not."
                )


def _reachable(trainer: pl.Trainer, module: pl.LightningModule) -> ReachableObjects:
    skipped = [signals.signal_connector(trainer), *logged_metrics.logged_results(trainer)]
    return find_reachable(trainer, module, skipped)
