"""`HessianCheckpoint`: the checkpoint that should generalise best, by the rule of Gabdullin (2025), section 4.2."""

from __future__ import annotations

import copy
import math
import uuid
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_hesd.numerics.inputs.portable import Portable, deep_copied
from lightning_hesd.spectra.rules import RULES, rule_title
from lightning_hesd.spectra.selection import (
    Candidate,
    CandidateFilter,
    SelectionEvent,
    first_loss,
    progress_tolerance,
)
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.checkpoints.analysed_saving import AnalysedSaving
from lightning_hesd.training.checkpoints.exclusive_checkpoint import ExclusiveCheckpoint
from lightning_hesd.training.checkpoints.paths import prefix
from lightning_hesd.training.checkpoints.ranking_state import (
    candidates_in,
    completed,
    ranked_in,
    ranked_state,
    wrong_field,
)
from lightning_hesd.training.checkpoints.train_metric import TrainMetric
from lightning_hesd.training.compat import launched
from lightning_hesd.training.compat.collectives import saving_together
from lightning_hesd.training.compat.internals import inform, name_of, warn
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.history import SpectrumSource, any_source_raises, only_source

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.training.checkpoints.weights import AnalysedWeights
    from lightning_hesd.training.history import SpectrumRecord

    Rule = Literal["highest_c_t", "lowest_max_eigenvalue"] | Callable[[SpectrumRecord], float]

REFUSED = (
    *("monitor", "mode", "save_top_k", "every_n_train_steps", "every_n_epochs", "train_time_interval"),
    "save_on_train_epoch_end",
)

ACCURACY_TOLERANCE = 0.01
"""How far an accuracy, or another metric of which more is better, may lie below the best one, by default."""


