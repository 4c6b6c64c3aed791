"""`HessianCheckpoint`: keeps the checkpoint that a checkpoint rule picks, by Gabdullin (2025), section 4.2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.trainer.states import TrainerFn

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.spectra.rules import rule_title
from lightning_hesd.spectra.selection import SelectionEvent, first_loss
from lightning_hesd.training.checkpoints.candidate_checkpoint import CandidateCheckpoint
from lightning_hesd.training.checkpoints.exclusive_checkpoint import prefix
from lightning_hesd.training.checkpoints.pick_report import report_pick, why_nothing_was_ranked
from lightning_hesd.training.checkpoints.ranking import RunRanking, TrainMetric, check_rule, criterion_of
from lightning_hesd.training.checkpoints.ranking_in_time import rank_all, rank_before_saves
from lightning_hesd.training.compat.messages import warn
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.compat.runs import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.rules import RuleName
    from lightning_hesd.spectra.selection import CandidateFilter
    from lightning_hesd.training.checkpoints.ranking import Ties

REFUSED = (
    *("monitor", "mode", "save_top_k", "every_n_train_steps", "every_n_epochs", "train_time_interval"),
    "save_on_train_epoch_end",
)

ACCURACY_TOLERANCE = 0.01
"""Default tolerance of an accuracy, or another metric of which more is better."""


class HessianCheckpoint(CandidateCheckpoint):
    """Keeps the checkpoint with the best Hessian criterion among those trained equally well.

    Candidates are the analyzed epochs whose training metric lies within `tolerance` of the best analyzed epoch's. The
    rule picks the candidate with the highest criterion, the earliest if several are equal. `best_model_path` is always
    the pick so far; `best_k_models` also holds the few checkpoints that may still become it. All others are deleted.
    With `save_last`, last.ckpt is written after every training epoch, analyzed or not.

    A checkpoint has the weights that were analyzed, also if a callback or the module's `on_train_epoch_end` changes
    them in between. Without a `filename`, files are called `hesd-<rule>-epoch=<epoch>-step=<step>.ckpt`.
    Pass it as `HessianSpectrumCallback(checkpoint=...)`, or in the Trainer's `callbacks` beside the one
    HessianSpectrumCallback. It stands before the ModelCheckpoint that Lightning adds by itself, so that
    `trainer.test(ckpt_path="best")` uses it. It stands after every other one, so that `trainer.checkpoint_callback` and
    "best" remain the same as without it. A message at the end of training names the file of the pick.

    Args:
        rule: "highest_c_t" (the paper's rule), "lowest_max_eigenvalue" (the rule that the paper compares with), another
            name in `RULES`, or a function of the record, higher is better.
        train_metric: Key of a logged training metric, such as "train_acc"; None: the mean loss of the analysis. It must
            have been logged for the analyzed weights: in their last batch, as the mean over the epoch that they end, or
            in validation right after it. Other weights are not ranked.
        train_metric_mode: "max" or "min". Default: "max" for a `train_metric`, "min" without one. A name with "loss" or
            "err" has no default.
        tolerance: Largest distance from the best metric, absolute. Default: 0.01 for a `train_metric` of which more is
            better, such as an accuracy. For the loss, and a `train_metric` of which less is better: 5 % of the drop
            from the first analyzed value to the best.
        ties: Which candidate to pick of those whose criterion is not evidently worse than the best, by the error of the
            difference on the same samples: the "first", or the one with the best training "metric". All candidates then
            keep their files. Default: the best. Needs `sampling_error=True`, and one of the two rules above.
        require_mp: Whether only MP spectra qualify, by the point value of C_t. If no candidate is MP, the best training
            metric wins, with a warning.
        **kwargs: Arguments of ModelCheckpoint: dirpath, filename, save_last, save_weights_only, verbose, ...

    Raises:
        MisconfigurationException: If an argument is invalid, or contradicts the rule.
    """

    def __init__(
        self,
        rule: RuleName | Callable[[SpectrumRecord], float] = "highest_c_t",
        *,
        train_metric: str | None = None,
        train_metric_mode: Literal["min", "max"] | None = None,
        tolerance: float | None = None,
        ties: Ties | None = None,
        require_mp: bool = True,
        **kwargs: Any,
    ) -> None:
        for name in REFUSED:
            if name in kwargs:
                msg = (
                    f"HessianCheckpoint(rule={rule!r}) ranks analyzed epochs by its rule, which `{name}="
                    f"{kwargs[name]!r}` would contradict: drop it, or use ModelCheckpoint."
                )
                raise MisconfigurationException(msg)
        check_rule(rule, ties)
        metric = TrainMetric(train_metric, train_metric_mode)
        if tolerance is None and metric.mode == "max":
            tolerance = ACCURACY_TOLERANCE
        # LightningCLI neither shows nor takes the arguments that are given here.
        super().__init__(
            RunRanking(tolerance, require_mp=require_mp, ties=ties),
            monitor=None,
            mode="max",
            save_top_k=1,
            save_on_train_epoch_end=True,
            every_n_train_steps=None,
            train_time_interval=None,
            every_n_epochs=None,
            **kwargs,
        )
        self.rule = rule
        self._metric = metric
        self.train_metric, self.train_metric_mode = train_metric, metric.mode
        self.tolerance, self.require_mp, self.ties = tolerance, require_mp, ties

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and the candidates, without weights."""
        state = super().__getstate__()
        # A name is a property of the function; a copy without the function keeps its checkpoints apart by it.
        return state if isinstance(self.rule, str) else {**state, "rule": Portable("rule", self.rule)}

    @property
    def title(self) -> str:
        """Name of this callback in messages."""
        return f"HessianCheckpoint(rule={self.rule!r})"

    @property
    def name_prefix(self) -> str:
        """Prefix of file names: the name of the callback whose records are ranked, and that of the rule."""
        return prefix(self.source.name if self.source else "hesd", self.rule_name.rpartition(".")[2])

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint, other than that of any other rule."""
        return self._generate_state_key(
            rule=self.rule_name,
            train_metric=self.train_metric,
            train_metric_mode=self.train_metric_mode,
            tolerance="relative" if self.tolerance is None else self.tolerance,
            require_mp=self.require_mp,
            **({} if self.ties is None else {"ties": self.ties}),
            source=self.source.name if self.source else None,
        )

    @property
    def rule_name(self) -> str:
        """Name of the rule: its own, or that of the function."""
        return self.rule if isinstance(self.rule, str) else getattr(self.rule, "__qualname__", repr(type(self.rule)))

    @property
    def selection(self) -> CandidateFilter:
        """The condition for candidates at present; a tolerance relative to the progress grows with it."""
        return self._ranking.filter

    # Hooks ----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a run, or go on with the candidates of the run that is resumed."""
        super().on_train_start(trainer, pl_module)
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_args: Any) -> None:
        """Pass over an analysis without a training metric, because the weights are about to change."""
        self._begin(trainer, pl_module)
        self._pass_over_latest(trainer)
        self._analyzed.drop()
        self._metric.begin_batch(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Rank an analysis made after this step, if its training metric is logged already."""
        self.rank_latest(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Rank an analysis made after the last step: that of an epoch comes only after its validation."""
        self.rank_latest(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rank an analysis made after this epoch, and write last.ckpt."""
        self._begin(trainer, pl_module)
        saved = self.rank_latest(trainer)
        self._pass_over_latest(trainer)
        if self.save_last and self.may_save(trainer):
            rank_all(trainer)
            # A link can only point to a file of this very state of the weights, so that it never dangles.
            with patched(self, "save_last", self.save_last if saved else True):
                names = self._monitor_candidates(trainer)
                self.is_written("last.ckpt", lambda: self._save_last_checkpoint(trainer, names))

    def on_train_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Keep the final weights if there is no candidate."""
        if self.candidates and not self._ranking.is_decided:
            warn(
                "none of the epochs with nearly the best training metric has a mainly positive (MP) spectrum, so "
                f"{self.title} took the best training metric; `require_mp=False` ranks MN spectra too."
            )
        is_refused = self.source is None or self.source.refusal is not None  # a warning has said so
        if self.may_save(trainer) and not self.candidates and self.save_final(trainer) and not is_refused:
            warn(
                f"{self.title} could rank no analyzed epoch ({why_nothing_was_ranked(self)}); its best_model_path is "
                f"the checkpoint of the final weights, {self.best_model_path}."
            )

    def report(self, trainer: pl.Trainer) -> None:
        """Name the pick and its file at the end of a run."""
        report_pick(trainer, self, rule_title(self.rule_name))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a run, once, also if this callback was added after the Trainer had set up the others."""
        if self._set_up_by != name_of(trainer):
            self.setup(trainer, pl_module, TrainerFn.FITTING)
        if self._has_names:
            return
        self._has_names = True
        rank_before_saves(trainer)
        self.choose_names(trainer)
        self.errors.restart()
        if self.source is not None:
            self.errors.on_error = self.source.on_error
        self._metric.restart(trainer)
        if trainer.global_step == 0:
            self.forget_run()
        elif self._is_resumed:
            self.forget_missing_files(trainer)
        self._is_resumed = False
        self._ranking.offered_step = trainer.global_step  # earlier records were ranked or passed over

    # Ranking --------------------------------------------------------------------------------------------------------

    def _latest(self, trainer: pl.Trainer) -> SpectrumRecord | None:
        """Return the latest record if it has the C_t of the present weights, and was not ranked or passed over."""
        record = self.source.history[-1] if self.source is not None and self.source.history else None
        step = trainer.global_step
        if record is None or record.global_step != step or step in (0, self._ranking.offered_step):
            return None
        is_defined = record.spectrum is not None and not math.isnan(record.spectrum.c_t)
        return record if is_defined and self.may_save(trainer) else None

    def rank_latest(self, trainer: pl.Trainer) -> bool:
        """Rank the latest record once its metric is known; return whether its weights were saved and are unchanged."""
        record = self._latest(trainer)
        if record is None or record.spectrum is None:
            return False
        score: float | None = trainer.strategy.broadcast(self._metric.score(trainer, record.spectrum))
        if score is None:
            return False
        ranking = self._ranking
        ranking.offered_step = trainer.global_step
        if ranking.first_score is None:
            ranking.first_score = trainer.strategy.broadcast(self._first_score(score))
        criterion = trainer.strategy.broadcast(criterion_of(record, self.rule, self.errors))
        changes = self._analyzed.compare(trainer, record.epoch)
        can_be_ranked = not (math.isnan(score) or math.isnan(criterion) or changes.lost)
        latest = self._consider(trainer, record, score, criterion) if can_be_ranked else None
        if latest is not None and self.source is not None:
            event = SelectionEvent(
                self.rule_name,
                self.train_metric,
                self.train_metric_mode,
                self.selection,
                latest,
                pick=self.best,
                is_relative=self.tolerance is None,
                rivals=tuple(record.epoch for record in self.rivals),
            )
            self.source.record_selection(trainer, event)
        self._analyzed.drop()
        return latest in self.candidates and not changes.names

    def _first_score(self, score: float) -> float | None:
        """Return the score of the first analyzed state, given that of the first ranked one."""
        if self.train_metric is None and self.source is not None:
            loss = first_loss(self.source.history)
            return None if loss is None else -loss
        return score if math.isfinite(score) else None

    def _pass_over_latest(self, trainer: pl.Trainer) -> None:
        """Leave out the latest record if it could not be ranked without a training metric, and report the first one."""
        if self._latest(trainer) is None:
            return
        self._ranking.offered_step = trainer.global_step
        self._analyzed.drop()
        ours = self.source.name if self.source else "hesd"
        self.errors.complain(self._metric.complaint(trainer, ours), key="metric")
