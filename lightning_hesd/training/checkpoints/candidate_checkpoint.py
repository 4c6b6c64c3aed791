"""A checkpoint callback that keeps the files of a ranking's candidates, and of no other states of the weights."""

from __future__ import annotations

import math
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.selection import Candidate
from lightning_hesd.spectra.validation import first_invalid_field
from lightning_hesd.training.callback_copies import CopiedCallback
from lightning_hesd.training.checkpoints.exclusive_checkpoint import ExclusiveCheckpoint, is_overwritten, path_now
from lightning_hesd.training.checkpoints.ranking import STATE
from lightning_hesd.training.checkpoints.ranking_in_time import end_ranking_before_saves
from lightning_hesd.training.checkpoints.weights import AnalyzedSaving
from lightning_hesd.training.compat.messages import warn
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.error_policy import ErrorPolicy
from lightning_hesd.training.folders import folder_of
from lightning_hesd.training.source import only_source, sources_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl
    from typing_extensions import Self

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.training.checkpoints.ranking import RunRanking
    from lightning_hesd.training.checkpoints.weights import AnalyzedWeights
    from lightning_hesd.training.source import SpectrumSource


class CandidateCheckpoint(CopiedCallback, ExclusiveCheckpoint):
    """Writes a file for each candidate, and deletes it once the candidate is beaten.

    Attributes:
        errors: Whether failures become warnings or are raised.
        source: The callback whose records are ranked; None: not found yet.
        rule: Name of the rule, or the user's function.
        writes_candidate: Whether the file of a candidate is being written.
    """

    rule: str | Callable[[SpectrumRecord], float]
    writes_candidate = False

    _final_path = _resumed_dirpath = ""

    def __init__(self, ranking: RunRanking, **kwargs: Any) -> None:
        """Begin without candidates; `kwargs` are arguments of ModelCheckpoint."""
        self._ranking = ranking  # which `best_model_path` needs
        super().__init__(**kwargs)
        self.errors = ErrorPolicy()
        self._analyzed = AnalyzedSaving(self.errors)
        self.source: SpectrumSource | None = None
        self._stage = "fit"
        self.begin_copies()

    @property
    def title(self) -> str:
        """Name of this callback in messages."""
        raise NotImplementedError

    @property
    def candidates(self) -> list[Candidate]:
        """The states that the rule may still pick, in the order of training."""
        return self._ranking.candidates

    @property
    def qualified_steps(self) -> list[int]:
        """Optimizer steps of all analyzed states among which the rule decides, those without a file, too."""
        return self._ranking.qualified_steps

    @property
    def best(self) -> Candidate | None:
        """The pick so far, with its epoch, criterion and path; None before the first candidate."""
        return self._ranking.pick

    @property
    def rivals(self) -> list[SpectrumRecord]:
        """The records among which the rule decides that are not evidently worse than its pick, which is left out.

        Empty, too, where that cannot be told: it takes `sampling_error=True`, and a rule whose errors are known.
        """
        return [] if self.best is None else self._rivals_of(self.best)

    def _rivals_of(self, pick: Candidate) -> list[SpectrumRecord]:
        by_step = {record.global_step: record for record in self.source.history} if self.source is not None else {}
        if not isinstance(self.rule, str) or pick.global_step not in by_step:
            return []
        among = [by_step[step] for step in self.qualified_steps if step in by_step]
        return RULES[self.rule].rivals(by_step[pick.global_step], among)

    @property
    def best_model_path(self) -> str:
        """Path of the pick so far; without candidates that of the final weights, once training has ended."""
        return self.best.path if self.candidates and self.best else self._final_path

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Ignore what Lightning assigns: after ddp_spawn it is the path of the Trainer's first checkpoint callback."""

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
            if any(source.errors.raises for source in sources_of(trainer)):
                raise
            warn(f"there will be no pick but the final weights. {error}")

    def forget_run(self) -> None:
        """Forget the candidates: a callback may serve several runs."""
        super().forget_run()
        self._ranking.clear()
        self._update([], -math.inf)
        self._analyzed.drop()

    def keep_weights(self, weights: AnalyzedWeights) -> None:
        """Keep analyzed weights until they are ranked."""
        self._analyzed.keep(weights)

    def forget_missing_files(self, trainer: pl.Trainer) -> None:
        """Drop the candidates of a resumed run whose files are gone or overwritten, the same on every rank.

        A folder that was moved has them at the same places within it.
        """
        moves = [(self._resumed_dirpath, folder) for folder in (self.dirpath, folder_of(trainer.ckpt_path or ""))]
        paths = [path_now(c.path, c.mark, moves) for c in self.candidates] if trainer.is_global_zero else []
        paths = trainer.strategy.broadcast(paths)
        found = [replace(c, path=path) for c, path in zip(self.candidates, paths, strict=True) if path]
        gone = [c.path for c, path in zip(self.candidates, paths, strict=True) if not path]
        if found != self.candidates:
            self._update(found, self._ranking.best_score)
        if gone:
            warn(
                "checkpoints of earlier candidates are gone, cannot be reached or were overwritten, and cannot be "
                f"picked any more: {', '.join(gone)}."
            )

    def _consider(
        self, trainer: pl.Trainer, record: SpectrumRecord, score: float, criterion: float
    ) -> Candidate | None:
        """Rank the present weights: write their file if they become a candidate, and delete those of beaten ones.

        Of score and criterion, higher is better. Return their entry in the ranking; None if the file was not written.
        """
        before = self.candidates
        path = self.free_path(trainer, self._monitor_candidates(trainer), [c.path for c in before])
        mark: str = trainer.strategy.broadcast(uuid.uuid4().hex)
        mainly_positive = record.spectrum is not None and record.spectrum.hesd_type == "MP"
        latest = Candidate(record.epoch, record.global_step, score, criterion, mainly_positive, path, mark)
        kept, best = self._ranking.front_with(latest)
        # Updated before saving, because the checkpoint holds this very state; deleted after it, so that an interruption
        # leaves a file too many rather than one too few.
        state = self.state_dict()
        self._update(kept, best)
        with patched(self, "writes_candidate", value=True):
            if latest in kept and not self.is_written(
                path, lambda: self._analyzed.save(trainer, mark, lambda: self._save_checkpoint(trainer, path))
            ):
                self._load(state)
                return None
        for candidate in before:
            is_ours = candidate not in kept and not is_overwritten(candidate.path, candidate.mark)
            if is_ours and self._should_remove_checkpoint(trainer, candidate.path, path):
                self._remove_checkpoint(trainer, candidate.path)
        self.show_in_original()
        return latest

    def _update(self, candidates: list[Candidate], best_score: float) -> None:
        """Set the candidates, of which one becomes the pick; that of a loaded state stays, also without its records."""
        self._ranking.candidates, self._ranking.best_score = candidates, best_score
        self._ranking.break_ties(lambda pick: [record.global_step for record in self._rivals_of(pick)])
        self._show_candidates()

    def _show_candidates(self) -> None:
        """Set the attributes in which ModelCheckpoint shows the candidates."""
        candidates = self.candidates
        self.best_k_models = {c.path: torch.tensor(c.criterion) for c in candidates}
        self.kth_best_model_path = min(candidates, key=lambda c: c.criterion).path if candidates else ""
        self.kth_value = self.best_k_models.get(self.kth_best_model_path, torch.tensor(-math.inf))
        pick = self.best
        self._final_path = ""
        self.best_model_score = torch.tensor(pick.criterion) if pick else None
        self.current_score = torch.tensor(candidates[-1].criterion) if candidates else None

    # Files ----------------------------------------------------------------------------------------------------------

    def may_save(self, trainer: pl.Trainer) -> bool:
        """Return whether this is training, in which checkpoints are written."""
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        return not fast_dev_run and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def is_written(self, name: str, write: Callable[[], None]) -> bool:
        """Write a file, and return whether that succeeded: a full disk or a hook that fails does not end training.

        An exception is raised if exceptions are to be raised.
        """
        with self.errors.guard(f"{self.title} could not write {name}") as attempt:
            write()
        return attempt.failure is None

    def save_final(self, trainer: pl.Trainer) -> bool:
        """Write the final weights, which take the place of the pick, and return whether that succeeded."""
        names = self._monitor_candidates(trainer)
        names["epoch"] = torch.tensor(max(trainer.current_epoch - 1, 0))  # the Trainer counts the next one already
        path = self._final_path = self.free_path(trainer, names, ())
        if self.is_written(f"the final weights to {path}", lambda: self._save_checkpoint(trainer, path)):
            return True
        self._final_path = ""
        return False

    # State ----------------------------------------------------------------------------------------------------------

    def report(self, trainer: pl.Trainer) -> None:
        """Name the pick and its file at the end of a run."""
        raise NotImplementedError

    def on_fit_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        """Name the pick, below the bars and the table of the run."""
        if self._has_names and self.may_save(trainer) and self.best_model_path:
            self.report(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the original show the pick of this copy, also when the fit fails, and name it."""
        end_ranking_before_saves(trainer)
        super().on_exception(trainer, pl_module, exception)
        self.show_in_original()
        with self.errors.guard("cannot name the pick", "warn"):  # another exception would replace the first
            self.on_fit_end(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bring the pick to the process that started the fit, if this one ends with the fit."""
        end_ranking_before_saves(trainer)
        super().teardown(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            self.send_results(trainer)
            self.show_in_original()

    def take_results(self, state: dict[str, Any]) -> None:
        """Replace the candidates by those of a copy's `state_dict`."""
        self.dirpath = self._found["dirpath"] = state["dirpath"]
        self._load(state)
        self._final_path = state["best_model_path"]

    def share_results(self, original: Self) -> None:
        """Give the candidates to the original, unless the fit failed before the folder was known."""
        if self.dirpath is not None:
            super().share_results(original)

    def state_dict(self) -> dict[str, Any]:
        """Return the candidates as plain values."""
        return {
            **self._ranking.state_dict(),
            "best_model_path": self.best_model_path,
            "last_model_path": self.last_model_path,
            "dirpath": str(self.dirpath),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the candidates of the run that is resumed.

        Testing a checkpoint loads the state, too, without resuming the run: the later candidates then stay.

        Raises:
            ValueError: If a field is missing or damaged.
        """
        if self._stage != "fit":
            return
        if (wrong := first_invalid_field(state_dict, STATE)) is not None:
            msg = (
                f"the state of {self.title} in the checkpoint is damaged, or of another version: its `{wrong}` is "
                "missing or invalid. Resume with another `tolerance`, which starts a new ranking."
            )
            raise ValueError(msg)
        self._is_resumed, self._resumed_dirpath = True, state_dict["dirpath"]
        self._load(state_dict)

    def _load(self, state: dict[str, Any]) -> None:
        self._ranking.load_state_dict(state)
        self._show_candidates()
        if str(self.dirpath) == state["dirpath"]:
            self.last_model_path = state["last_model_path"]
