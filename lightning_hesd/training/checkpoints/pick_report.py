"""The line at the end of training that names the pick of a rule and its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.spectra.record import when
from lightning_hesd.spectra.validation import first_line
from lightning_hesd.training import terminal
from lightning_hesd.training.checkpoints.exclusive_checkpoint import is_overwritten
from lightning_hesd.training.compat.messages import warn
from lightning_hesd.training.folders import shown_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.training.checkpoints.candidate_checkpoint import CandidateCheckpoint


def report_pick(trainer: pl.Trainer, checkpoint: CandidateCheckpoint, rule: str) -> None:
    """Name the pick of a rule, given by its title, and its file; say whether Lightning's "best" is that file."""
    source = checkpoint.source
    pick = "has no pick; the final weights are in"
    if checkpoint.best is not None:
        pick = f"picks epoch {checkpoint.best.epoch},"
    rivals = ", ".join(f"{record.epoch}" for record in checkpoint.rivals)
    doubt = f" Within two standard errors of it are epochs {rivals}." if rivals else ""
    line = (
        f"{source.name if source else 'hesd'}: {rule} {pick} {shown_path(checkpoint.best_model_path)}; "
        f"{_loading(trainer, checkpoint)}.{doubt}"
    )
    if checkpoint.best is not None and is_overwritten(checkpoint.best.path, checkpoint.best.mark):
        warn(
            f"{checkpoint.best.path} is the file of the pick, and another run has overwritten it: give each run a "
            "folder of its own, by a logger, `default_root_dir` or `dirpath`."
        )
    terminal.conclude(trainer, line, printed=source is not None and source.verbose)


def why_nothing_was_ranked(checkpoint: CandidateCheckpoint) -> str:
    """Say why there is no pick, by the latest record."""
    history = checkpoint.source.history if checkpoint.source is not None else None
    if not history:
        return "no epoch was analyzed"
    record = history[-1]
    if record.spectrum is None:
        return f"the analysis {when(record.epoch)} failed: {first_line(record.error)}"
    if record.spectrum.reason is not None:
        return f"the spectrum {when(record.epoch)} has no C_t: {record.spectrum.reason}"
    return "a warning has said why"


def _loading(trainer: pl.Trainer, checkpoint: CandidateCheckpoint) -> str:
    """Say how to load the pick."""
    first = trainer.checkpoint_callback
    if first is checkpoint:
        return '`ckpt_path="best"` loads it'
    attached = [] if checkpoint.source is None else list(checkpoint.source.checkpoints)
    own = "HessianCheckpoint"
    if checkpoint in attached:
        own = "callback.checkpoint" if len(attached) == 1 else f"callback.checkpoints[{attached.index(checkpoint)}]"
    return f'it is `{own}.best_model_path`, and `ckpt_path="best"` remains the best of {type(first).__name__}'
