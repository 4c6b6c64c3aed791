"""Checkpoints with the analyzed weights, also if other code has changed the weights of the module since."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.training.checkpoints.weights import Changes
from lightning_hesd.training.compat.strategies import collectives_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl

    from lightning_hesd.training.checkpoints.weights import AnalyzedWeights
    from lightning_hesd.training.error_policy import ErrorPolicy

MARK = "lightning_hesd_candidate"
"""Key of a checkpoint under which its candidate's mark stands: a text that no other file has."""

UNCHANGED = Changes(names=(), restructured=False, lost=False)


class AnalyzedSaving:
    """Keeps the analyzed weights until they are saved or beaten.

    In between, Lightning calls `on_train_batch_end` and `on_train_epoch_end` of other callbacks and of the module,
    which may prune, average, clip or initialize the weights.
    """

    def __init__(self, errors: ErrorPolicy) -> None:
        self._errors = errors
        self._weights: AnalyzedWeights | None = None
        self._changes = UNCHANGED

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without weights."""
        return {**vars(self), "_weights": None, "_changes": UNCHANGED}

    def keep(self, weights: AnalyzedWeights) -> None:
        """Keep the weights of the latest analysis."""
        self._weights = weights

    def drop(self) -> None:
        """Release the weights."""
        self._weights, self._changes = None, UNCHANGED

    def compare(self, trainer: pl.Trainer, epoch: int) -> Changes:
        """Return how the weights have changed since their analysis, the same on all ranks, and report it."""
        if self._weights is not None:
            self._changes = self._weights.changes(trainer.lightning_module)
        if not collectives_of(trainer).any(bool(self._changes.names)):
            return self._changes
        lost = collectives_of(trainer).any(self._changes.lost)
        outcome = (
            "the analyzed weights cannot be restored, so HessianCheckpoint does not rank them"
            if lost
            else "HessianCheckpoint saves the analyzed weights, and training goes on with the changed ones"
        )
        self._errors.complain(
            f"the weights of epoch {epoch} were changed after their analysis ({self._changes}): {outcome}. To analyze "
            "the changed weights, change them in a callback that stands before HessianSpectrumCallback.",
            key="lost" if lost else "changed",
            harmless=not lost,
        )
        return Changes(self._changes.names or ("on another rank",), self._changes.restructured, lost)

    def save(self, trainer: pl.Trainer, mark: str, write: Callable[[], None]) -> None:
        """Let `write`, which makes the Trainer write a checkpoint, write one with the analyzed weights and a mark."""
        weights, restructured = self._weights, self._changes.restructured

        def edit(checkpoint: dict[str, Any]) -> None:
            checkpoint[MARK] = mark
            if weights is not None and restructured:
                checkpoint["state_dict"] = weights.state_dict()
            elif weights is not None:
                self._check(checkpoint, weights)

        swap = weights is not None and bool(self._changes.names) and not restructured
        with (
            _edited_checkpoints(trainer, edit),
            weights.put_back(trainer.lightning_module) if weights and swap else contextlib.nullcontext(),
        ):
            write()

    def _check(self, checkpoint: dict[str, Any], weights: AnalyzedWeights) -> None:
        """Report a hook that has replaced the weights in the `state_dict` of a checkpoint."""
        missed = weights.missed_by(checkpoint["state_dict"])
        if missed is None:
            return
        places = [k for k, v in checkpoint.items() if isinstance(v, dict) and missed in v and not weights.missed_by(v)]
        whereabouts = f"in the same file, as `{places[0]}`" if places else "not in the file"
        self._errors.complain(
            f"the `state_dict` of checkpoints has other weights than the analyzed ones (first {missed!r}): a hook "
            "`on_save_checkpoint` replaces them, as that of WeightAveraging does with averages. The analyzed weights "
            f"are {whereabouts}.",
            key="replaced",
            harmless=True,
        )


@contextlib.contextmanager
def _edited_checkpoints(trainer: pl.Trainer, edit: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let a function change the content of checkpoints in a block, after all hooks."""
    save = trainer.strategy.save_checkpoint

    def edited(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        edit(checkpoint)
        save(checkpoint, *args, **kwargs)

    with patched(trainer.strategy, "save_checkpoint", edited):
        yield
