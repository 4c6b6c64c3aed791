"""Analyses of checkpoints that exist: load one, let a Trainer prepare everything, and record at the start of training.

So modules, data modules, devices and samples are treated as the callback finds them in a run, and no step is taken.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pickle
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback

from lightning_hesd.analyzer import TrainerAnalyzer
from lightning_hesd.callback import HessianSpectrumCallback
from lightning_hesd.loss import check_loss_source
from lightning_hesd.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lightning_hesd.history import SpectrumRecord
    from lightning_hesd.options import AnalysisOptions
    from lightning_hesd.pipeline import LossFunction


DEFAULT_NUM_SAMPLES: int = inspect.signature(HessianSpectrumCallback).parameters["num_samples"].default


class CheckpointError(Exception):
    """A checkpoint, or what it is to be loaded into, cannot be used; the message says why."""


@dataclass(frozen=True)
class Blueprint:
    """A class and what to give it.

    Attributes:
        class_path: Where to import it from, such as "package.module.Class".
        arguments: Arguments of its `__init__`; they take precedence over hyperparameters in a checkpoint. Objects may
            be given as LightningCLI does, as `class_path` and `init_args`.
    """

    class_path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, kind: type, hyperparameters: Mapping[str, Any]) -> Any:
        """Return an instance.

        Args:
            kind: What it must be an instance of.
            hyperparameters: As saved in a checkpoint; those that the class does not take are passed over.

        Raises:
            CheckpointError: If there is no such class, or it cannot be instantiated.
        """
        from jsonargparse import ArgumentError, ArgumentParser  # noqa: PLC0415 - an optional dependency

        cls = imported(self.class_path)
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            msg = f"{self.class_path} must be a {kind.__name__}, got {cls!r}."
            raise CheckpointError(msg)
        takes = inspect.signature(cls).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        saved = {k: v for k, v in hyperparameters.items() if (takes_all or k in takes) and not k.startswith("_")}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "instance", fail_untyped=False)
        try:
            config = parser.parse_object({"instance": {**saved, **self.arguments}})
            return parser.instantiate(config).instance
        except (ArgumentError, TypeError, ValueError) as error:
            msg = f"{self.class_path} cannot be instantiated: {_one_line(error)}"
            raise CheckpointError(msg) from error


def imported(path: str) -> Any:
    """Return what "package.module.name" stands for.

    Raises:
        CheckpointError: If there is no such thing.
    """
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        msg = f"cannot import {path!r}: {_one_line(error)}"
        raise CheckpointError(msg) from error


def load_checkpoint(path: Path, *, unsafe: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint to the CPU.

    Args:
        path: The file.
        unsafe: Also load objects of any class, which can run any code.

    Raises:
        CheckpointError: If it cannot be read, or holds no weights.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not unsafe)
    except FileNotFoundError as error:
        msg = f"{path} does not exist."
        raise CheckpointError(msg) from error
    except pickle.UnpicklingError as error:
        hint = "" if unsafe else ", or holds other objects than weights and plain values (--unsafe loads those, too)"
        msg = f"{path} is damaged{hint}: {_one_line(error)}"
        raise CheckpointError(msg) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, ImportError) as error:
        msg = f"{path} cannot be read as a checkpoint: {_one_line(error)}"
        raise CheckpointError(msg) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        msg = f"{path} is no Lightning checkpoint: it has no 'state_dict'."
        raise CheckpointError(msg)
    return checkpoint


@dataclass(frozen=True)
class PosthocAnalysis:
    """What to analyse in every checkpoint.

    Attributes:
        model: The LightningModule.
        data: The LightningDataModule, whose training data are analysed.
        generalization: "val" or "test" for other data of the same data module, or a data module of its own, whose
            training data are taken; None: no generalization data.
        options: As for `hessian_spectrum`.
        num_samples: Number of samples; None: those that the callback drew, as the checkpoint knows, else 512.
        batch_size: Samples per batch.
        through_optimizer: Whether to analyse the Hessian through the optimizer's eyes, too.
        loss_fn: As for the callback; None: the module's `training_step`.
        name: Name of the callback in the run.
        accelerator: As for the Trainer.
        unsafe: Whether to load checkpoints with objects of any class.
    """

    model: Blueprint
    data: Blueprint
    options: AnalysisOptions
    generalization: Literal["val", "test"] | Blueprint | None = None
    num_samples: int | None = None
    batch_size: int | None = None
    through_optimizer: bool = False
    loss_fn: LossFunction | None = None
    name: str = "hesd"
    accelerator: str = "auto"
    unsafe: bool = False

    def record(self, path: Path) -> SpectrumRecord:
        """Analyse the weights in a checkpoint.

        Raises:
            CheckpointError: If it cannot be loaded.
            MisconfigurationException: If the module or its data cannot be used.
        """
        checkpoint = load_checkpoint(path, unsafe=self.unsafe)
        module = self.model.build(pl.LightningModule, checkpoint.get("hyper_parameters", {}))
        data = self.data.build(pl.LightningDataModule, checkpoint.get("datamodule_hyper_parameters", {}))
        _load_weights(module, checkpoint, path)
        check_loss_source(module, self.loss_fn)
        work = _AtStart(self, checkpoint)
        trainer = pl.Trainer(
            accelerator=self.accelerator,
            devices=1,
            max_epochs=1,
            min_epochs=0,
            callbacks=[work],
            logger=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        assert work.record is not None  # noqa: S101 - `fit` either starts or raises
        return replace(
            work.record, epoch=int(checkpoint.get("epoch", 0)), global_step=int(checkpoint.get("global_step", 0))
        )


def _load_weights(module: pl.LightningModule, checkpoint: dict[str, Any], path: Path) -> None:
    try:
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        msg = f"the weights in {path} do not fit {type(module).__name__}: {_one_line(error)}"
        raise CheckpointError(msg) from error


class _AtStart(Callback):
    """Analyses at the start of training, and ends it there."""

    def __init__(self, analysis: PosthocAnalysis, checkpoint: dict[str, Any]) -> None:
        self.record: SpectrumRecord | None = None
        self._analysis = analysis
        self._checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Analyse.

        Raises:
            CheckpointError: If it lacks the states of optimizers that are to be read.
        """
        trainer.should_stop = True
        analysis = self._analysis
        samples = None if analysis.num_samples is not None else self._drawn()
        analyzer = partial(
            TrainerAnalyzer,
            analysis.options,
            num_samples=samples["training"]["num_samples"] if samples else analysis.num_samples or DEFAULT_NUM_SAMPLES,
            batch_size=analysis.batch_size,
            loss_fn=analysis.loss_fn,
        )
        other = self._generalization_loader(trainer)
        recorder = Recorder(
            analyzer(dataloader=None),
            None if other is None else analyzer(dataloader=other),
            preconditioner="optimizer" if analysis.through_optimizer else None,
        )
        if samples:  # those of other data are drawn anew, for these may not be the data of the run
            recorder.load_state_dict({"training": samples["training"]})
        if analysis.through_optimizer:
            states = self._checkpoint.get("optimizer_states", [])
            if len(states) != len(trainer.optimizers):
                msg = (
                    f"the checkpoint has the states of {len(states)} optimizers, the module {len(trainer.optimizers)} "
                    "optimizers: the Hessian cannot be seen through their eyes."
                )
                raise CheckpointError(msg)
            for optimizer, state in zip(trainer.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        recorder.start(trainer, _attempt)
        self.record = recorder.record(trainer, pl_module, trainer.current_epoch, _attempt)

    def _drawn(self) -> dict[str, Any] | None:
        """Return what the callback of the run says of its samples."""
        key = HessianSpectrumCallback(name=self._analysis.name).state_key
        state = self._checkpoint.get("callbacks", {}).get(key)
        return None if state is None else state["samples"]

    def _generalization_loader(self, trainer: pl.Trainer) -> Any:
        wanted = self._analysis.generalization
        if wanted is None:
            return None
        if isinstance(wanted, Blueprint):
            data = wanted.build(pl.LightningDataModule, {})
            data.prepare_data()
            data.setup("fit")
            return data.train_dataloader()
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("validate" if wanted == "val" else "test")
        return data.val_dataloader() if wanted == "val" else data.test_dataloader()


@contextlib.contextmanager
def _attempt(consequence: str) -> Iterator[list[str]]:  # noqa: ARG001 - the record says it
    """Turn an exception into an entry of a list.

    Yields:
        The list.
    """
    failures: list[str] = []
    try:
        yield failures
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the record
        failures.append(f"{type(error).__name__}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
