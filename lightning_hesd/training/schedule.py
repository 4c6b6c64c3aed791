"""When to analyze: after the epochs or optimizer steps of a schedule, and only within a budget of time."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_hesd.spectra.validation import (
    at_least,
    check_count,
    check_fields,
    integer,
    number,
    of,
    optional,
    within,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator


@dataclass(frozen=True)
class Schedule:
    """The epochs or optimizer steps after which to analyze.

    Attributes:
        every_n_epochs: After n, 2n, ... epochs, as ModelCheckpoint counts.
        epochs: After these epochs instead; 0-based, as `trainer.current_epoch`.
        every_n_train_steps: After n, 2n, ... optimizer steps instead.
        max_overhead: Largest time of analyses, as a factor on the training time; scheduled analyses beyond it are
            skipped.

    Raises:
        ValueError: If an argument is out of range, or two contradict each other.
    """

    every_n_epochs: int = 1
    epochs: Collection[int] | None = None
    every_n_train_steps: int | None = None
    max_overhead: float | None = None
    _epochs: frozenset[int] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_train_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        share = self.max_overhead
        if share is not None and not (number(share) and 0 < share < math.inf):
            msg = f"`max_overhead` must be a finite number above 0, got {share!r}."
            raise ValueError(msg)
        given = {
            "every_n_epochs": self.every_n_epochs != 1,
            "epochs": self.epochs is not None,
            "every_n_train_steps": self.every_n_train_steps is not None,
        }
        chosen = [name for name, is_given in given.items() if is_given]
        if len(chosen) > 1:
            msg = f"`{'` and `'.join(chosen)}` exclude each other: choose one."
            raise ValueError(msg)
        if self.epochs is not None:
            epochs = list(self.epochs)
            bad = [e for e in epochs if not at_least(0)(e)]
            if bad:
                msg = f"`epochs` must be non-negative integers (0-based), got {bad[0]!r}."
                raise ValueError(msg)
            object.__setattr__(self, "_epochs", frozenset(epochs))

    @property
    def by_epoch(self) -> bool:
        """Whether epochs are analyzed, and not optimizer steps."""
        return self.every_n_train_steps is None

    def may_follow(self, epoch: int, step: int, *, is_last: bool) -> bool:
        """Return whether an analysis may follow a batch of this epoch, the last one or not, and optimizer step."""
        return is_last and self.includes_epoch(epoch) if self.by_epoch else self.includes_step(step)

    @property
    def is_sparse(self) -> bool:
        """Whether some epochs may end without an analysis of their last weights."""
        thinned = (self.epochs, self.every_n_train_steps, self.max_overhead)
        return self.every_n_epochs != 1 or any(option is not None for option in thinned)

    def training_per_analysis(self, max_epochs: int | None) -> float:
        """Return the epochs of training for each analysis, or the optimizer steps if these are counted.

        `max_epochs` is the Trainer's; None or -1: unlimited. Of listed `epochs`, those before it count.
        """
        if self.every_n_train_steps is not None:
            return self.every_n_train_steps
        if self.epochs is None:
            return self.every_n_epochs
        length = max(self._epochs, default=0) + 1 if max_epochs is None or max_epochs < 0 else max_epochs
        return length / max(1, sum(epoch < length for epoch in self._epochs))

    def includes_epoch(self, epoch: int) -> bool:
        """Return whether to analyze when `epoch` (0-based) ends."""
        if not self.by_epoch:
            return False
        return epoch in self._epochs if self.epochs is not None else (epoch + 1) % self.every_n_epochs == 0

    def includes_step(self, global_step: int) -> bool:
        """Return whether to analyze after `global_step` optimizer steps."""
        return self.every_n_train_steps is not None and global_step > 0 and global_step % self.every_n_train_steps == 0


# The budget -----------------------------------------------------------------------------------------------------------

_SECONDS = within(0.0, 1e12)
_STATE = {
    "training_seconds": _SECONDS,
    "analysis_seconds": _SECONDS,
    "last_analysis_seconds": optional(_SECONDS),
    "decisions": lambda value: isinstance(value, dict) and all(integer(k) and of(bool)(v) for k, v in value.items()),
}


class Budget:
    """Keeps the overhead, the time of analyses over the training time, below a limit.

    Training time is the wall time of the fit without analyses. It accumulates over interrupted and resumed runs, up to
    the checkpoint from which each is resumed.

    Args:
        max_overhead: Largest overhead; None: no limit.
        clock: Returns seconds, from any origin.

    Attributes:
        analysis_seconds: Seconds in analyses so far.
        last_analysis_seconds: Seconds of the last analysis; None: there was none.
    """

    def __init__(self, max_overhead: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_overhead = max_overhead
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Forget all times and decisions."""
        self._trained = 0.0
        self._training_since: float | None = None
        self.analysis_seconds = 0.0
        self.last_analysis_seconds: float | None = None
        self._decisions: dict[int, bool] = {}

    # Time -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Count the time from now on as training."""
        self._training_since = self._clock()

    def stop(self) -> None:
        """Stop counting the time as training."""
        self._trained = self.training_seconds
        self._training_since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of a block."""
        was_training = self._training_since is not None
        self.stop()
        try:
            yield
        finally:
            if was_training:
                self.start()

    @contextlib.contextmanager
    def analysis(self) -> Iterator[None]:
        """Count the time of a block as an analysis, whether it fails or not."""
        with self.paused():
            started = self._clock()
            try:
                yield
            finally:
                self.last_analysis_seconds = self._clock() - started
                self.analysis_seconds += self.last_analysis_seconds

    @property
    def training_seconds(self) -> float:
        """Seconds of training so far."""
        running = 0.0 if self._training_since is None else self._clock() - self._training_since
        return self._trained + running

    @property
    def overhead(self) -> float | None:
        """Time of analyses over training time, so far: 0.1 is a tenth of it. None before training."""
        trained = self.training_seconds
        return self.analysis_seconds / trained if trained > 0 else None

    # Decisions ------------------------------------------------------------------------------------------------------

    def allows(self, global_step: int) -> bool:
        """Return whether to analyze after `global_step`: as decided before, or else if the limit allows it.

        The next analysis is expected to take as long as the last one. The first analysis is always allowed, because
        its duration is not known.
        """
        decided = self._decisions.get(global_step)
        if decided is not None:
            return decided
        if self._max_overhead is None or self.last_analysis_seconds is None:
            return True
        return self.analysis_seconds + self.last_analysis_seconds <= self._max_overhead * self.training_seconds

    def decide(self, global_step: int, *, analyze: bool) -> None:
        """Keep a decision for as long as training is at this step.

        Several batches may belong to one step, and a resumed run begins at the last step of the run before. Earlier
        decisions are dropped: steps never go back, and there may be millions.
        """
        self._decisions = {global_step: analyze}

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the last decision as plain values."""
        return {
            "training_seconds": self.training_seconds,
            "analysis_seconds": self.analysis_seconds,
            "last_analysis_seconds": self.last_analysis_seconds,
            "decisions": dict(self._decisions),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the times and the decision of `state_dict`; the clock of training stands still.

        Raises:
            ValueError: If a field is missing or invalid.
        """
        check_fields(state, _STATE, "the budget")
        self._trained = state["training_seconds"]
        self._training_since = None
        self.analysis_seconds = state["analysis_seconds"]
        self.last_analysis_seconds = state["last_analysis_seconds"]
        self._decisions = dict(state["decisions"])
