"""Precisions, modules, data and Trainers of all kinds: training stays the same, and the analyses are made."""

import importlib
import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_hesd import HessianSpectrumCallback
from tests.stress import networks
from tests.stress.fits import Fit
from tests.stress.harness import Case, Program, quiet
from tests.stress.networks import Around, Silent, Validated
from tests.training.modules import Classifier, callback, loader, make_trainer, plain_loss, seed


def compiled(backend: str, *, whole: bool) -> pl.LightningModule:
    """Return a classifier compiled by itself, or whose network is."""
    module: Any = Silent()
    if whole:
        return torch.compile(module, backend=backend)
    module.net = torch.compile(module.net, backend=backend)
    return module


def verified(observer: HessianSpectrumCallback, trainer: pl.Trainer) -> str:
    """Say whether the derivatives are those of the loss."""
    return "verified" if all(r.spectrum and r.spectrum.verified == "yes" for r in observer.history) else "not verified"


def averaging() -> list[pl.Callback]:
    """Return the callback that keeps an exponential moving average, where Lightning has one."""
    callbacks: Any = importlib.import_module("lightning.pytorch.callbacks")
    return [callbacks.EMAWeightAveraging(decay=0.9)]


def dimension(expected: int) -> Any:
    """Return a check of how many parameters were analyzed."""

    def check(observer: HessianSpectrumCallback, trainer: pl.Trainer) -> str:
        found = {record.spectrum.dimension for record in observer.history if record.spectrum}
        return f"of {', '.join(map(str, sorted(found)))} parameters"

    return {"check": check, "note": f"of {expected} parameters"}


def trainer_options(**options: Any) -> Any:
    """Return arguments of the Trainer that need no folder."""
    return lambda _: options


PRECISIONS: list[Case] = [
    Fit(f"precision {name}{remark}", trainer=trainer_options(precision=name))
    for name, remark in (("16-mixed", " (bf16-mixed on a CPU)"), ("16-true", ""))
]

MODULES: list[Case] = [
    Fit("module compiled", partial(compiled, "aot_eager", whole=True)),
    Fit("submodule compiled, aot_eager", partial(compiled, "aot_eager", whole=False)),
    Fit("submodule compiled, inductor", partial(compiled, "inductor", whole=False)),
    Fit("made in configure_model", networks.MadeLate),
    Fit("two optimizers by hand", networks.TwoOptimizers, options=lambda: {"loss_fn": plain_loss}),
    Fit("steps in backward", networks.SteppingInBackward, options=lambda: {"loss_fn": plain_loss}),
    Fit("sparse buffer", networks.Graph),
    Fit("autocast inside", networks.LowPrecision, check=verified, note="verified"),
    Fit("lazy layers", lambda: Around(lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(10)))),
    Fit("sparse embedding", lambda: Around(partial(networks.Bag, sparse=True))),
    Fit("dense embedding", lambda: Around(partial(networks.Bag, sparse=False))),
    Fit("layer of buffers only", lambda: Classifier(nn.BatchNorm1d(6, affine=False))),
    *(
        Fit(f"recurrent, {kind.__name__}", lambda kind=kind: Around(partial(networks.Recurrent, kind)))
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    ),
    Fit("partly quantized", lambda: Around(networks.partly_quantized), **dimension(70)),
]

BESIDE: list[Case] = [
    Fit("EMA of the weights beside", beside=averaging),
    Fit(
        "stochastic weight averaging beside",
        beside=lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
        trainer=trainer_options(max_epochs=3),
        analyses=3,
    ),
]

