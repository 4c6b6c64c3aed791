"""`lightning-hesd analyze`: the spectra at the weights of checkpoints, with tables, files and figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hesd.commands.errors import CommandError, reported
from lightning_hesd.commands.project import Blueprint, imported
from lightning_hesd.commands.project_arguments import (
    MODE,
    add_project,
    checkpoints_of,
    project_of,
    separated,
    without_advice,
)
from lightning_hesd.commands.results import RESULTS, Results, summary_of, table_lines
from lightning_hesd.numerics.inputs.options import AnalysisOptions
from lightning_hesd.spectra.analysis_lines import result_line
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.compat.strategies import is_first_rank
from lightning_hesd.training.error_policy import ErrorPolicy
from lightning_hesd.training.loss_mode import AnalysisMode
from lightning_hesd.training.recorder import Recorder

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser, Namespace

    from lightning_hesd.commands.project import Checkpoint
    from lightning_hesd.spectra.record import SpectrumRecord

__all__ = ["add_arguments", "run", "separated"]

LONG = 36
"""Columns of a path, beyond which the results are printed in a line of their own."""

NOT_OF_THE_COMMAND_LINE: set[str | int] = {
    *("batch_weight", "batch_size", "matrix", "output_fn", "output_loss", "parameters", "dtype", "preconditioner"),
}
BATCH_WEIGHT = "'tokens', or a function batch -> its weight, as package.function; default: its samples."


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_project(parser)
    parser.add_argument("--generalization", type=str | None, help="'val' or 'test' data of --data, or a data module.")
    parser.add_argument("--generalization_args", type=dict[str, Any], default={}, help="Arguments of that data module.")
    parser.add_argument(
        "--preconditioned",
        type=bool,
        default=False,
        help="Also analyze the Hessian preconditioned by the optimizer, D^(-1/2) H D^(-1/2).",
    )
    parser.add_argument(
        "--tolerance_of_loss",
        type=float | None,
        help="Candidates have a loss within this of the lowest one; default: 5 % of its drop.",
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("hesd"), help="Folder of the results; an interrupted run goes on."
    )
    parser.add_class_arguments(AnalysisOptions, "analysis", skip={*NOT_OF_THE_COMMAND_LINE, "mode"})
    (parser.groups or {})["analysis"].title = "The options of an analysis"  # without names of functions
    parser.add_argument("--analysis.mode", type=AnalysisMode, default="auto", help=MODE)
    parser.add_argument("--analysis.batch_weight", type=str | None, help=BATCH_WEIGHT)


def run(config: Namespace) -> None:
    """Analyze the checkpoints that are not in the folder yet, and write the table, files and figures.

    Raises:
        CommandError: If the analysis of a checkpoint failed, or no checkpoint exists.
    """
    analysis = _CheckpointAnalysis(config)
    paths = checkpoints_of(config.checkpoints)
    store = Results(config.out, _plain(config))
    writes = is_first_rank()  # all ranks run this command, with Lightning or torchrun to start them
    records: dict[str, SpectrumRecord] = {}
    for number, (name, path) in enumerate(paths.items(), start=1):
        record = store.known(name, path)
        again = record is not None
        if record is None:
            with without_advice():
                record = analysis.record(path)
            if writes:
                store.keep(name, path, record)
        records[name] = record
        if writes:
            start = f"[{number}/{len(paths)}] {path}{' (known)' if again else ''}: "
            print(_result(start, record), flush=True)
    if not writes:
        return
    store.finish(table_lines(records, config.tolerance_of_loss))
    print(f"\n{summary_of(records, config.tolerance_of_loss)}\n")
    print(f"Spectra, figures, {RESULTS} and results.csv are in {config.out}.")
    failed = [name for name, record in records.items() if record.error is not None]
    if failed:
        first = failed[0]
        msg = f"{len(failed)} of {len(paths)} analyses failed; the first, of {paths[first]}: {records[first].error}"
        raise CommandError(msg)


def _result(start: str, record: SpectrumRecord) -> str:
    """Return the main results of a checkpoint, or why there are none."""
    if record.spectrum is None or record.error is not None:
        return f"{start}{record.error}"
    if len(start) <= LONG:
        return result_line(start, record.spectrum)
    return f"{start.rstrip()}\n{result_line('  ', record.spectrum)}"


class _CheckpointAnalysis:
    """The analysis of checkpoints, as the callback makes it in a run."""

    def __init__(self, config: Namespace) -> None:
        options = {key: value for key, value in config.analysis.as_dict().items() if key != "mode"}
        if options["batch_weight"] not in {None, "tokens"}:
            options["batch_weight"] = imported(options["batch_weight"])
        self._project = project_of(config)
        self._options = AnalysisOptions(**options)
        self._mode: AnalysisMode = config.analysis.mode
        self._preconditioned: bool = config.preconditioned
        self._generalization: str | Blueprint | None = config.generalization
        if config.generalization not in {None, "val", "test"}:
            self._generalization = Blueprint(config.generalization, config.generalization_args)

    def record(self, path: Path) -> SpectrumRecord:
        """Analyze the weights in a checkpoint.

        Raises:
            CommandError: If it cannot be loaded, or lacks the states of optimizers.
            MisconfigurationException: If the module or its data cannot be used.
        """
        record, checkpoint = self._project.at(path, self._record)
        return replace(
            record, epoch=int(checkpoint.get("epoch") or 0), global_step=int(checkpoint.get("global_step") or 0)
        )

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> SpectrumRecord:
        other = self._generalization_loader(trainer)
        recorder = Recorder(
            self._project.analyzer(self._options, checkpoint, self._mode),
            None if other is None else self._project.analyzer(self._options, checkpoint, self._mode, other),
            preconditioner="optimizer" if self._preconditioned else None,
        )
        if self._preconditioned:
            _load_optimizers(trainer, checkpoint)
        errors = _RecordOnly()
        recorder.start(trainer, errors)
        return recorder.record(trainer, pl_module, trainer.current_epoch, errors)

    def _generalization_loader(self, trainer: pl.Trainer) -> Any:
        wanted = self._generalization
        if wanted is None:
            return None
        if isinstance(wanted, Blueprint):
            data = wanted.build("LightningDataModule", {})
            data.prepare_data()
            data.setup("fit")
            return data.train_dataloader()
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("validate" if wanted == "val" else "test")
        return data.val_dataloader() if wanted == "val" else data.test_dataloader()


def _load_optimizers(trainer: pl.Trainer, checkpoint: Checkpoint) -> None:
    states = checkpoint.get("optimizer_states") or []
    if len(states) != len(trainer.optimizers):
        msg = (
            f"the checkpoint has the states of {len(states)} optimizers, the module {len(trainer.optimizers)} "
            "optimizers, so the Hessian cannot be preconditioned: leave `--preconditioned` out, or analyze a "
            "checkpoint of this module."
        )
        raise CommandError(msg)
    # PyTorch raises them for missing entries and other groups of parameters.
    with reported("the states of optimizers in the checkpoint do not fit those of the module", KeyError, ValueError):
        for optimizer, state in zip(trainer.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class _RecordOnly(ErrorPolicy):
    """Leaves failures to the record: there is no training to go on."""

    def describe(self, error: Exception) -> str:
        """Return the text of a failure in one line, with the name of its type where the text is a single word."""
        text = one_line(error)
        return text if " " in text else f"{type(error).__name__}: {text}"

    def report(self, message: str, error: Exception) -> None:
        """Say nothing."""


def _plain(config: Namespace) -> dict[str, Any]:
    """Return the options that the results depend on, as JSON values."""
    machine = {"accelerator", "devices", "num_nodes", "strategy"}
    irrelevant = {"checkpoints", "out", "tolerance_of_loss", "unsafe", *machine}
    options = {key: value for key, value in config.as_dict().items() if key not in irrelevant}
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain
