"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianSpectrumCallback

README = Path(__file__).parents[1] / "README.md"


class Plain(LightningModule):
    """The LightningModule of a user who has never heard of Hessians."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=20)


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:.*called with Trainer configured with multiple .ModelCheckpoint. callbacks")
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 9
    monkeypatch.chdir(tmp_path)  # as in a user's folder: everything is written below it
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"model": Plain(), "train_dataloader": data(), "test_dataloader": data()}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)  # noqa: S102
        trainer = namespace["trainer"]
        if "callback" not in namespace:
            namespace["callback"] = next(c for c in trainer.callbacks if isinstance(c, HessianSpectrumCallback))
            assert len(namespace["callback"].history) == 10
    assert Path(trainer.checkpoint_callback.best_model_path).is_file()
    assert namespace["callback"].history[-1].assessment is not None
    assert "test_loss" in trainer.callback_metrics
    assert namespace["spectrum"].dimension == 8 * 32 + 32 + 32 * 3 + 3
    assert "C_t = " in capsys.readouterr().out


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_files_it_names_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    for link in links:
        assert (page.parent / link).is_file(), link