TRAINERS: list[Case] = [
    Fit("fast_dev_run", Validated, trainer=trainer_options(fast_dev_run=True), analyses=1),
    Fit("overfit_batches", trainer=trainer_options(overfit_batches=2)),
    Fit("limit_train_batches=2", trainer=trainer_options(limit_train_batches=2)),
    Fit("limit_train_batches=0.5", trainer=trainer_options(limit_train_batches=0.5)),
    Fit("limit_train_batches=0", trainer=trainer_options(limit_train_batches=0), analyses=0),
    Fit("sanity check", Validated, trainer=trainer_options(num_sanity_val_steps=2)),
    Fit("dataloaders made anew every epoch", trainer=trainer_options(reload_dataloaders_every_n_epochs=1)),
    Fit("max_steps within an epoch", trainer=trainer_options(max_steps=7, max_epochs=-1)),
    Fit("max_time", trainer=trainer_options(max_time=timedelta(microseconds=1), max_epochs=-1), analyses=1),
    Fit("val_check_interval", Validated, trainer=trainer_options(val_check_interval=2)),
    Fit("check_val_every_n_epoch", Validated, trainer=trainer_options(check_val_every_n_epoch=2)),
    Fit("barebones", Silent, trainer=trainer_options(barebones=True)),
    Fit(
        "several loggers", trainer=lambda folder: {"logger": [TensorBoardLogger(folder), CSVLogger(folder, name="csv")]}
    ),
    Fit(
        "all kinds of analyses",
        Validated,
        options=lambda: {
            "at_start": True,
            "layers": "auto",
            "preconditioner": "optimizer",
            "monitor_gradients": True,
            "generalization_dataloader": "val",
            "sampling_error": True,
            "max_overhead": 1e9,
            "verbose": True,
        },
        trainer=lambda folder: {"logger": TensorBoardLogger(folder)},
        analyses=3,
    ),
]

DATA: list[Case] = [
    Fit("validation data as generalization data", Validated, options=lambda: {"generalization_dataloader": "val"})
]


def validate_only(folder: Path) -> str:
    """Validate, test with nothing trained: the callback stands by."""
    observer = callback(checkpoint="highest_c_t")
    trainer = make_trainer(folder, observer, enable_checkpointing=True)
    with quiet():
        [metrics] = trainer.validate(Validated(), verbose=False)
    assert not observer.history
    assert math.isfinite(metrics["val_loss"])
    assert not list(folder.rglob("*.npz"))
    return "validated, no analyses, no files"


def with_and_without(
    folder: Path,
    work: Callable[[pl.Trainer, pl.LightningModule], object],
    *observers: HessianSpectrumCallback,
    **options: Any,
) -> None:
    """Train with and without the callbacks: the weights must be the same."""
    weights = []
    for number, callbacks in enumerate(([], observers)):
        seed(7)
        module = Silent()
        with quiet():
            work(make_trainer(folder / str(number), *callbacks, **options), module)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def fit_inside_a_fit(folder: Path) -> str:
    """Train another module, with a callback of its own, in a hook of the first."""
    outer, inner = callback(on_error="warn", every_n_train_steps=2), callback(on_error="warn")

    def fit_inner(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with torch.random.fork_rng():
            make_trainer(folder / "inner", inner, max_epochs=1).fit(Silent(), loader())

    def nest(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.callbacks.insert(0, LambdaCallback(on_train_epoch_end=fit_inner))  # type: ignore[attr-defined]
        trainer.fit(module, loader())

    with_and_without(folder, nest, outer)
    assert [len(c.history) for c in (outer, inner)] == [5, 1]
    assert not [r.error for c in (outer, inner) for r in c.history if r.error]
    return "same weights, 5 and 1 analyses"


def fit_twice(folder: Path) -> str:
    """Fit the same Trainer again: it goes on, with and without the callback."""
    observer = callback(on_error="warn", checkpoint="highest_c_t")

    def fit_again(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.fit(module, loader())
        trainer.fit(module, loader())  # has nothing left to do
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, loader())

    with_and_without(folder, fit_again, observer, enable_checkpointing=True)
    epochs = [record.epoch for record in observer.history]
    assert epochs == [0, 1, 2, 3], epochs
    assert Path(observer.checkpoint.best_model_path).is_file()
    return "same weights, analyses of epochs 0 to 3, the pick's file is there"


PROGRAMS: list[Case] = [
    Program("validate only", "validated, no analyses, no files", validate_only),
    Program("a fit inside a fit", "same weights, 5 and 1 analyses", fit_inside_a_fit),
    Program("the same Trainer again", "same weights, analyses of epochs 0 to 3, the pick's file is there", fit_twice),
]

CASES = [*PRECISIONS, *MODULES, *BESIDE, *TRAINERS, *DATA, *PROGRAMS]
