"""Rules rank a new analysis before any callback saves a checkpoint, so that a run resumed from it knows the pick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl

NAME = "save_checkpoint"
"""The Trainer's method."""


class _RankingSave:
    """A Trainer's `save_checkpoint`, before which all rules rank.

    The ModelCheckpoints of users stand before the rules, and save first: without the latest candidate in the state of a
    rule, a resumed run would never pick it.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.own = vars(trainer).get(NAME)  # in the place of the method
        self._trainer = trainer
        self._save = trainer.save_checkpoint

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        rank_all(self._trainer)
        self._save(*args, **kwargs)


def rank_all(trainer: pl.Trainer) -> None:
    """Let all rules rank a new analysis, unless one of them is writing a candidate just now."""
    rules: list[Any] = [rule for rule in trainer.checkpoint_callbacks if hasattr(rule, "rank_latest")]
    if not any(rule.writes_candidate for rule in rules):
        for rule in rules:
            rule.rank_latest(trainer)


def rank_before_saves(trainer: pl.Trainer) -> None:
    """Let all rules rank before each checkpoint of a run."""
    if not isinstance(vars(trainer).get(NAME), _RankingSave):
        vars(trainer)[NAME] = _RankingSave(trainer)


def end_ranking_before_saves(trainer: pl.Trainer) -> None:
    """Restore the Trainer's `save_checkpoint`."""
    if isinstance(save := vars(trainer).get(NAME), _RankingSave):
        del vars(trainer)[NAME]
        vars(trainer).update({} if save.own is None else {NAME: save.own})