class HessianCheckpoint(ExclusiveCheckpoint):
    """Keeps the checkpoint with the best Hessian criterion among those trained equally well.

    Candidates are the analysed epochs whose training metric lies within `tolerance` of the best analysed epoch's.
    Of these the rule takes the highest criterion, the earliest of equals. `best_model_path` always names the pick so
    far; `best_k_models` also holds the few checkpoints that could still become it. Everything else is deleted. With
    `save_last`, last.ckpt is written after every training epoch, analysed or not.

    A checkpoint has the weights that were analysed, also if a callback or the module's `on_train_epoch_end` changes
    them in between. Without a `filename`, files are called `hesd-<rule>-epoch=<epoch>-step=<step>.ckpt`.

    Pass it as `HessianSpectrumCallback(checkpoint=...)`, or in the Trainer's `callbacks` beside the one
    HessianSpectrumCallback. It stands before the ModelCheckpoint that Lightning adds by itself, so that
    `trainer.test(ckpt_path="best")` uses it, and after every other one, so that `trainer.checkpoint_callback` and
    "best" remain what they are without it. The end of training says where the pick is.

    Args:
        rule: "highest_c_t" (the paper's), "lowest_max_eigenvalue" (the one it compares with), or a function of the
            record, higher is better.
        train_metric: Key of a logged training metric, such as "train_acc"; None: the analysis's own mean loss. It must
            have been logged for the analysed weights: in their last batch, as the mean over the epoch that they end, or
            in validation right after it. Others are not ranked.
        train_metric_mode: "max" or "min"; default: "max" for a `train_metric`, but a name with "loss" or "err" needs
            it said; "min" for None.
        tolerance: How far the metric may lie from the best, absolute. Default: 0.01 for a `train_metric` of which more
            is better, such as an accuracy; for the loss, and a `train_metric` of which less is better, 5 % of the drop
            from the first analysed value to the best, whatever its scale.
        require_mp: Only mainly positive spectra qualify, by the point value of C_t; if none of the candidates is MP,
            the best training metric wins and a warning says so.
        **kwargs: Of ModelCheckpoint: dirpath, filename, save_last, save_weights_only, verbose, ...

    Raises:
        MisconfigurationException: If an argument is invalid, or contradicts the rule.
    """

    def __init__(
        self,
        rule: Rule = "highest_c_t",
        *,
        train_metric: str | None = None,
        train_metric_mode: Literal["min", "max"] | None = None,
        tolerance: float | None = None,
        require_mp: bool = True,
        **kwargs: Any,
    ) -> None:
        for name in REFUSED:
            if name in kwargs:
                msg = (
                    f"HessianCheckpoint(rule={rule!r}) ranks analysed epochs by its rule, which `{name}="
                    f"{kwargs[name]!r}` would contradict: drop it, or use ModelCheckpoint."
                )
                raise MisconfigurationException(msg)
        if not callable(rule) and rule not in RULES:
            msg = f"`rule` must be {' or '.join(map(repr, RULES))} or a function of the record, got {rule!r}."
            raise MisconfigurationException(msg)
        if tolerance is not None and not tolerance >= 0:
            msg = f"`tolerance` must not be negative, got {tolerance!r}."
            raise MisconfigurationException(msg)
        self.candidates: list[Candidate] = []
        # What is given here, configurations of LightningCLI neither show nor take.
        super().__init__(
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
        self._metric = TrainMetric(train_metric, train_metric_mode)
        self.train_metric, self.train_metric_mode = train_metric, self._metric.mode
        if tolerance is None and self._metric.mode == "max":
            tolerance = ACCURACY_TOLERANCE
        self.tolerance, self.require_mp = tolerance, require_mp
        self.source: SpectrumSource | None = None
        self._stage = "fit"
        self._analysed = AnalysedSaving(self._complain)
        self._said: set[str] = set()
        self._best_score = -math.inf
        self._first_score: float | None = None
        self._ranked: list[Candidate] = []
        self._offered_step = -1
        self._address = launched.address_of(self)
        self._original: HessianCheckpoint | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and the candidates, without weights."""
        state = {**vars(self), "_original": None}
        # A name is a property of the function; a copy without the function keeps its checkpoints apart by it.
        return state if isinstance(self.rule, str) else {**state, "rule": Portable("rule", self.rule)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy."""
        vars(self).update(state)
        self._address = launched.address_of_copy(self, self._address)

    def __deepcopy__(self, memo: dict[int, Any]) -> HessianCheckpoint:
        """Return a copy whose pick is shown by this one, too, as described in HessianSpectrumCallback."""
        made: HessianCheckpoint = deep_copied(self, memo)
        made._original = self
        return made

    def __copy__(self) -> HessianCheckpoint:
        """Return a deep copy: two runs cannot share candidates."""
        return copy.deepcopy(self)

    @property
    def name_prefix(self) -> str:
        """What the names of files begin with: the names of the callback whose records are ranked, and of the rule."""
        return prefix(self.source.name if self.source else "hesd", self.rule_name.rpartition(".")[2])

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: equal rules would overwrite each other's."""
        return self._generate_state_key(
            rule=self.rule_name,
            train_metric=self.train_metric,
            train_metric_mode=self.train_metric_mode,
            tolerance="relative" if self.tolerance is None else self.tolerance,
            require_mp=self.require_mp,
            source=self.source.name if self.source else None,
        )

    @property
    def rule_name(self) -> str:
        """Name of the rule: its own, or that of the function."""
        return self.rule if isinstance(self.rule, str) else getattr(self.rule, "__qualname__", repr(type(self.rule)))

    @property
    def selection(self) -> CandidateFilter:
        """The rule's parameters by now; a tolerance relative to the progress grows with it."""
        return self._selection(self._best_score)

    def _selection(self, best: float) -> CandidateFilter:
        tolerance = progress_tolerance(self._first_score, best) if self.tolerance is None else self.tolerance
        return CandidateFilter(tolerance=tolerance, require_mp=self.require_mp)

    @property
    def qualified_steps(self) -> list[int]:
        """Optimizer steps of all analysed states among which the rule decides, also those whose files are deleted."""
        near = self.selection.qualified(self._ranked, self._best_score)
        return [c.global_step for c in near or self.candidates]

    @property
    def best(self) -> Candidate | None:
        """The pick so far, with its epoch, criterion and path; None before the first candidate."""
        return self.selection.pick(self.candidates, self._best_score)

    @property
    def best_model_path(self) -> str:
        """Path of the pick so far; without candidates that of the final weights, once training has ended."""
        return self.best.path if self.candidates and self.best else self._final_path

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Ignore what Lightning assigns: after ddp_spawn it is the path of whichever callback came first there."""

    _final_path = ""

    def attach(self, source: SpectrumSource) -> None:
        """Take the records of `source` from now on."""
        self.source = source

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder to write to, and the callback whose records to rank.

        Raises:
            MisconfigurationException: If there is not exactly one, and one of several is to raise.
        """
        super().setup(trainer, pl_module, stage)
        self._stage = stage
        if self.source is not None or stage != TrainerFn.FITTING:
            return
        try:
            self.source = only_source(trainer)
        except MisconfigurationException as error:
            if any_source_raises(trainer):
                raise
            warn(f"there will be no pick but the final weights. {error}")

    def forget_run(self) -> None:
        """Start from nothing: a callback may serve several runs."""
        super().forget_run()
        self._first_score, self._ranked = None, []
        self._update([], -math.inf)
        self._offered_step = -1
        self._analysed.drop()

    def keep_weights(self, weights: AnalysedWeights) -> None:
        """Keep what has just been analysed until it is ranked; for the callback that analyses."""
        self._analysed.keep(weights)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with a run, or go on with the candidates of the one that is resumed."""
        super().on_train_start(trainer, pl_module)
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_args: Any) -> None:
        """Let go of an analysis whose training metric has not come, for the weights are about to change."""
        self._begin(trainer, pl_module)
        if self._latest(trainer) is not None:
            self._pass_over(trainer)
        self._analysed.drop()
        self._metric.begin_batch(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Take up an analysis made after this step, if its training metric is there already."""
        self._offer_latest(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Take up an analysis made after the last step: that of an epoch comes only after its validation."""
        self._offer_latest(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up an analysis made after this epoch, and write last.ckpt."""
        self._begin(trainer, pl_module)
        saved = self._offer_latest(trainer)
        if self._latest(trainer) is not None:
            self._pass_over(trainer)
        if self.save_last and self._may_save(trainer):
            # A link can only point to a file of this very state of the weights, so that it never dangles.
            wanted, self.save_last = self.save_last, self.save_last if saved else True
            names = self._monitor_candidates(trainer)
            self._is_written("last.ckpt", lambda: self._save_last_checkpoint(trainer, names))
            self.save_last = wanted

    def on_train_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Keep the final weights if the rule had nothing to decide on, and say where the pick is."""
        self._keep_final(trainer)
        if self.best_model_path and self._may_save(trainer):
            self._say_where(trainer)

    def _keep_final(self, trainer: pl.Trainer) -> None:
        """Say so if the rule could not decide, and keep the final weights if it had nothing to decide on."""
        if self.candidates and not self.selection.qualified(self.candidates, self._best_score):
            warn(
                "none of the epochs with nearly the best training metric has a mainly positive (MP) spectrum, so "
                f"HessianCheckpoint(rule={self.rule!r}) took the best training metric; `require_mp=False` ranks MN "
                "spectra too."
            )
        if self.candidates or not self._may_save(trainer):
            return
        names = self._monitor_candidates(trainer)
        names["epoch"] = torch.tensor(max(trainer.current_epoch - 1, 0))  # the trainer already counts the next one
        path = self._final_path = self.free_path(trainer, names, ())
        if not self._is_written(path, lambda: self._save_checkpoint(trainer, path)):
            self._final_path = ""
        elif self.source is not None and self.source.refusal is None:  # else a warning has said so
            warn(
                f"HessianCheckpoint(rule={self.rule!r}) could rank no analysed epoch; its best_model_path is the "
                f"checkpoint of the final weights, {path}."
            )

    def _say_where(self, trainer: pl.Trainer) -> None:
        """Say which file is the pick, and whether Lightning's "best" is that one."""
        name = self.source.name if self.source else "hesd"
        rule = rule_title(self.rule_name)
        what = "the final weights" if self.best is None else f"epoch {self.best.epoch}"
        first = trainer.checkpoint_callback
        if first is self:
            whose = '`ckpt_path="best"` loads it'
        else:
            attached = self.source is not None and self.source.checkpoint is self
            own = f"`{'callback.checkpoint' if attached else 'HessianCheckpoint'}.best_model_path`"
            whose = f'it is {own}, and `ckpt_path="best"` remains the best of {type(first).__name__}'
        inform(f"{name}: {rule} picks {what}, {self.best_model_path}; {whose}.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the process that started the fit know the pick, if it is another one."""
        super().teardown(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            launched.send(trainer, self._address, self.state_dict())
            self._show()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the callback that this one was copied from know the pick, also when the fit fails."""
        super().on_exception(trainer, pl_module, exception)
        self._show()

    def _show(self) -> None:
        """Let the callback that this one was copied from know the pick."""
        if self._original is not None and self.dirpath is not None:  # a fit that fails early has no folder
            self._original.receive(self.state_dict())

    def receive(self, state: dict[str, Any]) -> None:
        """Take over the candidates of the processes that have trained, where they end with the fit."""
        self.dirpath = self._found["dirpath"] = state["dirpath"]
        self._load(state)
        self._final_path = state["best_model_path"]
        self._show()

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with a run, once, also where this callback was added after the Trainer had set up the others."""
        if self._set_up_by != name_of(trainer):
            self.setup(trainer, pl_module, TrainerFn.FITTING)
        if self._knows_neighbours:
            return
        self._knows_neighbours = True
        self.choose_names(trainer)
        self._said.clear()
        self._metric.restart(trainer)
        if trainer.global_step == 0:
            self.forget_run()
        elif self._is_resumed and (gone := self.gone(trainer, self.candidates)):
            self._update([c for c in self.candidates if c.path not in gone], self._best_score)
            warn(
                "checkpoints of earlier candidates are gone, cannot be reached or were overwritten, and cannot be "
                f"picked any more: {', '.join(gone)}."
            )
        self._is_resumed = False
        self._offered_step = trainer.global_step  # what was analysed before has had its turn

    # Ranking --------------------------------------------------------------------------------------------------------

    def _may_save(self, trainer: pl.Trainer) -> bool:
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        return not fast_dev_run and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _latest(self, trainer: pl.Trainer) -> SpectrumRecord | None:
        """Return the latest record if it belongs to the present weights, was not ranked yet, and can be."""
        record = self.source.history[-1] if self.source is not None and self.source.history else None
        step = trainer.global_step
        if record is None or record.global_step != step or step in (0, self._offered_step):
            return None
        is_defined = record.spectrum is not None and not math.isnan(record.spectrum.c_t)
        return record if is_defined and self._may_save(trainer) else None

    def _offer_latest(self, trainer: pl.Trainer) -> bool:
        """Take up the latest record once its training metric is known.

        Returns:
            Whether the weights were saved, and the module still has them.
        """
        record = self._latest(trainer)
        if record is None or record.spectrum is None:
            return False
        score: float | None = trainer.strategy.broadcast(self._metric.score(trainer, record.spectrum))
        if score is None:
            return False
        self._offered_step = trainer.global_step
        if self._first_score is None:
            self._first_score = trainer.strategy.broadcast(self._first(score))
        criterion = trainer.strategy.broadcast(self._criterion(record))
        changes = self._analysed.compare(trainer, record.epoch)
        can_be_ranked = not (math.isnan(score) or math.isnan(criterion) or changes.lost)
        saved = can_be_ranked and self._consider(trainer, record, score, criterion)
        self._analysed.drop()
        return saved and not changes.names

    def _first(self, score: float) -> float | None:
        """Return the score of the first analysed state, of which this one is the first to be ranked."""
        if self.train_metric is None and self.source is not None:
            loss = first_loss(self.source.history)
            return None if loss is None else -loss
        return score if math.isfinite(score) else None

    def _pass_over(self, trainer: pl.Trainer) -> None:
        """Leave out a record without a training metric of its own, and say so the first time."""
        self._offered_step = trainer.global_step
        self._analysed.drop()
        assert self.source is not None  # noqa: S101 - found in `setup`
        self._complain(self._metric.complaint(trainer, self.source.name), key="metric")

    def _consider(self, trainer: pl.Trainer, record: SpectrumRecord, score: float, criterion: float) -> bool:
        before, best = self.candidates, max(score, self._best_score)
        path = self.free_path(trainer, self._monitor_candidates(trainer), [c.path for c in before])
        mark: str = trainer.strategy.broadcast(uuid.uuid4().hex)
        mainly_positive = record.spectrum is not None and record.spectrum.hesd_type == "MP"
        latest = Candidate(record.epoch, record.global_step, score, criterion, mainly_positive, path, mark)
        kept = self._selection(best).pareto_front([*before, latest], best)
        self._ranked = [*self._ranked, latest]
        # Updated before saving, because the checkpoint holds this very state; deleted after it, so that an interruption
        # leaves a file too many rather than one too few.
        state = self.state_dict()
        self._update(kept, best)
        if latest in kept and not self._is_written(
            path, lambda: self._analysed.save(trainer, mark, lambda: self._save_checkpoint(trainer, path))
        ):
            self._load(state)
            return False
        for candidate in before:
            if candidate not in kept and self._should_remove_checkpoint(trainer, candidate.path, path):
                self._remove_checkpoint(trainer, candidate.path)
        self._show()
        assert self.source is not None  # noqa: S101 - found in `setup`
        self.source.record_selection(
            trainer,
            SelectionEvent(
                self.rule_name,
                self.train_metric,
                self.train_metric_mode,
                self.selection,
                latest,
                pick=self.best,
                is_relative=self.tolerance is None,
            ),
        )
        return latest in kept

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a checkpoint; where that fails, it does so in all processes."""
        with saving_together(trainer):
            super()._save_checkpoint(trainer, filepath)

    def _is_written(self, name: str, write: Callable[[], None]) -> bool:
        """Write a file; a full disk costs the file, and not the training.

        Raises:
            OSError: If it cannot be written, and exceptions are to be raised.
        """
        try:
            write()
        except OSError as error:
            if self.source is not None and self.source.on_error == "raise":
                raise
            warn(f"HessianCheckpoint(rule={self.rule!r}) could not write {name} ({one_line(error)}).")
            return False
        return True

    def _update(self, candidates: list[Candidate], best: float) -> None:
        """Set the candidates, and what ModelCheckpoint says about them."""
        self.candidates, self._best_score = candidates, best
        self.best_k_models = {c.path: torch.tensor(c.criterion) for c in candidates}
        self.kth_best_model_path = min(candidates, key=lambda c: c.criterion).path if candidates else ""
        self.kth_value = self.best_k_models.get(self.kth_best_model_path, torch.tensor(-math.inf))
        pick = self.best
        self._final_path = ""
        self.best_model_score = torch.tensor(pick.criterion) if pick else None
        self.current_score = torch.tensor(candidates[-1].criterion) if candidates else None

    def _criterion(self, record: SpectrumRecord) -> float:
        """Return what the rule ranks by; NaN if it cannot tell."""
        assert record.spectrum is not None  # noqa: S101 - checked by the caller
        if isinstance(self.rule, str):
            return RULES[self.rule].score(record)
        try:
            return float(self.rule(record))
        except Exception as error:  # noqa: BLE001 - a user's function; the run goes on without it
            self._complain(f"the rule of HessianCheckpoint failed at epoch {record.epoch}: {error!r}", cause=error)
            return math.nan

    def _complain(
        self, message: str, *, key: str | None = None, harmless: bool = False, cause: Exception | None = None
    ) -> None:
        """Warn, or raise if the callback is to raise and it is not harmless; what has a key once in a run only.

        Raises:
            MisconfigurationException: If so.
        """
        if not harmless and self.source is not None and self.source.on_error == "raise":
            raise MisconfigurationException(message) from cause
        if key is None or key not in self._said:
            warn(message)
        self._said.update([] if key is None else [key])

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the candidates; plain values only."""
        return {
            "candidates": [vars(candidate) for candidate in self.candidates],
            "best_goodness": self._best_score,
            "first_goodness": self._first_score,
            "ranked": ranked_state(self._ranked),
            "offered_step": self._offered_step,
            "best_model_path": self.best_model_path,
            "last_model_path": self.last_model_path,
            "dirpath": str(self.dirpath),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the candidates of the run that is resumed.

        Testing a checkpoint loads this too, though nothing is resumed; it must not undo what came after it.

        Raises:
            ValueError: If it is something else, or is damaged.
        """
        if self._stage != "fit":
            return
        wrong = wrong_field(state_dict)
        if wrong is not None:
            msg = (
                f"the state of HessianCheckpoint(rule={self.rule_name!r}) in the checkpoint is damaged, or of another "
                f"version: its `{wrong}` is missing or is something else. Resume with another `tolerance`, which "
                "starts a new ranking."
            )
            raise ValueError(msg)
        self._is_resumed = True
        self._load(state_dict)

    def _load(self, state: dict[str, Any]) -> None:
        state = completed(state)
        self._first_score, self._ranked = state["first_goodness"], ranked_in(state)
        self._update(candidates_in(state), state["best_goodness"])
        self._offered_step = state["offered_step"]
        if str(self.dirpath) == state["dirpath"]:
            self.last_model_path = state["last_model_path"]
