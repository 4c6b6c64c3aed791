"""Analyses of existing checkpoints, as the callback makes them in a run, and the samples that these need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.commands.project import Blueprint, CheckpointError
from lightning_hesd.sample_size.recommendation import find_sample_size
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.error_policy import ErrorPolicy
from lightning_hesd.training.recorder import Recorder
from lightning_hesd.training.session import Analysis

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl

    from lightning_hesd.commands.project import Checkpoint, Project
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.sample_size.recommendation import SampleSize, Stability
    from lightning_hesd.training.history import SpectrumRecord
    from lightning_hesd.training.loss_mode import AnalysisMode


@dataclass(frozen=True)
class PosthocAnalysis:
    """The analysis of each checkpoint.

    Attributes:
        project: Model and data of the checkpoints.
        options: Options as for `hessian_spectrum`.
        generalization: "val" or "test" for other data of the same data module, or a data module of its own, whose
            training data are taken; None: no generalization data.
        preconditioned: Whether to analyze the preconditioned Hessian, too.
        mode: Mode of the module, as for the callback.
    """

    project: Project
    options: AnalysisOptions
    generalization: Literal["val", "test"] | Blueprint | None = None
    preconditioned: bool = False
    mode: AnalysisMode = "auto"

    def record(self, path: Path) -> SpectrumRecord:
        """Analyze the weights in a checkpoint.

        Raises:
            CheckpointError: If it cannot be loaded, or lacks the states of optimizers.
            MisconfigurationException: If the module or its data cannot be used.
        """
        record, checkpoint = self.project.at(path, self._record)
        return replace(
            record, epoch=int(checkpoint.get("epoch") or 0), global_step=int(checkpoint.get("global_step") or 0)
        )

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> SpectrumRecord:
        other = self._generalization_loader(trainer)
        recorder = Recorder(
            self.project.analyzer(self.options, checkpoint, self.mode),
            None if other is None else self.project.analyzer(self.options, checkpoint, self.mode, other),
            preconditioner="optimizer" if self.preconditioned else None,
        )
        if self.preconditioned:
            _load_optimizers(trainer, checkpoint)
        errors = _RecordOnly()
        recorder.start(trainer, errors)
        return recorder.record(trainer, pl_module, trainer.current_epoch, errors)

    def _generalization_loader(self, trainer: pl.Trainer) -> Any:
        wanted = self.generalization
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


def sample_size(
    project: Project, path: Path, stability: Stability, options: AnalysisOptions, mode: AnalysisMode
) -> SampleSize:
    """Find how many samples are enough at the weights in a checkpoint.

    Raises:
        CheckpointError: If it cannot be loaded.
        MisconfigurationException: If the module or its data cannot be used.
        ValueError: If there are fewer than 8 samples.
        ArithmeticError: If the loss or a product is NaN or infinite, or the spectrum has no positive eigenvalue.
    """

    def work(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> SampleSize:
        analysis = Analysis("sample size", partial(find_sample_size, stability=stability))
        return project.analyzer(options, checkpoint, mode).analyze(trainer, pl_module, analysis=analysis)

    return project.at(path, work)[0]


def _load_optimizers(trainer: pl.Trainer, checkpoint: Checkpoint) -> None:
    states = checkpoint.get("optimizer_states") or []
    if len(states) != len(trainer.optimizers):
        msg = (
            f"the checkpoint has the states of {len(states)} optimizers, the module {len(trainer.optimizers)} "
            "optimizers, so the Hessian cannot be preconditioned: leave `--preconditioned` out, or analyze a "
            "checkpoint of this module."
        )
        raise CheckpointError(msg)
    try:
        for optimizer, state in zip(trainer.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    except (KeyError, ValueError) as error:  # those of PyTorch for missing entries and other groups of parameters
        msg = f"the states of optimizers in the checkpoint do not fit those of the module: {one_line(error)}"
        raise CheckpointError(msg) from error


class _RecordOnly(ErrorPolicy):
    """Leaves failures to the record: there is no training to go on."""

    def describe(self, error: Exception) -> str:
        """Return the text of a failure in one line."""
        return f"{type(error).__name__}: {one_line(error)}"

    def report(self, message: str, error: Exception) -> None:
        """Say nothing."""
