"""Numbers, memory, data and disks that fail: training stays the same, and the failure is reported."""

import json
import math
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SpectrumHistory
from tests.scarcity import EXHAUSTIONS, Scarce, ScarceInProducts
from tests.stress.fits import Fit
from tests.stress.harness import Case, Program, one_line, quiet
from tests.stress.networks import BrokenNow
from tests.training.modules import callback, fit, loader, plain_loss

NOT_FINITE = "the loss of batch 0 is "

# Numbers --------------------------------------------------------------------------------------------------------------


def infinite_loss(module: Any, batch: Any) -> Tensor:
    return plain_loss(module, batch) + math.inf


def poison(value: float) -> list[pl.Callback]:
    """Return a callback that makes a weight NaN or infinite when the second epoch begins."""

    def change(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                next(module.parameters())[0, 0] = value

    return [LambdaCallback(on_train_epoch_start=change)]


NUMBERS: list[Case] = [
    Fit("infinite loss", options=lambda: {"loss_fn": infinite_loss}, failures=2, error=NOT_FINITE + "inf"),
    Fit("NaN in a weight", beside=partial(poison, math.nan), failures=1, error=NOT_FINITE + "nan"),
    Fit("infinite weight", beside=partial(poison, math.inf), failures=1, error=NOT_FINITE + "nan"),
]

# Memory ---------------------------------------------------------------------------------------------------------------


def strategies(observer: HessianSpectrumCallback, trainer: pl.Trainer) -> str:
    """Say how each analysis was made."""
    spectra = [record.spectrum for record in observer.history if record.spectrum]
    told = [s.strategy_reason.startswith("out of memory") for s in spectra]
    assert told == [s.strategy == "recompute" for s in spectra]
    return ", then ".join(f"{s.strategy} with basis {s.basis}" for s in spectra)


def released(observer: HessianSpectrumCallback, trainer: pl.Trainer) -> str:
    """Say whether a failed analysis has let go of its tensors."""
    held: list[Any] = observer.loss_fn.held
    assert len(held) == 6, "three attempts at each of two analyses"
    return f"{sum(tensor() is not None for tensor in held)} tensors still held"


def scarce(kind: str, times: float) -> Callable[[], dict[str, Any]]:
    """Return what makes options with a loss that runs out of memory; comparing modes and merging uses up no times."""
    return lambda: {"loss_fn": Scarce(plain_loss, EXHAUSTIONS[kind], times), "mode": "eval", "batch_size": None}


def tried_again(name: str, options: Callable[[], dict[str, Any]], basis: str = "device") -> Fit:
    """Return a run whose first analysis is made by recomputing, after memory has run out."""
    note = f"recompute with basis {basis}, then graph with basis device"
    return Fit(name, options=options, check=strategies, note=note)


MEMORY: list[Case] = [
    *(tried_again(f"out of memory once, {kind}", scarce(kind, 1)) for kind in EXHAUSTIONS),
    tried_again("out of memory twice", scarce("CPU", 2), basis="none"),
    tried_again("out of memory in a product", lambda: {"loss_fn": ScarceInProducts(plain_loss, 1), "batch_size": None}),
    *(
        Fit(
            f"out of memory for good, {kind}",
            options=scarce(kind, math.inf),
            failures=2,
            error=error,
            check=released,
            note="0 tensors still held",
        )
        for kind, error in (("CPU", "can't allocate memory"), ("GPU", "CUDA out of memory"), ("Python", "MemoryError"))
    ),
]


class ScarceOnOne:
    """A loss that runs out of memory `times` times in the second of two ranks, and never in the first."""

    def __init__(self, times: float) -> None:
        self._scarce = Scarce(plain_loss, EXHAUSTIONS["CPU"], times)

    def __call__(self, module: pl.LightningModule, batch: Any) -> Tensor:
        return (self._scarce if module.global_rank == 1 else plain_loss)(module, batch)


def scarce_on_one_of_two(folder: Path, times: float) -> str:
    """Let one of two ranks run out of memory: both try again, and neither waits for the other."""
    for name, loss in (("whole", plain_loss), ("scarce", ScarceOnOne(times))):
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
        with quiet():
            fit(folder / name, callback(on_error="warn", loss_fn=loss, mode="eval"), strategy=strategy, devices=2)
    whole, scarce = (SpectrumHistory.load(folder / name) for name in ("whole", "scarce"))
    told = []
    for record, other in zip(scarce, whole, strict=True):
        assert other.spectrum is not None
        if record.spectrum is None:
            told.append(str(record.error).split(":")[0])
        else:
            assert abs(record.spectrum.c_t - other.spectrum.c_t) < 1e-4, "C_t differs"  # float32, and another order
            told.append(record.spectrum.strategy)
    return ", then ".join(told)


# Data -----------------------------------------------------------------------------------------------------------------

DATA: list[Case] = [
    Fit(
        "a sample that cannot be read, behind those of training",
        data=lambda: loader(BrokenNow()),
        trainer=lambda _: {"limit_train_batches": 2},
    )
]

# Disks ----------------------------------------------------------------------------------------------------------------


def obstacle(name: str, put: Callable[[Path], None]) -> list[pl.Callback]:
    """Return a callback that puts an obstacle in the way of the run's files when training begins."""

    def obstruct(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            path = Path(trainer.default_root_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path)

    return [LambdaCallback(on_train_epoch_start=obstruct)]


def full_disk(path: Path) -> None:
    """Let whatever is written to a path meet a full disk."""
    path.symlink_to("/dev/full")


def occupied(path: Path) -> None:
    """Put a file where a folder should be."""
    path.write_text("not a folder", encoding="utf-8")


def on_disk(observer: HessianSpectrumCallback, trainer: pl.Trainer) -> str:
    """Say what can be read back, and that nothing half-written is left."""
    folder = Path(trainer.default_root_dir)
    assert not list(folder.rglob("*.partial")), "a file left half-written"
    try:
        found = len(SpectrumHistory.load(folder))
    except FileNotFoundError:
        found = 0
    assert len(observer.history) == 2
    return f"{found} analyses on disk"


def checkpoints_too(observer: HessianSpectrumCallback, trainer: pl.Trainer) -> str:
    """Say what can be read back, and that the checkpoints hold all of the history."""
    assert observer.checkpoint is not None
    best = torch.load(observer.checkpoint.last_model_path, weights_only=True)
    [state] = [value for key, value in best["callbacks"].items() if key.startswith("HessianSpectrumCallback")]
    assert len(json.loads(state["history"]["records"])) == 2
    assert Path(observer.checkpoint.best_model_path).is_file()
    return on_disk(observer, trainer) + ", and checkpoints are whole"


def with_checkpoint() -> dict[str, Any]:
    return {"checkpoint": HessianCheckpoint(save_last=True)}


FIRST = "hesd/epoch=0-step=5.npz.partial"

DISKS: list[Case] = [
    *(
        Fit(
            name,
            options=with_checkpoint,
            trainer=lambda _: {"enable_checkpointing": True},
            beside=partial(obstacle, what, put),
            check=checkpoints_too,
            note=f"{left} analyses on disk, and checkpoints are whole",
        )
        for name, what, put, left in (
            ("disk full at the first spectrum, not at the next", FIRST, full_disk, 2),
            ("disk full at the first index, not at the next", "hesd/index.json.partial", full_disk, 2),
            ("disk full at the log of choices", "hesd/selections.jsonl", full_disk, 2),
            ("a file in the place of the folder", "hesd", occupied, 0),
        )
    )
]


STOPS = "stops as without the callback; pick and last.ckpt of epoch 0 are whole"


def no_room_for_checkpoints(folder: Path) -> str:
    """Let no file grow beyond 4 KiB after the first epoch: Lightning stops, and what was written stays readable."""

    def fill(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    filling = LambdaCallback(on_train_epoch_start=fill)
    checkpoint = HessianCheckpoint(save_last=True, dirpath=folder)
    with quiet():
        try:
            fit(folder, filling, callback(on_error="warn", checkpoint=checkpoint), enable_checkpointing=True)
        except OSError as error:
            failure = one_line(error.strerror)
        else:
            failure = "nothing"
    readable = [torch.load(path, weights_only=True)["epoch"] for path in sorted(folder.glob("*.ckpt"))]
    assert readable == [0, 0], readable
    assert failure == "File too large"
    assert len(SpectrumHistory.load(folder)) >= 1
    return STOPS


# Files of earlier runs ------------------------------------------------------------------------------------------------


def resumed_from_foreign(folder: Path) -> str:
    """Resume from a checkpoint of a run without the callback."""
    with quiet():
        foreign = fit(folder / "first", enable_checkpointing=True).checkpoint_callback.best_model_path
        observer = callback(on_error="warn", checkpoint="highest_c_t")
        trainer = fit(folder / "second", observer, ckpt_path=foreign, max_epochs=4, enable_checkpointing=True)
    assert trainer.state.finished
    assert [(record.epoch, record.error) for record in observer.history] == [(2, None), (3, None)]
    return "analyses of epochs 2 and 3"


EARLIER: list[Case] = [
    Program("no room for checkpoints", STOPS, no_room_for_checkpoints),
    Program("resumed from a run without the callback", "analyses of epochs 2 and 3", resumed_from_foreign),
    Program("out of memory on one of two ranks", "recompute, then graph", partial(scarce_on_one_of_two, times=1)),
    Program(
        "out of memory for good on one of two ranks",
        "AnotherRankFailedError, then AnotherRankFailedError",
        partial(scarce_on_one_of_two, times=math.inf),
    ),
]

CASES = [*NUMBERS, *MEMORY, *DATA, *DISKS, *EARLIER]
