"""One rank of a run whose samples are the first batches of a stream; `test_first_batches.py` starts it as a program."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from tests.training.ddp_run import Blobs, Net, describe
from tests.training.modules import callback

BATCH = 6


class Share(IterableDataset[Any]):
    """Every process has the batches whose numbers leave its rank as the rest."""

    def __iter__(self) -> Iterator[Any]:
        rank, world = (torch.distributed.get_rank(), 2) if torch.distributed.is_initialized() else (0, 1)
        data = Blobs(None)
        return (data[p] for p in range(len(data)) if p // BATCH % world == rank)


def loss_fn(module: Net, batch: Any) -> torch.Tensor:
    """Return the loss of a batch."""
    return torch.nn.functional.cross_entropy(module.net(batch[0].double()), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    world = int(os.environ["WORLD_SIZE"])
    weights = []
    observer = callback(num_samples=24, loss_fn=loss_fn, steps=10)
    for callbacks in ([], [observer]):
        trainer = pl.Trainer(
            default_root_dir=out,
            accelerator="cpu",
            devices=world,
            strategy=DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
            max_epochs=2,
            limit_train_batches=8 // world,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        module = Net()
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        trainer.fit(module, DataLoader(Share(), batch_size=BATCH))
        weights.append([p.tolist() for p in module.parameters()])
    result = {"records": [describe(record) for record in observer.history], "same": weights[0] == weights[1]}
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
