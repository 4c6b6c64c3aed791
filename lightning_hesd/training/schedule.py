"""The schedule of analyses: the epochs or optimizer steps after which to analyze."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_hesd.spectra.validation import at_least, check_count, number

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True)
class Schedule:
    """The epochs or optimizer steps after which to analyze.

    Attributes:
        every_n_epochs: After n, 2n, ... epochs, as ModelCheckpoint counts.
        epochs: After these epochs instead; 0-based, as `trainer.current_epoch`.
        every_n_train_steps: After n, 2n, ... optimizer steps instead.
        max_overhead: Largest share of analyses in the training time; scheduled analyses beyond it are skipped.
    """

    every_n_epochs: int = 1
    epochs: Collection[int] | None = None
    every_n_train_steps: int | None = None
    max_overhead: float | None = None
    _epochs: frozenset[int] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: If one is out of range, or two contradict each other.
        """
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

    @property
    def is_sparse(self) -> bool:
        """Whether some epochs may end without an analysis of their last weights."""
        thinned = (self.epochs, self.every_n_train_steps, self.max_overhead)
        return self.every_n_epochs != 1 or any(option is not None for option in thinned)

    def includes_epoch(self, epoch: int) -> bool:
        """Return whether to analyze when `epoch` (0-based) ends."""
        if not self.by_epoch:
            return False
        return epoch in self._epochs if self.epochs is not None else (epoch + 1) % self.every_n_epochs == 0

    def includes_step(self, global_step: int) -> bool:
        """Return whether to analyze after `global_step` optimizer steps."""
        return self.every_n_train_steps is not None and global_step > 0 and global_step % self.every_n_train_steps == 0
