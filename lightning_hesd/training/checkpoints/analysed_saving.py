"""Checkpoints of the weights that were analysed, also if other code has changed those of the module since."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from lightning_hesd.training.checkpoints.weights import Changes
from lightning_hesd.training.compat.collectives import collectives_of
from lightning_hesd.training.compat.internals import edited_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.training.checkpoints.weights import AnalysedWeights

MARK = "lightning_hesd_candidate"
"""Key of the text in a checkpoint by which its candidate knows it again."""

UNCHANGED = Changes(names=(), restructured=False, lost=False)


class Complain(Protocol):
    """Says what the user should know."""

    def __call__(self, message: str, *, key: str, harmless: bool = False) -> None:
        """Warn once for each key, or raise if that is wanted and it is not harmless."""


class AnalysedSaving:
    """Keeps the analysed weights until they are saved or beaten.

    Between the two, Lightning calls `on_train_batch_end` and `on_train_epoch_end` of callbacks and of the module, which
    may prune, average, clip or re-initialise.
    """

    def __init__(self, complain: Complain) -> None:
        self._complain = complain
        self._weights: AnalysedWeights | None = None
        self._changes = UNCHANGED

    def __getstate__(self) -> dict[str, Any]:
        """Return no weights."""
        return {**vars(self), "_weights": None, "_changes": UNCHANGED}

    def keep(self, weights: AnalysedWeights) -> None:
        """Keep what has just been analysed."""
        self._weights = weights

    def drop(self) -> None:
        """Let go of them."""
        self._weights, self._changes = None, UNCHANGED

    def compare(self, trainer: pl.Trainer, epoch: int) -> Changes:
        """Return what has become of the weights, the same verdict in every process, and say so if they were changed."""
        if self._weights is not None:
            self._changes = self._weights.changes(trainer.lightning_module)
        collectives = collectives_of(trainer)
        if not collectives.any(bool(self._changes.names)):
            return self._changes
        lost = collectives.any(self._changes.lost)
        outcome = (
            "these cannot be had back, so HessianCheckpoint does not rank them"
            if lost
            else "HessianCheckpoint saves the analysed ones, and training goes on with the others"
        )
        self._complain(
            f"the weights of epoch {epoch} were changed after their analysis ({self._changes}): {outcome}. For an "
            "analysis of those after the change, make it in a callback that stands before HessianSpectrumCallback.",
            key="lost" if lost else "changed",
            harmless=not lost,
        )
        return Changes(self._changes.names or ("elsewhere",), self._changes.restructured, lost)

    def save(self, trainer: pl.Trainer, mark: str, write: Callable[[], None]) -> None:
        """Let `write` make the Trainer write a checkpoint, which gets the analysed weights, and a mark."""
        weights, restructured = self._weights, self._changes.restructured

        def edit(checkpoint: dict[str, Any]) -> None:
            checkpoint[MARK] = mark
            if weights is not None and restructured:
                checkpoint["state_dict"] = weights.state_dict()
            elif weights is not None:
                self._check(checkpoint, weights)

        swap = weights is not None and bool(self._changes.names) and not restructured
        with (
            edited_checkpoints(trainer, edit),
            weights.put_back(trainer.lightning_module) if weights and swap else nullcontext(),
        ):
            write()

    def _check(self, checkpoint: dict[str, Any], weights: AnalysedWeights) -> None:
        """Say so if a hook has replaced what will be loaded."""
        missed = weights.missed_by(checkpoint["state_dict"])
        if missed is None:
            return
        places = [k for k, v in checkpoint.items() if isinstance(v, dict) and missed in v and not weights.missed_by(v)]
        whereabouts = f"in the same file, as `{places[0]}`" if places else "not in the file"
        self._complain(
            f"the `state_dict` of checkpoints has other weights than those that were analysed (first {missed!r}): a "
            "hook `on_save_checkpoint` puts them there, as that of WeightAveraging does with averages. The analysed "
            f"ones are {whereabouts}.",
            key="replaced",
            harmless=True,
        )
