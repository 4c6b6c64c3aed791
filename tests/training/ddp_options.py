"""One process of several: options of DDP, a process that is interrupted, a run that is killed and resumed.

`test_ddp_options.py` starts as many of these as there are processes, because the processes must be real. Each writes
what it saw to `<out>/rank<rank>.json`.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader

from lightning_hesd import HessianSpectrumCallback, hessian_spectrum
from tests.training.ddp_run import Blobs, OwnClock
from tests.training.modules import QUIET

torch.set_num_threads(1)

RANK, WORLD_SIZE = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


class Net(pl.LightningModule):
    """Trained on different samples in every process, with dropout."""

    def __init__(self, *, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 12)
        self.last = nn.Linear(12, 3)
        self.unused = nn.Linear(3, 3) if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.dropout(torch.tanh(self.first(x)), 0.2, self.training))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Gradients:
    """Remembers the gradients before the analyses, and looks whether they are there after it."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor | None] = []
        self.same: list[bool] = []

    def remember(self, _trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.before = [p.grad for p in module.parameters()]
        self.values = [g if g is None else g.clone() for g in self.before]

    def compare(self, _trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for p, grad, values in zip(module.parameters(), self.before, self.values, strict=True):
            self.same.append(p.grad is grad and (grad is None or torch.equal(grad, values)))

    def around(self, callbacks: list[Any]) -> list[pl.Callback]:
        """Return the callbacks between one that remembers and one that compares."""
        before, after = (LambdaCallback(on_train_batch_end=look) for look in (self.remember, self.compare))
        return [before, *callbacks, after]


OPTIONS: dict[str, dict[str, Any]] = {
    "find_unused_parameters": {"ddp": {"find_unused_parameters": True}, "net": {"unused": True}},
    "static_graph": {"ddp": {"static_graph": True}},
    "bucket_view": {"ddp": {"gradient_as_bucket_view": True}, "trainer": {"accumulate_grad_batches": 2}},
    "comm_hook": {"ddp": {"ddp_comm_hook": default_hooks.fp16_compress_hook}},
}


def make_trainer(out: Path, *, ddp: dict[str, Any] | None = None, logger: Any = False, **options: Any) -> pl.Trainer:
    """Return a quiet Trainer of all processes."""
    strategy = DDPStrategy(process_group_backend="gloo", **(ddp or {}))
    settings = {**QUIET, "devices": WORLD_SIZE, "strategy": strategy, "default_root_dir": out, "logger": logger}
    return pl.Trainer(**settings, **options)


def train(out: Path, name: str, *, analyzed: bool) -> dict[str, Any]:
    """Return the trained weights and momenta, and what the callbacks found."""
    option = OPTIONS[name]
    gradients = Gradients()
    shared: dict[str, Any] = {"steps": 2, "num_samples": 30, "batch_size": 10, "progress": False}
    ours = [
        HessianSpectrumCallback(**shared, at_start=True, every_n_train_steps=2),
        HessianSpectrumCallback(**shared, mode="train", name="train"),
    ]
    trainer = make_trainer(
        out / f"{name}-{analyzed}",
        max_epochs=1,
        enable_checkpointing=False,
        callbacks=gradients.around(ours) if analyzed else [],
        ddp=option.get("ddp", {}),
        **option.get("trainer", {}),
    )
    net = Net(**option.get("net", {}))
    torch.manual_seed(RANK)
    trainer.fit(net, DataLoader(Blobs(None), batch_size=12, shuffle=True))
    momenta = [values["momentum_buffer"] for values in trainer.optimizers[0].state_dict()["state"].values()]
    return {
        "tensors": [*net.state_dict().values(), *momenta, torch.get_rng_state()],
        "gradients": gradients,
        "records": {
            each.name: [{"c_t": r.spectrum and r.spectrum.c_t, "error": r.error} for r in each.history] for each in ours
        },
        "views": [p.grad is not None and p.grad._base is not None for p in net.parameters()],
    }


def try_options(out: Path) -> dict[str, Any]:
    """Train with every option, with and without analyses."""
    found = {}
    for name in OPTIONS:
        plain, analyzed = (train(out, name, analyzed=analyzed) for analyzed in (False, True))
        found[name] = {
            "records": analyzed["records"],
            "weights": [torch.equal(a, b) for a, b in zip(plain["tensors"], analyzed["tensors"], strict=True)],
            "gradients": analyzed["gradients"].same,
            "some_gradients": any(g is not None for g in analyzed["gradients"].before),
            "views": analyzed["views"],
        }
    return found


FOLDERS: list[str | None] = []
"""Out of reach of module and Trainer."""


def use_trainer(net: Net) -> None:
    """Do what an analysis can undo or pass by."""
    net.trainer.optimizers[0].param_groups[0]["lr"] *= 0.9
    net.trainer.strategy.barrier()
    torch.distributed.barrier()
    FOLDERS.append(net.trainer.log_dir)


REACHES: dict[str, Callable[[Net], object]] = {
    "use_trainer": use_trainer,
    "all_gather": lambda net: net.all_gather(torch.ones(1)),
    "all_reduce": lambda net: torch.distributed.all_reduce(torch.ones(1)),
}
"""What a training step may do together with the other processes."""


class Reaching(Net):
    def __init__(self, act: Callable[[Net], object]) -> None:
        super().__init__()
        self.act = act

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.act(self)
        return super().training_step(batch, batch_idx)


def reach_out(out: Path) -> dict[str, Any]:
    """Train networks that reach out of themselves; the processes analyze different numbers of batches."""
    found: dict[str, Any] = {}
    for name, act in REACHES.items():
        callback = HessianSpectrumCallback(steps=2, num_samples=30, batch_size=10, progress=False)
        weights = []
        for callbacks in ([], [callback]):
            FOLDERS.clear()
            logger = CSVLogger(out / f"{name}{len(callbacks)}-{RANK}")  # another folder in each process
            trainer = make_trainer(out, max_epochs=2, enable_checkpointing=False, callbacks=callbacks, logger=logger)
            torch.manual_seed(RANK)
            trainer.fit(net := Reaching(act), DataLoader(Blobs(None), batch_size=24, shuffle=True))
            weights.append([*net.state_dict().values()])
        found[name] = {
            "same": all(map(torch.equal, *weights)),
            "errors": [record.error for record in callback.history],
            "folders": [str(folder).endswith("use_trainer1-0/lightning_logs/version_0") for folder in FOLDERS],
        }
    return found


def synchronous_norms() -> dict[str, str | None]:
    """Analyze a network with SyncBatchNorm in each mode; DDP itself takes one on GPUs only, so there is no training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.SyncBatchNorm(4), nn.Tanh(), nn.Linear(4, 3))
    batch = (torch.randn(10, 8), torch.randint(3, (10,)))

    def refused(mode: Any) -> str | None:
        try:
            hessian_spectrum(net, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps=3, mode=mode)
        except ValueError as error:
            return str(error)
        return None

    return {mode: refused(mode) for mode in ("eval", "train", "keep")}


def interrupted(out: Path) -> dict[str, Any]:
    """Train for ever; each rank says when it is within an analysis, and goes on after the interruption."""

    def loss_fn(module: Net, batch: Any) -> torch.Tensor:
        (out / f"analyzing{RANK}").touch()
        while not (out / "interrupted").exists():
            time.sleep(0.01)
        return F.cross_entropy(module(batch[0]), batch[1])

    callback = HessianSpectrumCallback(steps=2, num_samples=40, batch_size=10, loss_fn=loss_fn, progress=False)
    trainer = make_trainer(out, max_epochs=1000, callbacks=[callback])
    trainer.fit(Net(), DataLoader(Blobs(None), batch_size=12))
    return {}


def budgeted(out: Path, costs: list[float], ckpt: Path | None, pause: int | None) -> dict[str, Any]:
    """Train eight epochs with a budget, on a clock of the process's own; pause after some of them, to be killed."""

    class Pause(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == pause:
                (out / f"paused{RANK}").touch()
                time.sleep(600)

    options = {"steps": 4, "num_samples": 30, "batch_size": 10, "max_overhead": 0.4, "progress": False}
    # By a function, as `training_step` takes a second.
    callback = HessianSpectrumCallback(loss_fn=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), **options)
    last = pl.callbacks.ModelCheckpoint(out, save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(out, max_epochs=8, callbacks=[callback, last, Pause()])
    net = Net()
    OwnClock(costs[RANK]).govern(callback, net)  # type: ignore[arg-type]
    trainer.fit(net, DataLoader(Blobs(None), batch_size=24), ckpt_path=ckpt)
    return {
        "epochs": [record.epoch for record in callback.history],
        "c_t": [record.spectrum and record.spectrum.c_t for record in callback.history],
        "decisions": [[step, decided] for step, decided in callback.budget.state_dict()["decisions"].items()],
        "overhead": callback.budget.overhead,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["options", "interrupted", "budgeted"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--costs", type=float, nargs="+", default=[])
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--pause", type=int)
    given = parser.parse_args()
    warnings.filterwarnings("always", message="lightning_hesd: ")
    if given.what == "options":
        result = {**try_options(given.out), "norms": synchronous_norms(), "reaches": reach_out(given.out)}
    elif given.what == "interrupted":
        result = interrupted(given.out)
    else:
        result = budgeted(given.out, given.costs, given.ckpt, given.pause)
    (given.out / f"rank{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
