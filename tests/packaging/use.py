"""What a user does with the installed package: train with the callback, read back, and run the commands."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_hesd
from lightning_hesd import HessianSpectrumCallback, SpectrumHistory


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def main(command: str) -> None:
    assert Path.cwd() in Path(lightning_hesd.__file__).parents, "this is not the installed package"
    x = torch.randn(64, 4)
    callback = HessianSpectrumCallback(
        checkpoint="highest_c_t", layers="auto", steps=10, num_samples=32, on_error="raise"
    )
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(Net(), DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16))
    assert len(SpectrumHistory.load(trainer.log_dir)) == 2
    assert callback.history.compare_with_reference() is not None  # its table came along
    assert Path(trainer.checkpoint_callback.best_model_path).is_file()

    spectra = sorted((Path(trainer.log_dir) / "hesd").glob("*[0-9].npz"))
    subprocess.run([command, "plot", *map(str, spectra), "--out", "figures"], check=True)
    assert len(list(Path("figures").glob("*.png"))) == 2
    subprocess.run([command, "report", trainer.log_dir, "--out", "report.html"], check=True)
    assert Path("report.html").stat().st_size > 100_000

    (entry,) = importlib.metadata.entry_points(group="tensorboard_plugins", name="hesd")
    loader = entry.load()
    assert (Path(sys.modules[loader.__module__].__file__).parent / "static").is_dir()  # its page came along


if __name__ == "__main__":
    main(*sys.argv[1:])
