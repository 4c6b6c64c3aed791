"""One process of a distributed training run; `test_ddp.py` starts it as a program, because the processes must be real.

Every process writes what it saw to `<out>/rank<rank>.json`.
"""

import argparse
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SharpnessMonitor
from lightning_hesd.numerics.inputs.batches import SkippedBatchError
from lightning_hesd.training.history import SpectrumRecord
from tests.training.broken import out_of_luck, out_of_memory
from tests.training.modules import QUIET

torch.set_num_threads(1)

WORLD_SIZE = int(os.environ["WORLD_SIZE"])


class Blobs(Dataset[tuple[torch.Tensor, int]]):
    """Three noisy clusters; with `fail_in`, reading sample 0 fails in that process once training is distributed."""

    def __init__(self, fail_in: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.classes = torch.randint(0, 3, (96,), generator=generator)
        self.x = torch.randn(96, 8, generator=generator) + 2 * F.one_hot(self.classes, 8)
        self.fail_in = fail_in

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        if self.fail_in is not None and torch.distributed.get_rank() == self.fail_in:
            out_of_luck()
        return self.x[position], int(self.classes[position])


class Own(Sampler[int]):
    """Draws in every process by itself, with repetition."""

    def __iter__(self) -> Iterator[int]:
        rank = torch.distributed.get_rank() if WORLD_SIZE > 1 else 0
        return iter(torch.randint(0, 96, (120,), generator=torch.Generator().manual_seed(rank)).tolist())

    def __len__(self) -> int:
        return 120


def leave_out(samples: list[Any]) -> Any:
    """Leave out some samples, and sometimes all."""
    kept = [sample for sample in samples if sample[1] != samples[0][1]]
    return default_collate(kept) if len(kept) > 2 else None


def skipping(module: Any, batch: Any) -> torch.Tensor:
    """Skip batches that begin with class 0."""
    if batch[1][0] == 0:
        raise SkippedBatchError
    return F.cross_entropy(module.net(batch[0].double()), batch[1])


class Net(pl.LightningModule):
    """Training is done by full-batch steps on fixed data, so that it is the same for any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)).double()
        everything = Blobs(None)
        self.register_buffer("x", everything.x.double(), persistent=False)
        self.register_buffer("y", everything.classes, persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.net.eval()  # no dropout: its masks would differ between processes
        loss = F.cross_entropy(self.net(self.x), self.y)
        self.net.train()
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@dataclass
class OwnClock:
    """A clock of this process alone: a training step takes a second, an analysis `cost` seconds."""

    cost: float
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def govern(self, callback: HessianSpectrumCallback, module: Net) -> None:
        """Let the budget of `callback` go by this clock."""
        callback.budget._clock = self
        analyzer = callback._recorder._analyzers["training"]
        analyzer.analyze = self.taking(self.cost, analyzer.analyze)
        module.training_step = self.taking(1.0, module.training_step)

    def taking(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return work(*args, **kwargs)

        return slow


def describe(record: SpectrumRecord) -> dict[str, Any]:
    """What the test compares."""
    if record.spectrum is None:
        return {"epoch": record.epoch, "error": record.error}
    found = record.spectrum
    return {
        "epoch": record.epoch,
        "c_t": found.c_t,
        "lambda_max": found.lambda_max,
        "num_samples": found.num_samples,
        "steps": found.steps,
        "sampling_error": found.c_t_sampling_error or 0.0,
        "layers": [layer.trace for layer in found.by_layer.values()],
        "negative_count": found.negative_count,
        "losses along": found.losses_along[:, 1].ravel().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fail", choices=["loss", "data"])
    parser.add_argument("--fail-in", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-overhead", type=float)
    parser.add_argument("--engine", type=int, default=0, help="1: with callbacks that stop early, grow, or differ")
    parser.add_argument("--costs", type=float, nargs="+", help="seconds of an analysis on the clock of each process")
    options = parser.parse_args()
    warnings.filterwarnings("always", message="lightning_hesd: ")

    def loss_fn(module: Net, batch: Any) -> torch.Tensor:
        if options.fail == "loss" and torch.distributed.get_rank() == options.fail_in:
            out_of_memory()
        return F.cross_entropy(module.net(batch[0].double()), batch[1])

    data = Blobs(options.fail_in if options.fail == "data" else None)
    # Two batches, so that the third process has none; the second callback has random dropout masks.
    samples = {"num_samples": 50, "batch_size": 25, "loss_fn": loss_fn, "dataloader": DataLoader(data, batch_size=10)}
    shared: dict[str, Any] = {**samples, "steps": 4, "max_overhead": options.max_overhead}
    checkpoint = HessianCheckpoint(tolerance=0.2, save_last=True)
    callbacks = [
        HessianSpectrumCallback(**shared, checkpoint=checkpoint, loss_along_eigenvectors=True),
        HessianSpectrumCallback(**shared, mode="train", name="dropout"),
    ]
    if options.engine:
        once = {**shared, "epochs": [1]}
        of_ranks = DataLoader(data, batch_size=6, sampler=Own(), collate_fn=leave_out)
        own = {"batch_size": None, "loss_fn": skipping, "dataloader": of_ranks, "name": "own"}
        callbacks += [
            HessianSpectrumCallback(**{**once, "steps": 25}, tolerance="auto", basis="none", name="adaptive"),
            HessianSpectrumCallback(**{**once, "num_samples": "auto"}, tolerance=0.3, name="growing"),
            HessianSpectrumCallback(**once, strategy="finite_difference", name="differences"),
            HessianSpectrumCallback(**{**once, **own}),
        ]
    monitors = [SharpnessMonitor(1, on_error="raise", **samples)] if options.engine else []
    settings = {
        **QUIET,
        "logger": CSVLogger(options.out),
        "log_every_n_steps": 1,
        "devices": WORLD_SIZE,
        "strategy": DDPStrategy(process_group_backend="gloo") if WORLD_SIZE > 1 else "auto",
        "default_root_dir": options.out,
    }
    trainer = pl.Trainer(max_epochs=options.epochs, callbacks=[*callbacks, *monitors], **settings)
    module = Net()
    if options.costs:
        for callback in callbacks:
            OwnClock(options.costs[trainer.global_rank]).govern(callback, module)
    # As many steps in every process, whatever their number.
    trainer.fit(module, DataLoader(Blobs(None), batch_size=96 // (2 * WORLD_SIZE)))
    result = {
        "records": {callback.name: [describe(record) for record in callback.history] for callback in callbacks},
        "tracked": [list(record.scalars("").values()) for monitor in monitors for record in monitor.history],
        "best": Path(trainer.checkpoint_callback.best_model_path).name,
        "candidates": [candidate.epoch for candidate in checkpoint.candidates],
        "world_size": trainer.world_size,
        "steps": trainer.global_step,
        "overheads": {key: float(value) for key, value in trainer.callback_metrics.items() if "overhead" in key},
    }
    (options.out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
