"""Training runs with sharded parameters; `test_sharded.py` starts them as one program, as processes must be real.

With one process the parameters are ordinary ones, and there is the run `whole` only. Every process writes what it saw,
by run, to `<out>/rank<rank>.json`.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.training import cost_notice
from tests.training.broken import out_of_memory
from tests.training.ddp_run import Blobs, describe
from tests.training.modules import QUIET, own_warnings

torch.set_num_threads(1)

WORLD_SIZE = int(os.environ["WORLD_SIZE"])

EPOCHS = 2


class Net(pl.LightningModule):
    """Training is done by full-batch steps on fixed data, so that it is the same for any number of processes."""

    def __init__(self, how: str = "whole") -> None:
        super().__init__()
        torch.manual_seed(0)
        # Of the layer with one unit only the first process has a part.
        layers = (nn.Linear(8, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3))
        self.net = nn.Sequential(*layers).double()
        self.how = how
        everything = Blobs(None)
        self.register_buffer("x", everything.x.double(), persistent=False)
        self.register_buffer("y", everything.classes, persistent=False)

    def configure_model(self) -> None:
        if self.how == "layers split":
            columns = ColwiseParallel(output_layouts=Replicate())
            parallelize_module(self.net[0], self.device_mesh["tensor_parallel"], columns)
        if self.how != "whole" and not any(isinstance(p, DTensor) for p in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[3], self.net):
                fully_shard(layer, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(self.x), self.y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Leaves the outermost parameters gathered: `fully_shard` keeps them until the next backward pass."""
        self.net(batch[0].double())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


class Program:
    """The runs of one process."""

    def __init__(self, out: Path) -> None:
        cost_notice.WARNED = math.inf  # analyses take longer than these trainings of a few steps
        self.out = out
        self.results: dict[str, Any] = {}

    def fit(
        self, name: str, callbacks: list[HessianSpectrumCallback], how: str = "sharded", **options: Any
    ) -> pl.Trainer:
        """Train, and note what came out."""
        split = WORLD_SIZE if how == "layers split" else 1
        sizes = {"data_parallel_size": WORLD_SIZE // split, "tensor_parallel_size": split}
        epochs, folder = options.pop("max_epochs", EPOCHS), self.out / name
        settings = {
            **QUIET,
            "logger": CSVLogger(folder),
            "log_every_n_steps": 1,
            "devices": WORLD_SIZE,
            "strategy": "auto" if how == "whole" else ModelParallelStrategy(**sizes, process_group_backend="gloo"),
        }
        trainer = pl.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), **settings)
        module = Net(how)
        with own_warnings() as caught:
            batches = DataLoader(Blobs(None), batch_size=96 // (2 * trainer.world_size))
            trainer.fit(module, batches, DataLoader(Blobs(None), batch_size=96), **options)
        said = [text for text in caught if text.startswith("lightning_hesd: ")]
        path = folder / f"weights{trainer.global_rank}.pt"
        torch.save([p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()], path)
        self.results[name] = {
            "records": {c.name: [describe(record) for record in c.history] for c in callbacks},
            "layers": {c.name: {k: s.c_t for k, s in (c.history[-1].layers or {}).items()} for c in callbacks},
            "best": trainer.checkpoint_callback.best_model_path,
            "kept": sorted(trainer.checkpoint_callback.best_k_models) if callbacks else [],
            "steps": trainer.global_step,
            "said": said,
        }
        return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--all", type=int, default=0, help="1: all runs, not only the one that is compared")
    options = parser.parse_args()

    def loss_fn(module: Net, batch: Any) -> torch.Tensor:
        return F.cross_entropy(module.net(batch[0].double()), batch[1])

    def failing(module: Net, batch: Any) -> torch.Tensor:
        hidden = module.net[0](batch[0].double())
        if torch.distributed.get_rank() == 1:
            out_of_memory()
        return F.cross_entropy(module.net[1:](hidden), batch[1])

    def callback(**changes: Any) -> HessianSpectrumCallback:
        samples = {"num_samples": 50, "batch_size": 20, "dataloader": DataLoader(Blobs(None), batch_size=10)}
        return HessianSpectrumCallback(**{"steps": 3, "loss_fn": loss_fn, **samples, **changes})

    def callbacks() -> list[HessianSpectrumCallback]:
        # Three batches of 20, 20 and 10: of two processes one has two of them. Of the two batches of the second
        # callback the third process has none.
        return [
            callback(checkpoint=HessianCheckpoint(tolerance=0.02, save_last=True)),
            callback(name="few", batch_size=25, epochs=[1], layers=["net.0"]),
        ]

    program = Program(options.out)
    trainer = program.fit("main", callbacks(), "sharded" if WORLD_SIZE > 1 else "whole")
    if options.all:
        program.fit("bare", [])
        refused = callback(name="refused", preconditioner="optimizer", monitor_gradients=True, epochs=[0])
        sampling = callback(name="sampling", sampling_error=True, epochs=[0])
        program.fit("failing", [callback(loss_fn=failing, checkpoint="highest_c_t"), refused, sampling])
        program.fit("resumed", callbacks()[:1], ckpt_path=program.results["main"]["best"], max_epochs=EPOCHS + 1)
        program.fit("split", [callback()], "layers split", max_epochs=1)
    (options.out / f"rank{trainer.global_rank}.json").write_text(json.dumps(program.results))


if __name__ == "__main__":
    main()
