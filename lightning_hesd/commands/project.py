"""A model, its data, and checkpoints of it: load one, and let a Trainer prepare everything up to the start of training.

So the analysis finds modules, data modules and devices in the state that the callback finds in a run. No step is taken.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from lightning_hesd.commands.errors import CommandError, reported
from lightning_hesd.spectra.validation import check_fields, each, each_named, having, integer, of, optional
from lightning_hesd.training.analyzer import TrainerAnalyzer
from lightning_hesd.training.callback import DEFAULT_NUM_SAMPLES, HessianSpectrumCallback
from lightning_hesd.training.compat.namespaces import lightning_types, namespace_of
from lightning_hesd.training.loss import check_loss_source
from lightning_hesd.training.samples.epochs import check_samples
from lightning_hesd.training.samples.run_samples import RunSamples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import lightning.pytorch as pl

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.training.loss_mode import AnalysisMode

Result = TypeVar("Result")
Checkpoint = dict[str, Any]


PARTS = {
    "state_dict": each_named(lambda _: True),
    "epoch": optional(integer),
    "global_step": optional(integer),
    "hyper_parameters": optional(of(Mapping)),
    "datamodule_hyper_parameters": optional(of(Mapping)),
    "callbacks": optional(of(dict)),
    "optimizer_states": optional(each(of(dict))),
}
"""Checks of the entries of a checkpoint that are used; all but the weights are optional."""


@dataclass(frozen=True)
class Blueprint:
    """A class and its arguments.

    Attributes:
        class_path: Path to import, such as "package.module.Class".
        arguments: Arguments of its `__init__`; they take precedence over hyperparameters in a checkpoint. Objects may
            be given as LightningCLI does, as `class_path` and `init_args`.
    """

    class_path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, kind: str, hyperparameters: Mapping[str, Any]) -> Any:
        """Return an instance, which must be one of Lightning's class `kind`, in either namespace.

        Of the hyperparameters in a checkpoint, those that the class does not take are ignored.

        Raises:
            CommandError: If there is no such class, or it cannot be instantiated.
        """
        from jsonargparse import ArgumentError, ArgumentParser  # noqa: PLC0415 - an optional dependency

        cls = imported(self.class_path)
        if not (isinstance(cls, type) and issubclass(cls, lightning_types(kind))):
            msg = f"{self.class_path} must be a {kind}, got {cls!r}."
            raise CommandError(msg)
        takes = inspect.signature(cls).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        saved = {k: v for k, v in hyperparameters.items() if (takes_all or k in takes) and not k.startswith("_")}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "instance", fail_untyped=False)
        with reported(f"{self.class_path} cannot be instantiated", ArgumentError, TypeError, ValueError):
            config = parser.parse_object({"instance": {**saved, **self.arguments}})
            return parser.instantiate(config).instance


def imported(path: str) -> Any:
    """Return the object that a path such as "package.module.name" names.

    Raises:
        CommandError: If no such object exists.
    """
    module_name, _, name = path.rpartition(".")
    with reported(f"cannot import {path!r}", ImportError, AttributeError, ValueError):
        return getattr(importlib.import_module(module_name), name)


def load_checkpoint(path: Path, *, unsafe: bool = False) -> Checkpoint:
    """Read a Lightning checkpoint to the CPU; `unsafe` loads objects of any class, which can run any code.

    Raises:
        CommandError: If it cannot be read, or holds no weights.
    """
    if not path.exists():
        msg = f"{path} does not exist."
        raise CommandError(msg)
    hint = "" if unsafe else ", or holds other objects than weights and plain values (--unsafe loads those, too)"
    with (
        reported(f"{path} cannot be read as a checkpoint", Exception),  # damage makes the unpickler stumble anywhere
        reported(f"{path} is damaged{hint}", pickle.UnpicklingError),
    ):
        checkpoint = torch.load(path, map_location="cpu", weights_only=not unsafe)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        msg = f"{path} is no Lightning checkpoint: it has no 'state_dict'."
        raise CommandError(msg)
    with reported(f"{path} is damaged", ValueError):
        check_fields({**dict.fromkeys(PARTS), **checkpoint}, PARTS, "the checkpoint")
    return checkpoint


@dataclass(frozen=True)
class Project:
    """Model and data of checkpoints, and the settings of their analysis.

    Attributes:
        model: The LightningModule.
        data: The LightningDataModule, whose training data are analyzed.
        loss_fn: Function (module, batch) -> mean loss; None: the module's `training_step`.
        num_samples: Number of samples; None: the samples of the run, if the checkpoint names them, else 512.
        batch_size: Most samples per batch; "auto": small batches are merged where that leaves the loss the same.
        name: Name of the callback in the run.
        accelerator: As for the Trainer.
        devices: Devices of each node, as for the Trainer.
        num_nodes: Nodes, as for the Trainer.
        strategy: Strategy of several devices, as for the Trainer.
        unsafe: Whether to load objects of any class from checkpoints; they can run any code.
    """

    model: Blueprint
    data: Blueprint
    loss_fn: LossFunction | None = None
    num_samples: int | None = None
    batch_size: int | Literal["auto"] | None = "auto"
    name: str = "hesd"
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    unsafe: bool = False

    def at(
        self, path: Path, work: Callable[[pl.Trainer, pl.LightningModule, Checkpoint], Result]
    ) -> tuple[Result, Checkpoint]:
        """Return the result of a function at the weights of a checkpoint, at the start of training, and the checkpoint.

        Raises:
            CommandError: If it cannot be loaded.
            MisconfigurationException: If the module or its data cannot be used.
        """
        checkpoint = load_checkpoint(path, unsafe=self.unsafe)
        module = self.model.build("LightningModule", checkpoint.get("hyper_parameters") or {})
        data = self.data.build("LightningDataModule", checkpoint.get("datamodule_hyper_parameters") or {})
        _load_weights(module, checkpoint, path)
        check_loss_source(module, self.loss_fn)
        found: list[Result] = []

        def start(trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.should_stop = True
            found.append(work(trainer, module, checkpoint))

        lightning = namespace_of(module)
        trainer: pl.Trainer = lightning.Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            strategy=self.strategy,
            max_epochs=1,
            min_epochs=0,
            callbacks=[lightning.callbacks.LambdaCallback(on_train_start=start)],
            logger=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        return found[0], checkpoint  # `fit` either starts or raises

    def analyzer(
        self, options: AnalysisOptions, checkpoint: Checkpoint, mode: AnalysisMode, dataloader: Any = None
    ) -> TrainerAnalyzer:
        """Return the analyzer of the samples of the run; with a dataloader of as many samples of that, drawn anew.

        If `num_samples` is given, or the checkpoint does not name the samples of the run, all are drawn anew.
        """
        drawn = self._drawn(checkpoint)
        num_samples = drawn["num_samples"] if drawn else self.num_samples or DEFAULT_NUM_SAMPLES
        options = replace(options, batch_size=self.batch_size)
        samples = RunSamples(num_samples, options, dataloader=dataloader)
        analyzer = TrainerAnalyzer(options, samples, loss_fn=self.loss_fn, mode=mode)
        if drawn and dataloader is None:
            analyzer.load_state_dict(drawn)
        return analyzer

    def _drawn(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Return the samples that the callback of the run drew, unless `num_samples` is given; None: not known.

        Raises:
            CommandError: If the state of the callback is invalid.
        """
        key = HessianSpectrumCallback(name=self.name).state_key
        state = (checkpoint.get("callbacks") or {}).get(key)
        if state is None or self.num_samples is not None:
            return None
        with reported(f"the callback {self.name!r} in the checkpoint does not name its samples", ValueError):
            check_fields(state, {"samples": having({"training": of(dict)})}, "the callback's state")
            drawn: dict[str, Any] = state["samples"]["training"]
            check_samples(drawn)
        return drawn


def _load_weights(module: pl.LightningModule, checkpoint: Checkpoint, path: Path) -> None:
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    # PyTorch raises a RuntimeError for missing, unexpected or misshaped weights.
    with reported(f"the weights in {path} do not fit {type(module).__name__}", RuntimeError):
        module.load_state_dict(checkpoint["state_dict"])
