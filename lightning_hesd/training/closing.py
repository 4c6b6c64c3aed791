"""What is said at the end of a run: the table of all analyses, and where the results are."""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING

from lightning_hesd.spectra.selection import picks
from lightning_hesd.spectra.summary import Kept, summarize
from lightning_hesd.training import terminal
from lightning_hesd.training.checkpoints.placement import checkpoints_of
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.folders import is_remote, shown_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.training.history import SpectrumHistory
    from lightning_hesd.training.source import SpectrumSource


def sum_up(trainer: pl.Trainer, source: SpectrumSource, folder: str | None) -> None:
    """Print the table with `verbose`, and say where the results are; the checkpoint callbacks name their picks.

    Args:
        trainer: The Trainer.
        source: The callback with the records.
        folder: Folder of the spectra; None: they are not written, or by another rank.
    """
    checkpoints = checkpoints_of(trainer, source)
    if source.verbose:
        summary = partial(
            summarize,
            source.history,
            source.name,
            seconds=source.budget.analysis_seconds,
            overhead=source.budget.overhead,
            kept={c.rule_name: Kept(c.best, c.qualified_steps) for c in checkpoints if c.best},
        )
        terminal.show(trainer, summary)
    if folder is None or not source.history:
        return
    lines = [f"{source.name}: {results_words(trainer, source.name, folder)}"]
    if not checkpoints and not source.verbose:  # the table has the picks
        lines.insert(0, f"{source.name}: {pick_words(source.history)}")
    terminal.conclude(trainer, *lines, printed=source.verbose)


def pick_words(history: SpectrumHistory) -> str:
    """Say which epoch a rule would have picked in a run without a rule."""
    found = picks(history, fallback=False).get("highest_c_t")
    if all(record.error is not None for record in history):
        return "no analysis succeeded, so that no rule would pick an epoch; `history[-1].error` says why"
    if found is None:
        return "no rule would pick an epoch: no analyzed one near the lowest loss is mainly positive (MP)"
    return f'highest C_t would pick epoch {found.epoch}; `checkpoint="highest_c_t"` would keep its checkpoint'


def results_words(trainer: pl.Trainer, name: str, folder: str) -> str:
    """Say where the spectra of a run are, and the command that shows them."""
    loggers = [x for x in trainer.loggers if isinstance(x, lightning_types("loggers.TensorBoardLogger"))]
    if loggers and not is_remote(loggers[0].root_dir):
        command = ["tensorboard", "--logdir", shown_path(loggers[0].root_dir)]
    else:
        of_name = [] if name == "hesd" else ["--name", name]
        run = folder.removesuffix(name).rstrip("/\\")  # to ask the Trainer for it, all ranks must
        command = ["lightning-hesd", "report", shown_path(run), *of_name]
    return f"all spectra are in {shown_path(folder)}; `{shlex.join(command)}` shows them"
