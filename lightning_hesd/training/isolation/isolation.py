"""The isolation of an analysis from the training around it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.training.compat import logged_metrics, messages, signals
from lightning_hesd.training.isolation.reach import Walk
from lightning_hesd.training.isolation.silence import Seclusion, silenced
from lightning_hesd.training.isolation.surroundings import Surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl

    from lightning_hesd.training.isolation.reach import Reach

    Evaluating = Callable[[], contextlib.AbstractContextManager[None]]


class Isolation:
    """Keeps analyses of one run from changing what lies around the module.

    Attributes:
        harm: Names of what an analysis changed, and could not put back; there must be no further one then.
    """

    def __init__(self) -> None:
        self.harm: list[str] = []
        self._told: set[str] = set()

    @contextlib.contextmanager
    def around(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Evaluating]:
        """Silence loggers and the like, and put back at the end whatever changed; all processes together.

        Args:
            trainer: The trainer.
            module: Its module, which the analysis puts back itself.

        Yields:
            Makes the context of each evaluation of the user's functions.
        """
        seclusion = Seclusion(trainer)
        reach = _reach(trainer, module)
        with silenced(trainer, module, reach), contextlib.ExitStack() as stack:
            surroundings = Surroundings(reach, stack)
            stack.callback(self._finish, surroundings)

            @contextlib.contextmanager
            def evaluating() -> Iterator[None]:
                with surroundings.evaluation(), seclusion.evaluation():
                    yield

            yield evaluating

    @contextlib.contextmanager
    def reading(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
        """Put back at the end what reading data changes in and around the module: by a collate function, for example.

        Large caches of a dataset may fill.

        Args:
            trainer: The trainer.
            module: Its module.
        """
        reach = _reach(trainer, module)
        with restore_state(module), contextlib.ExitStack() as stack:
            surroundings = Surroundings(reach, stack, watches=False)
            stack.callback(self._finish, surroundings)
            yield

    def _finish(self, surroundings: Surroundings) -> None:
        surroundings.finish()
        self.harm += surroundings.harm
        for name, reason in surroundings.left.items():
            if name not in self._told:
                self._told.add(name)
                messages.warn(
                    f"`{name}` changed during an analysis and was not put back ({reason}). If the function that is "
                    "analysed changed it, training differs from training without analyses: pass `loss_fn=` to "
                    "HessianSpectrumCallback, a function (module, batch) -> mean loss over the batch that does not."
                )


def _reach(trainer: pl.Trainer, module: pl.LightningModule) -> Reach:
    untouched = [signals.signal_connector(trainer), *logged_metrics.logged_results(trainer)]
    return Walk(trainer, module, untouched).found
