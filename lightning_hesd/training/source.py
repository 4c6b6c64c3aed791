"""`SpectrumSource`: a callback that makes records, as `HessianCheckpoint` and other such callbacks see it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_hesd.training.callback_copies import CopiedCallback
from lightning_hesd.training.compat.namespaces import MisconfigurationException, join_namespaces, of_every_namespace
from lightning_hesd.training.compat.runs import callbacks_of
from lightning_hesd.training.error_policy import ErrorPolicy
from lightning_hesd.training.history import SpectrumHistory
from lightning_hesd.training.schedule import Budget, Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint
    from typing_extensions import Self

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.training.error_policy import OnError


@of_every_namespace("Callback")
class SpectrumSource(CopiedCallback, Callback):
    """A callback that fills a history.

    Attributes:
        name: Prefix of its metrics.
        errors: Whether failures become warnings or are raised.
        schedule: When to analyze.
        at_start: Whether to analyze the initialization, too.
        verbose: Whether to print each record, and a table at the end of the fit.
        loss_fn: The user's loss; None: that of `training_step`.
        budget: Time spent in training and in analyses.
        history: The records so far.
        checkpoints: The checkpoint callbacks passed to it.
        refusal: Why this run can have no spectra, known before training; None: it can.
        given: The number of samples, and the settings that are not defaults, as plain values.
    """

    checkpoints: Sequence[Checkpoint] = ()
    refusal: str | None = None
    given: Mapping[str, Any] = {}
    at_start = False
    verbose = False
    loss_fn: LossFunction | None = None

    def __init__(self, name: str = "hesd", on_error: OnError = "warn", schedule: Schedule | None = None) -> None:
        """Begin with an empty history.

        Raises:
            ValueError: If the name is no name of a folder.
        """
        if not name or "/" in name or name in {".", ".."}:
            msg = f"`name` must be a non-empty text without '/', got {name!r}."
            raise ValueError(msg)
        join_namespaces()
        super().__init__()
        self.name = name
        self.errors = ErrorPolicy(on_error)
        self.schedule = schedule or Schedule()
        self.budget = Budget(self.schedule.max_overhead)
        self.history = SpectrumHistory()
        self.begin_copies()

    def take_results(self, state: dict[str, Any]) -> None:
        """Replace history and budget by those of a copy's `state_dict`."""
        self.history.load_state_dict(state["history"])
        self.budget.load_state_dict(state["budget"])

    def share_results(self, original: Self) -> None:
        """Give history and budget to the original: the very records, because there may be many."""
        original.history[:] = self.history
        original.history.about = self.history.about
        original.budget.load_state_dict(self.budget.state_dict())

    @property
    def on_error(self) -> OnError:
        """What happens when an analysis fails: "warn" or "raise"."""
        return self.errors.on_error

    @on_error.setter
    def on_error(self, on_error: OnError) -> None:
        self.errors.on_error = on_error

    def record_selection(self, trainer: pl.Trainer, event: SelectionEvent) -> None:
        """Log the decision of a HessianCheckpoint after the latest record."""


def sources_of(trainer: pl.Trainer) -> list[SpectrumSource]:
    """Return the callbacks of a Trainer that make records, in its order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, SpectrumSource)]


def metric_names(trainer: pl.Trainer) -> list[str]:
    """Return the names of this package's callbacks in a Trainer, with which the metrics they log begin."""
    ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, CopiedCallback)]
    return [callback.name for callback in ours if hasattr(callback, "name")]


@contextlib.contextmanager
def without_training_time(trainer: pl.Trainer, analyzing: SpectrumSource | None = None) -> Iterator[None]:
    """Count the time of the body as training time for none of the Trainer's callbacks, as analysis for `analyzing`."""
    with contextlib.ExitStack() as stack:
        for other in sources_of(trainer):
            stack.enter_context(other.budget.analysis() if other is analyzing else other.budget.paused())
        yield


def only_source(trainer: pl.Trainer) -> SpectrumSource:
    """Return the one callback of a Trainer that makes records.

    Raises:
        MisconfigurationException: If there is none, or more than one.
    """
    sources = sources_of(trainer)
    if len(sources) == 1:
        return sources[0]
    if not sources:
        msg = (
            "HessianCheckpoint ranks the records of a HessianSpectrumCallback, and the Trainer has none: add "
            "HessianSpectrumCallback() to `callbacks`."
        )
    else:
        names = ", ".join(repr(source.name) for source in sources)
        msg = (
            f"HessianCheckpoint cannot tell which of the callbacks {names} to rank: pass it to one of them as "
            "HessianSpectrumCallback(checkpoint=HessianCheckpoint(...))."
        )
    raise MisconfigurationException(msg)
