"""`HessianCheckpoint`: the checkpoint that should generalise best, by the rule of Gabdullin (2025), section 4.2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_hesd.spectra.foreign import each, having, integer, misfit, number, of, text
from lightning_hesd.spectra.selection import CRITERIA, LOSS_TOLERANCE, Candidate, Choice, SelectionRule
from lightning_hesd.training._lightning import callbacks_of, warn
from lightning_hesd.training.history import SpectrumSource

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.history import SpectrumRecord

    Rule = Literal["highest_c_t", "lowest_max_eigenvalue"] | Callable[[SpectrumRecord], float]

REFUSED = (
    *("monitor", "mode", "save_top_k", "every_n_train_steps", "every_n_epochs", "train_time_interval"),
    "save_on_train_epoch_end",
)

_CANDIDATE = {
    "epoch": integer,
    "global_step": integer,
    "goodness": number,
    "criterion": number,
    "mainly_positive": of(bool),
    "path": text,
}
_STATE = {
    "candidates": each(having(_CANDIDATE)),
    "best_goodness": number,
    "offered_step": integer,
    "best_model_path": text,
    "last_model_path": text,
    "dirpath": text,
}


class HessianCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best Hessian criterion among those trained equally well.

    Candidates are the analysed epochs whose training metric lies within `tolerance` of the best analysed epoch's.
    Of these the rule takes the highest criterion, the earliest of equals. `best_model_path` always names the pick so
    far; `best_k_models` also holds the few checkpoints that could still become it. Everything else is deleted. With
    `save_last`, last.ckpt is written after every training epoch, analysed or not.

    Pass it as `HessianSpectrumCallback(checkpoint=...)`, or in the Trainer's `callbacks` beside the one
    HessianSpectrumCallback. `trainer.test(ckpt_path="best")` then uses it, whatever other checkpoint callbacks there
    are.

    Args:
        rule: "highest_c_t" (the paper's), "lowest_max_eigenvalue" (the one it compares with), or a function of the
            record, higher is better.
        train_metric: Key of a logged training metric, such as "train_acc"; None: the analysis's own mean loss.
        train_metric_mode: "max" or "min"; default: "max" for a `train_metric`, but a name with "loss" or "err" needs
            it said; "min" for None.
        tolerance: How far the metric may lie from the best, absolute; default: 0.01 for a `train_metric`, 0.05 for
            the loss.
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
        if not callable(rule) and rule not in CRITERIA:
            msg = f"`rule` must be {' or '.join(map(repr, CRITERIA))} or a function of the record, got {rule!r}."
            raise MisconfigurationException(msg)
        if tolerance is not None and not tolerance >= 0:
            msg = f"`tolerance` must not be negative, got {tolerance!r}."
            raise MisconfigurationException(msg)
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
        self.train_metric = train_metric
        self.train_metric_mode = _metric_mode(train_metric, train_metric_mode)
        if tolerance is None:
            tolerance = LOSS_TOLERANCE if train_metric is None else 0.01
        self.selection = SelectionRule(tolerance=tolerance, require_mp=require_mp)
        self.source: SpectrumSource | None = None
        self._stage = "fit"
        self.candidates: list[Candidate] = []
        self._best_goodness = -math.inf
        self._offered_step = -1

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: equal rules would overwrite each other's."""
        return self._generate_state_key(
            rule=self.rule_name,
            train_metric=self.train_metric,
            train_metric_mode=self.train_metric_mode,
            tolerance=self.selection.tolerance,
            require_mp=self.selection.require_mp,
            source=self.source.name if self.source else None,
        )

    @property
    def rule_name(self) -> str:
        """Name of the rule: its own, or that of the function."""
        return self.rule if isinstance(self.rule, str) else getattr(self.rule, "__qualname__", repr(type(self.rule)))

    @property
    def best(self) -> Candidate | None:
        """The pick so far, with its epoch, criterion and path; None before the first candidate."""
        return self.selection.pick(self.candidates, self._best_goodness)

    def attach(self, source: SpectrumSource) -> None:
        """Take the records of `source` from now on."""
        self.source = source

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback whose records to rank.

        Raises:
            MisconfigurationException: If there is not exactly one.
        """
        super().setup(trainer, pl_module, stage)
        self._stage = stage
        if self.source is None and stage == TrainerFn.FITTING:
            self.source = _only_source(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from nothing when training does: a callback may serve several runs."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._update([], -math.inf)
            self._offered_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Take up an analysis made after this step."""
        self._offer_latest(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Take up an analysis made after this epoch, and write last.ckpt."""
        saved = self._offer_latest(trainer)
        if self.save_last and self._may_save(trainer):
            # A link can only point to a file of this very state of the weights, so that it never dangles.
            wanted, self.save_last = self.save_last, self.save_last if saved else True
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self.save_last = wanted

    def on_validation_end(self, *_args: Any) -> None:
        """Do nothing: validation comes before the analysis of its epoch."""

    def on_train_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Say so if the rule could not decide, and keep the final weights if it had nothing to decide on."""
        if self.candidates and not self.selection.qualified(self.candidates, self._best_goodness):
            warn(
                "none of the epochs with nearly the best training metric has a mainly positive (MP) spectrum, so "
                f"HessianCheckpoint(rule={self.rule!r}) took the best training metric; `require_mp=False` ranks MN "
                "spectra too."
            )
        if self.candidates or not self._may_save(trainer):
            return
        names = self._monitor_candidates(trainer)
        names["epoch"] = torch.tensor(max(trainer.current_epoch - 1, 0))  # the trainer already counts the next one
        path = self._get_metric_interpolated_filepath_name(names, trainer)
        warn(
            f"HessianCheckpoint(rule={self.rule!r}) could rank no analysed epoch; its best_model_path is the "
            f"checkpoint of the final weights, {path}."
        )
        self.best_model_path = path
        self._save_checkpoint(trainer, path)

    # Ranking --------------------------------------------------------------------------------------------------------

    def _may_save(self, trainer: pl.Trainer) -> bool:
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        return not fast_dev_run and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _offer_latest(self, trainer: pl.Trainer) -> bool:
        """Take up the latest record if it belongs to the present weights; return whether they were saved."""
        assert self.source is not None  # noqa: S101 - found in `setup`
        record = self.source.history[-1] if self.source.history else None
        step = trainer.global_step
        if record is None or record.global_step != step or step in (0, self._offered_step):
            return False
        self._offered_step = step
        if record.spectrum is None or math.isnan(record.spectrum.c_t) or not self._may_save(trainer):
            return False
        goodness = trainer.strategy.broadcast(self._goodness(trainer, record.spectrum))
        criterion = trainer.strategy.broadcast(self._criterion(record))
        if math.isnan(goodness) or math.isnan(criterion):
            return False
        return self._consider(trainer, record, goodness, criterion)

    def _consider(self, trainer: pl.Trainer, record: SpectrumRecord, goodness: float, criterion: float) -> bool:
        path = self._get_metric_interpolated_filepath_name(self._monitor_candidates(trainer), trainer)
        mainly_positive = record.spectrum is not None and record.spectrum.hesd_type == "MP"
        newcomer = Candidate(record.epoch, record.global_step, goodness, criterion, mainly_positive, path)
        before, best = self.candidates, max(goodness, self._best_goodness)
        kept = self.selection.still_pickable([*before, newcomer], best)
        # Updated before saving, because the checkpoint holds this very state; deleted after it, so that an interruption
        # leaves a file too many rather than one too few.
        self._update(kept, best)
        if newcomer in kept:
            self._save_checkpoint(trainer, path)
        for candidate in before:
            if candidate not in kept and self._should_remove_checkpoint(trainer, candidate.path, path):
                self._remove_checkpoint(trainer, candidate.path)
        assert self.source is not None  # noqa: S101 - found in `setup`
        self.source.take_note(
            trainer,
            Choice(self.rule_name, self.train_metric, self.train_metric_mode, self.selection, newcomer, pick=self.best),
        )
        return newcomer in kept

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        """Return whether to delete a checkpoint: only of the own folder, whatever paths the resumed state has.

        Lightning compares them as they are written: those with `..` in them would lead out of the folder.
        """
        return super()._should_remove_checkpoint(trainer, previous, current) and _lies_in(previous, str(self.dirpath))

    def _update(self, candidates: list[Candidate], best: float) -> None:
        """Set the candidates, and what ModelCheckpoint says about them."""
        self.candidates, self._best_goodness = candidates, best
        self.best_k_models = {c.path: torch.tensor(c.criterion) for c in candidates}
        self.kth_best_model_path = min(candidates, key=lambda c: c.criterion).path if candidates else ""
        self.kth_value = self.best_k_models.get(self.kth_best_model_path, torch.tensor(-math.inf))
        pick = self.best
        self.best_model_path = pick.path if pick else ""
        self.best_model_score = torch.tensor(pick.criterion) if pick else None
        self.current_score = torch.tensor(candidates[-1].criterion) if candidates else None

    def _goodness(self, trainer: pl.Trainer, spectrum: Spectrum) -> float:
        """Return the training metric, its sign such that higher is better; NaN if there is none."""
        sign = 1.0 if self.train_metric_mode == "max" else -1.0
        if self.train_metric is None:
            return sign * spectrum.loss
        if self.train_metric in trainer.callback_metrics:
            return sign * float(trainer.callback_metrics[self.train_metric])
        msg = (
            f"HessianCheckpoint(train_metric={self.train_metric!r}) does not find its metric among the logged ones, "
            f"{sorted(trainer.callback_metrics)}, so it cannot rank epoch {trainer.current_epoch}: log it in the "
            "LightningModule, or choose another."
        )
        self._complain(msg)
        return math.nan

    def _criterion(self, record: SpectrumRecord) -> float:
        """Return what the rule ranks by; NaN if it cannot tell."""
        assert record.spectrum is not None  # noqa: S101 - checked by the caller
        if isinstance(self.rule, str):
            return CRITERIA[self.rule](record.spectrum)
        try:
            return float(self.rule(record))
        except Exception as error:  # noqa: BLE001 - a user's function; the run goes on without it
            self._complain(f"the rule of HessianCheckpoint failed at epoch {record.epoch}: {error!r}", error)
            return math.nan

    def _complain(self, message: str, cause: Exception | None = None) -> None:
        if self.source is not None and self.source.on_error == "raise":
            raise MisconfigurationException(message) from cause
        warn(message)

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the candidates; plain values only."""
        return {
            "candidates": [vars(candidate) for candidate in self.candidates],
            "best_goodness": self._best_goodness,
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
        wrong = misfit(state_dict, _STATE)
        if wrong is not None:
            msg = (
                f"the state of HessianCheckpoint(rule={self.rule_name!r}) in the checkpoint is damaged, or of another "
                f"version: its `{wrong}` is missing or is something else. Resume with another `tolerance`, which "
                "starts a new ranking."
            )
            raise ValueError(msg)
        candidates = [Candidate(**{name: values[name] for name in _CANDIDATE}) for values in state_dict["candidates"]]
        self._update(candidates, state_dict["best_goodness"])
        self._offered_step = state_dict["offered_step"]
        if str(self.dirpath) == state_dict["dirpath"]:
            self.last_model_path = state_dict["last_model_path"]
        missing = [c.path for c in candidates if not self._fs.exists(c.path)]
        if missing:
            present = [c for c in candidates if c.path not in missing]
            self._update(present, state_dict["best_goodness"])
            warn(f"checkpoints of earlier candidates are gone and cannot be picked any more: {', '.join(missing)}.")


def _lies_in(path: str, folder: str) -> bool:
    """Return whether a path is that of a checkpoint in a folder or below it, also on other filesystems."""
    if not path.endswith(ModelCheckpoint.FILE_EXTENSION):
        return False
    if "://" in folder:
        return path.startswith(f"{folder.rstrip('/')}/") and ".." not in path.split("/")
    # Of a link itself, not of what it points to: "last.ckpt" may be one.
    return "://" not in path and Path(path).parent.resolve().is_relative_to(Path(folder).resolve())


def _metric_mode(metric: str | None, mode: Literal["min", "max"] | None) -> Literal["min", "max"]:
    if mode not in (None, "min", "max"):
        msg = f"`train_metric_mode` must be 'min' or 'max', got {mode!r}."
        raise MisconfigurationException(msg)
    if mode is not None:
        return mode
    if metric is None:
        return "min"
    if any(word in metric.lower() for word in ("loss", "err")):
        msg = f"`train_metric={metric!r}` sounds as if lower were better: say so with `train_metric_mode='min'`."
        raise MisconfigurationException(msg)
    return "max"


def _only_source(trainer: pl.Trainer) -> SpectrumSource:
    sources = [callback for callback in callbacks_of(trainer) if isinstance(callback, SpectrumSource)]
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
